// Decodes a weight to scale x level [N, K], float32, bfloat16 or float16, from either layout of its codes.
//
// A byte is a pair and has 256 values, so a table of decoded pairs per rule (2 x 256 x two bfloat16, which hold every
// level exactly) replaces the look-ups and selections; what is left is memory.
#include "core/fragments.h"
#include "cuda/api.h"
#include "cuda/columns.cuh"
#include "cuda/pair_table.cuh"

namespace olive::cuda {
namespace {

struct DecodeTables {
  uint32_t pairs[2][256];  // by rule and byte: even level, odd level << 16
};

__device__ __forceinline__ uint32_t level_bits(int level) { return float_to_bits(static_cast<float>(level)) >> 16; }

__device__ __forceinline__ void fill_decode_tables(DecodeTables& tables, const int8_t* codebook) {
  for (int i = static_cast<int>(threadIdx.x); i < 512; i += kWalkThreads) {
    const bool plain = i >= 256;
    const int low = i & 15, high = i >> 4 & 15;
    tables.pairs[plain][i & 255] =
        level_bits(level(codebook, plain, low, high)) | level_bits(level(codebook, plain, high, low)) << 16;
  }
}

// How the two layouts are read: a byte, kBytes neighbours (the first at a multiple of kBytes) as a word, a scale.

struct CanonicalReader {
  const uint8_t* codes;
  const int16_t* scales;
  int64_t pairs, groups;  // per row; 0 groups = one scale for all

  __device__ explicit CanonicalReader(const CanonicalWeight& weight)
      : codes(weight.codes),
        scales(weight.scale),
        pairs((weight.k + 1) / 2),
        groups(weight.group_size == 0 ? 0 : group_count(weight.k, weight.group_size)) {}

  __device__ uint8_t byte(int64_t row, int64_t pair) const { return codes[row * pairs + pair]; }

  template <int kBytes>
  __device__ uint32_t word(int64_t row, int64_t pair) const {
    const uint8_t* from = codes + row * pairs + pair;
    if constexpr (kBytes == 2) return *reinterpret_cast<const uint16_t*>(from);
    return *reinterpret_cast<const uint32_t*>(from);
  }

  __device__ int16_t scale(int64_t row, int64_t group) const { return scales[row * groups + group]; }
};

struct PackedBytes {
  const uint8_t* codes;
  const int16_t* scales;
  int64_t tiles, groups;  // per row

  __device__ explicit PackedBytes(const PackedWeight& weight)
      : codes(weight.codes),
        scales(weight.scale),
        tiles(column_tiles(weight.k)),
        groups(group_count(weight.k, weight.group_size)) {}

  __device__ const uint8_t* address(int64_t row, int64_t pair) const {
    const int64_t tile = row / kTileRows * tiles + pair / (kTileColumns / 2);
    return codes + tile * kTileBytes + tile_byte(static_cast<int>(row % kTileRows), static_cast<int>(pair % 32));
  }

  __device__ uint8_t byte(int64_t row, int64_t pair) const { return *address(row, pair); }

  template <int kBytes>
  __device__ uint32_t word(int64_t row, int64_t pair) const {
    const uint8_t* from = address(row, pair);
    uint32_t bytes = 0;
#pragma unroll
    for (int i = 0; i < kBytes; ++i) bytes |= static_cast<uint32_t>(from[16 * i]) << (8 * i);  // one per lane
    return bytes;
  }

  __device__ int16_t scale(int64_t row, int64_t group) const {
    return scales[(row / kTileRows * groups + group) * kTileRows + tile_scale(static_cast<int>(row % kTileRows))];
  }
};

template <Float kType, bool kAligned, class Reader, class Weight>
__global__ void __launch_bounds__(kWalkThreads) ovp_decode_kernel(Weight weight,
                                                                  void* __restrict__ out) {  // [N, K]
  constexpr int kColumns = kColumnsOf<kType>;
  OLIVE_SHARED(memory);
  auto& tables = *reinterpret_cast<DecodeTables*>(memory);
  fill_decode_tables(tables, weight.codebook);
  __syncthreads();

  const Walk walk = this_walk(kColumns);
  if (walk.column >= weight.k) return;
  const Reader reader(weight);
  const int64_t group = weight.group_size <= 0 ? 0 : walk.column / weight.group_size;
  for (int64_t row = walk.row; row < weight.n; row += walk.row_step) {
    const int16_t stored = reader.scale(row, group);
    const float value = scale_value(stored);
    const uint32_t* levels = tables.pairs[scale_is_plain(stored)];
    const int64_t index = row * weight.k + walk.column, pair = walk.column / 2;
    if constexpr (kAligned) {
      const uint32_t bytes = reader.template word<kColumns / 2>(row, pair);
      float values[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; i += 2) {
        const uint32_t decoded = levels[bytes >> (4 * i) & 255u];
        values[i] = bits_to_float(decoded << 16) * value;
        values[i + 1] = bits_to_float(decoded & 0xFFFF0000u) * value;
      }
      static_cast<uint4*>(out)[index / kColumns] = pack_columns<kType>(values);
    } else {
      for (int i = 0; i < kColumns && walk.column + i < weight.k; ++i) {
        const uint32_t decoded = levels[reader.byte(row, pair + i / 2)];
        const float level = bits_to_float(i % 2 == 0 ? decoded << 16 : decoded & 0xFFFF0000u);
        store_float(out, index + i, kType, level * value);
      }
    }
  }
}

template <Float kType, class Reader, class Weight>
void launch_decode(const char* aligned_name, const char* name, const Weight& weight, void* out, uintptr_t stream) {
  constexpr int kColumns = kColumnsOf<kType>;
  const Launch shape = walk(weight.n, weight.k, kColumns, sizeof(DecodeTables), stream);
  if (weight.k % kColumns == 0 && is_aligned(out, 16) && is_aligned(weight.codes, kColumns / 2)) {
    launch(aligned_name, ovp_decode_kernel<kType, true, Reader, Weight>, shape, weight, out);
  } else {
    launch(name, ovp_decode_kernel<kType, false, Reader, Weight>, shape, weight, out);
  }
}

template <class Reader, class Weight>
void launch_decode(const char* aligned_name, const char* name, const Weight& weight, void* out, Float type,
                   uintptr_t stream) {
  switch (type) {
    case Float::f32:
      return launch_decode<Float::f32, Reader>(aligned_name, name, weight, out, stream);
    case Float::bf16:
      return launch_decode<Float::bf16, Reader>(aligned_name, name, weight, out, stream);
    case Float::f16:
      return launch_decode<Float::f16, Reader>(aligned_name, name, weight, out, stream);
  }
}

}  // namespace

void ovp_decode(const CanonicalWeight& weight, void* out, Float type, uintptr_t stream) {
  launch_decode<CanonicalReader>("ovp_decode", "ovp_decode_unaligned", weight, out, type, stream);
}

void ovp_decode_packed(const PackedWeight& weight, void* out, Float type, uintptr_t stream) {
  launch_decode<PackedBytes>("ovp_decode_packed", "ovp_decode_packed_unaligned", weight, out, type, stream);
}

}  // namespace olive::cuda
