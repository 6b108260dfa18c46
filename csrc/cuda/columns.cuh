// How encode and decode walk a matrix [N, K]: 16 bytes of a row per thread, a warp 32 of them side by side.
//
// A block takes 16 rows, as a packed tile has: the two rows whose codes share its sectors are then read together. A
// thread keeps its columns and steps down the rows, so that nothing is divided on the way.
#pragma once

#include <algorithm>

#include "core/floats.h"
#include "cuda/runtime.cuh"

namespace olive::cuda {

// Columns of this type that fill 16 bytes.
template <Float kType>
constexpr int kColumnsOf = kType == Float::f32 ? 4 : 8;

constexpr int kWalkRows = 16;
constexpr int kWalkThreads = 32 * kWalkRows;

struct Walk {
  int64_t column, row, row_step;
};

// Where this thread begins; it goes on to row + row_step while that is below N.
__device__ __forceinline__ Walk this_walk(int columns) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kWalkRows + threadIdx.x / 32;
  return {unit * columns, row, static_cast<int64_t>(gridDim.y) * kWalkRows};
}

inline Launch walk(int64_t n, int64_t k, int columns, std::size_t shared, std::uintptr_t stream) {
  constexpr int64_t kBlocksPerProcessor = 16;  // four times what fits: a late block then costs little
  const int64_t across = (k + 32 * columns - 1) / (32 * columns), down = (n + kWalkRows - 1) / kWalkRows;
  const int64_t enough = std::max<int64_t>(1, current_device().multiprocessors * kBlocksPerProcessor / across);
  return {
      static_cast<unsigned>(across), static_cast<unsigned>(std::min(down, enough)), kWalkThreads, shared, 1, stream};
}

inline bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<unsigned>(bytes) == 0;
}

// ---- two 16-bit floats in a word, the first in its low half -----------------------------------------------

template <Float kType>
__device__ __forceinline__ void word_to_floats(uint32_t word, float* first, float* second) {
  if constexpr (kType == Float::bf16) {
    *first = bits_to_float(word << 16);
    *second = bits_to_float(word & 0xFFFF0000u);
  } else {
#if defined(OLIVE_EMULATED)
    *first = f16_to_float(static_cast<uint16_t>(word));
    *second = f16_to_float(static_cast<uint16_t>(word >> 16));
#else
    __half2_raw raw;
    raw.x = static_cast<uint16_t>(word);
    raw.y = static_cast<uint16_t>(word >> 16);
    const float2 values = __half22float2(raw);
    *first = values.x;
    *second = values.y;
#endif
  }
}

template <Float kType>
__device__ __forceinline__ uint32_t floats_to_word(float first, float second) {
#if defined(OLIVE_EMULATED)
  uint16_t halves[2];
  store_float(halves, 0, kType, first);
  store_float(halves, 1, kType, second);
  return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
#else
  if constexpr (kType == Float::bf16) {
    const __nv_bfloat162_raw raw = __floats2bfloat162_rn(first, second);
    return raw.x | static_cast<uint32_t>(raw.y) << 16;
  } else {
    const __half2_raw raw = __floats2half2_rn(first, second);
    return raw.x | static_cast<uint32_t>(raw.y) << 16;
  }
#endif
}

// ---- 16 bytes -----------------------------------------------------------------------------------------------

template <Float kType>
__device__ __forceinline__ void unpack_columns(const uint4& from, float (&to)[kColumnsOf<kType>]) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == Float::f32) {
      to[i] = bits_to_float(words[i]);
    } else {
      word_to_floats<kType>(words[i], &to[2 * i], &to[2 * i + 1]);
    }
  }
}

template <Float kType>
__device__ __forceinline__ uint4 pack_columns(const float (&from)[kColumnsOf<kType>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == Float::f32) {
      words[i] = float_to_bits(from[i]);
    } else {
      words[i] = floats_to_word<kType>(from[2 * i], from[2 * i + 1]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace olive::cuda
