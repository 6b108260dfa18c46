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

// How codes come to a block's shared memory. A step is kColumnTiles of the weight's tiles wide. A warp has kRowTiles
// row tiles of its warpgroup's 64 kRowTiles rows, with kScales stored scales a lane, tile and step, and kStages steps
// on their way.
template <int kRowTilesV, int kColumnTilesV, int kScalesV, int kStagesV>
struct CodeShape {
  static constexpr int kRowTiles = kRowTilesV, kColumnTiles = kColumnTilesV, kScales = kScalesV, kStages = kStagesV;
  static constexpr int kTileBytes = 32 * 16;                               // 16 bytes a lane
  static constexpr int kScalesAt = kRowTiles * kColumnTiles * kTileBytes;  // of a warp's part
  static constexpr int kWarpBytes = kScalesAt + kRowTiles * kScales * 32 * 4;
  static constexpr int kStageBytes = 4 * kConsumers * kWarpBytes;
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

// A thread's own codes and scales of weights on their way to its own places in shared memory, step after step and tile
// after tile, so that no barrier is needed. (Loads to registers would need none either, but the hardware counts loads
// on their way, and the compiler has six counters: it waits for the newest to use the oldest.)
template <class C>
class CodeStream {
 public:
  // `shared`: where the code stages of the block begin.
  __device__ CodeStream(const PackedReader& weight, const TileCounts& tiles, int steps, unsigned char* shared,
                        int warpgroup, int warp, int lane)
      : weight_(weight),
        tiles_(tiles),
        tasks_(tiles.row_units * tiles.token_units),
        steps_(steps),
        warpgroup_(warpgroup),
        warp_(warp),
        lane_(lane),
        own_(shared + (warpgroup * 4 + warp) * C::kWarpBytes + lane * 16),
        place_(shared_address(own_)),
        task_(blockIdx.x) {
    begin();
#pragma unroll 1
    for (int i = 0; i < C::kStages - 1; ++i) copy();
  }

  // The oldest step has arrived; what reads it must have done so before `next`.
  __device__ __forceinline__ const unsigned char* wait() const {
    copy_async_wait<C::kStages - 2>();
    return own_ + first_ * C::kStageBytes;
  }

  // Lets go of the oldest step and starts a new one.
  __device__ __forceinline__ void next() {
    copy();
    first_ = first_ + 1 == C::kStages ? 0 : first_ + 1;
  }

  // The 16 bytes of a tile, and a scale, of what `wait` returned.
  static __device__ __forceinline__ uint4 codes(const unsigned char* step, int row_tile, int column_tile) {
    return *reinterpret_cast<const uint4*>(step + (row_tile * C::kColumnTiles + column_tile) * C::kTileBytes);
  }
  static __device__ __forceinline__ uint32_t scales(const unsigned char* step, int row_tile, int i, int lane) {
    return *reinterpret_cast<const uint32_t*>(step + scale_offset(row_tile, i, lane));
  }

 private:
  // From a lane's first 16 bytes.
  static __device__ __forceinline__ int scale_offset(int row_tile, int i, int lane) {
    return C::kScalesAt + (row_tile * C::kScales + i) * 128 - lane * 12;
  }

  __device__ __forceinline__ void begin() {
    const Tile tile(tiles_, task_);
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      const int first = ((tile.row_unit * kConsumers + warpgroup_) * C::kRowTiles + r) * 4;
      rows_[r] = weight_.rows(first, 4, lane_).below(weight_, warp_);
    }
  }

  __device__ __forceinline__ void copy() {
    if (task_ < tasks_) {
      const uint32_t to = place_ + last_ * C::kStageBytes;
      const int last_tile = weight_.column_tiles - 1;
      const uint32_t last_group = weight_.groups - 1;
#pragma unroll
      for (int r = 0; r < C::kRowTiles; ++r) {
#pragma unroll
        for (int tile = 0; tile < C::kColumnTiles; ++tile) {
          const int wanted = C::kColumnTiles * step_ + tile;
          const uint32_t column = wanted < last_tile ? wanted : last_tile;  // past K: activations are zero
          copy_async(to + (r * C::kColumnTiles + tile) * C::kTileBytes, rows_[r].codes + column * 32u, true);
        }
#pragma unroll
        for (int i = 0; i < C::kScales; ++i) {
          constexpr int kHalves = 2 * C::kColumnTiles;  // of 32 columns
          const uint32_t group = (step_ * kHalves + i * (kHalves / C::kScales)) >> weight_.half_shift;
          const uint32_t* from = rows_[r].scales + (group < last_group ? group : last_group) * 8u;
          copy_async_word(to + scale_offset(r, i, lane_), from);
        }
      }
      if (++step_ == steps_) {
        step_ = 0;
        task_ += gridDim.x;
        begin();
      }
    }
    copy_async_commit();
    last_ = last_ + 1 == C::kStages ? 0 : last_ + 1;
  }

  const PackedReader& weight_;
  const TileCounts& tiles_;
  int tasks_, steps_, warpgroup_, warp_, lane_;
  const unsigned char* own_;
  uint32_t place_;
  TileRows rows_[C::kRowTiles];
  int task_, step_ = 0;
  int first_ = 0, last_ = 0;  // code stages
};

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
