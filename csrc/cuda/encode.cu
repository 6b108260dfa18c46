// Encodes a weight [N, K] with scales given: codes uint8 [N, ceil(K / 2)], docs/format.md, section 7, to the last bit.
//
// Compile with -fmad=false: the format's products and sums are rounded one by one.
//
// Memory and arithmetic meet. bfloat16 moves 2.5 bytes a weight, of which an H200 multiprocessor gets about 18 per
// clock: 7 weights, for which it issues 128 / 7 = 18 instructions each. Table look-ups (core/encode.h) take 17 in plain
// groups and 23 in others, 9 more where a warp meets outliers (counted in the code for sm_90, a third of them
// addresses and the division); comparing with every threshold would take over 40. float32 has twice as many to spare.
#include "core/encode.h"
#include "core/fragments.h"
#include "cuda/api.h"
#include "cuda/columns.cuh"

namespace olive::cuda {
namespace {

template <bool kPlain, int kColumns>
__device__ __forceinline__ uint32_t encode_columns(const EncodeTables& tables, bool paper_pairing,
                                                   const float (&values)[kColumns], float inverse) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kColumns; i += 2) {
    const PairCode code =
        encode_pair(tables, kPlain, paper_pairing, values[i] * inverse, values[i + 1] * inverse, 1.0f, 1.0f);
    word |= static_cast<uint32_t>(code.byte) << (4 * i);
  }
  return word;
}

template <Float kType, bool kAligned>
__global__ void __launch_bounds__(kWalkThreads)
    ovp_encode_kernel(WeightSource weight,
                      const int16_t* __restrict__ scale,  // [N, G], [1, 1] per tensor
                      uint8_t* __restrict__ codes,        // [N, ceil(K / 2)]
                      int32_t* not_finite) {              // [1]
  constexpr int kColumns = kColumnsOf<kType>;
  OLIVE_SHARED(memory);
  auto& tables = *reinterpret_cast<EncodeTables*>(memory);
  fill_encode_tables(&tables, weight.codebook, static_cast<int>(threadIdx.x), kWalkThreads);
  __syncthreads();

  const Walk walk = this_walk(kColumns);
  if (walk.column >= weight.k) return;
  const int64_t pairs = (weight.k + 1) / 2;
  const int64_t scales = weight.group_size == 0 ? 0 : group_count(weight.k, weight.group_size);  // per row
  const int64_t group = weight.group_size <= 0 ? 0 : walk.column / weight.group_size;
  bool finite = true;
  for (int64_t row = walk.row; row < weight.n; row += walk.row_step) {
    const int64_t index = row * weight.k + walk.column;
    float values[kColumns];
    if constexpr (kAligned) {
      unpack_columns<kType>(static_cast<const uint4*>(weight.data)[index / kColumns], values);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        values[i] = walk.column + i < weight.k ? load_float(weight.data, index + i, kType) : 0.0f;
      }
    }
    const int16_t stored = scale[row * scales + group];
    const float inverse = 1.0f / scale_value(stored);
    const uint32_t word = tables.has_plain && scale_is_plain(stored)
                              ? encode_columns<true>(tables, weight.paper_pairing, values, inverse)
                              : encode_columns<false>(tables, weight.paper_pairing, values, inverse);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) finite = finite && fabsf(values[i]) < INFINITY;
    uint8_t* to = codes + row * pairs + walk.column / 2;
    if constexpr (!kAligned) {
#pragma unroll
      for (int i = 0; i < kColumns; i += 2) {
        if (walk.column + i < weight.k) to[i / 2] = static_cast<uint8_t>(word >> (4 * i));
      }
    } else if constexpr (kType == Float::f32) {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(word);
    } else {
      *reinterpret_cast<uint32_t*>(to) = word;
    }
  }
  if (!finite) atomicOr(not_finite, 1);
}

template <Float kType>
void launch_encode(const WeightSource& weight, const int16_t* scale, uint8_t* codes, int32_t* not_finite,
                   uintptr_t stream) {
  constexpr int kColumns = kColumnsOf<kType>;
  const Launch shape = walk(weight.n, weight.k, kColumns, sizeof(EncodeTables), stream);
  if (weight.k % kColumns == 0 && is_aligned(weight.data, 16) && is_aligned(codes, kColumns / 2)) {
    launch("ovp_encode", ovp_encode_kernel<kType, true>, shape, weight, scale, codes, not_finite);
  } else {
    launch("ovp_encode_unaligned", ovp_encode_kernel<kType, false>, shape, weight, scale, codes, not_finite);
  }
}

}  // namespace

void ovp_encode(const WeightSource& weight, const int16_t* scale, uint8_t* codes, int32_t* not_finite,
                uintptr_t stream) {
  switch (weight.type) {
    case Float::f32:
      return launch_encode<Float::f32>(weight, scale, codes, not_finite, stream);
    case Float::bf16:
      return launch_encode<Float::bf16>(weight, scale, codes, not_finite, stream);
    case Float::f16:
      return launch_encode<Float::f16>(weight, scale, codes, not_finite, stream);
  }
}

}  // namespace olive::cuda
