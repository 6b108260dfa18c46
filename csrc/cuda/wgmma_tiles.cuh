// What the kernels that multiply with wgmma share: the order of tiles, the ring of stages, the descriptor of
// activations, how outputs are written.
#pragma once

#include "cuda/packed_reader.cuh"
#include "cuda/pair_table.cuh"
#include "cuda/runtime.cuh"

namespace olive::cuda {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kWgmmaThreads = 128 * (1 + kConsumers);
constexpr int kTokenGroup = 8;  // token units that neighbouring blocks share weights and activations among, for L2
constexpr int kOutBytes = 64 * 64 * 2;  // a warpgroup's outputs on their way, 64 activation rows at a time

struct TileCounts {
  int row_units, token_units;
};

#if defined(OLIVE_HAS_WGMMA)

// Which tile a block is at: neighbours in time share activations and weights while those are in L2.
struct Tile {
  int row_unit, token_unit;
  __device__ Tile(const TileCounts& counts, int task) {
    const int group = task / (kTokenGroup * counts.row_units);
    const int within = task - group * kTokenGroup * counts.row_units;
    const int left = counts.token_units - group * kTokenGroup;
    const int width = left < 1 ? 1 : left < kTokenGroup ? left : kTokenGroup;
    row_unit = within / width;
    token_unit = group * kTokenGroup + within - row_unit * width;
  }
};

// A place in the ring of stages.
template <int kStages>
struct Slot {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// B of one product, 32 bytes of each row: K-major, rows of 128 bytes, chunks swizzled; eight rows are 1024 bytes.
__device__ __forceinline__ uint64_t describe(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kEightRows = static_cast<uint64_t>(1024 >> 4) << 32,
                     kUnused = 1ull << 16;
  return kSwizzle128 | kEightRows | kUnused | (address >> 4 & 0x3FFF);
}

// The descriptor of what is so many bytes further on: shared memory ends below the 2^18 that its field can count.
__device__ __forceinline__ uint64_t further(uint64_t descriptor, int bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes >> 4);
  return (descriptor & ~static_cast<uint64_t>(0xFFFFFFFFu)) | low;
}

// Writes one tile of 64 weight rows as 16-bit values: through shared memory, so that rows of y get 128 bytes at once.
// value(c) is the float of accumulator c, round(low, high) makes two of them 16-bit ones. kBarrier: the warpgroup's.
template <int kTokens, int kBarrier, class Value, class Round>
__device__ __forceinline__ void write_halves(void* out, int64_t m, int64_t n, unsigned char* staging, int64_t first_row,
                                             int64_t first_token, int warp, int lane, Value value, Round round) {
  const uint32_t staging_address = shared_address(staging);
  const bool whole = n % 8 == 0;  // 16-byte stores are aligned
#pragma unroll
  for (int part = 0; part < kTokens / 64; ++part) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t matrices[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // tokens 8 (j + i / 2) ..., rows 8 (i % 2) ...
        const int c = 4 * (8 * part + j + i / 2) + 2 * (i % 2);
        matrices[i] = round(value(c), value(c + 1));
      }
      const int token = 8 * (j + lane / 16) + lane % 8, chunk = 2 * warp + lane / 8 % 2;
      store_matrices_transposed(staging_address + token * 128 + (chunk ^ (token & 7)) * 16, matrices);
    }
    sync_some<kBarrier, 128>();
    for (int i = warp * 32 + lane; i < 64 * 8; i += 128) {
      const int chunk = i % 8, token = i / 8;
      const int64_t row = first_row + 8 * chunk, out_token = first_token + 64 * part + token;
      if (out_token >= m || row >= n) continue;
      const unsigned char* from = staging + token * 128 + (chunk ^ (token & 7)) * 16;
      uint16_t* to = static_cast<uint16_t*>(out) + out_token * n + row;
      if (whole) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int e = 0; e < 8 && row + e < n; ++e) to[e] = reinterpret_cast<const uint16_t*>(from)[e];
      }
    }
    sync_some<kBarrier, 128>();
  }
}

// A lane's two rows of a tile of 64: their bias, 0 past N.
__device__ __forceinline__ void load_bias(float (&bias)[2], const void* from, Float type, int64_t first_row, int64_t n,
                                          int warp, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = first_row + 16 * warp + lane / 4 + 8 * h;
    bias[h] = from != nullptr && row < n ? load_float(from, row, type) : 0.0f;
  }
}

#endif  // OLIVE_HAS_WGMMA

}  // namespace olive::cuda
