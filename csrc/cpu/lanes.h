// Sixteen lanes as compiler vectors: one source for every instruction set, with the same bits on all of them
// (no contraction into fused multiply-adds: the build says -ffp-contract=off).
//
// Everything has internal linkage: each kernel file is compiled with its own instruction-set flags.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <type_traits>
#include <utility>

#include "cpu/kernels.h"

namespace olive {
namespace {

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef int16_t S16 __attribute__((vector_size(32)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef int8_t B16 __attribute__((vector_size(16)));

// The sixteen lanes as registers: one of sixteen with AVX-512, two of eight elsewhere. Long chains of operations on F16
// go through memory where it is two registers; on parts they do not.
#if defined(__AVX512F__)
typedef F16 FPart;
typedef I16 IPart;
#else
typedef float FPart __attribute__((vector_size(32)));
typedef int32_t IPart __attribute__((vector_size(32)));
#endif
constexpr int kPart = sizeof(FPart) / sizeof(float);
constexpr int kParts = kLanes / kPart;

template <class V>
inline V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
inline void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

template <int kIndex>
struct Index {
  constexpr operator int() const { return kIndex; }
};

template <class F, int... kIndices>
__attribute__((always_inline)) inline void repeat_each(F&& f, std::integer_sequence<int, kIndices...>) {
  (f(Index<kIndices>{}), ...);
}

// f(0), f(1), ... f(kCount - 1) with constant arguments: an array of vectors indexed by them stays in registers, where
// one indexed by a loop counter goes through memory (gcc splits arrays before it unrolls loops).
template <int kCount, class F>
__attribute__((always_inline)) inline void repeat(F&& f) {
  repeat_each(f, std::make_integer_sequence<int, kCount>{});
}
#define OLIVE_EACH(i) [&](auto i) __attribute__((always_inline))

inline F16 splat(float value) { return F16{} + value; }
inline F16 as_float(I16 bits) { return reinterpret_cast<F16>(bits); }
inline I16 as_int(F16 value) { return reinterpret_cast<I16>(value); }
inline F16 absolute(F16 value) { return as_float(as_int(value) & 0x7FFFFFFF); }
inline F16 select(I16 mask, F16 yes, F16 no) { return mask ? yes : no; }

inline FPart splat_part(float value) { return FPart{} + value; }

inline bool any(I16 mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#else
  int64_t found = 0;
  int64_t words[8];
  __builtin_memcpy(words, &mask, sizeof(words));
  for (int i = 0; i < 8; ++i) found |= words[i];
  return found != 0;
#endif
}

#if !defined(__AVX512F__)
inline FPart as_float(IPart bits) { return reinterpret_cast<FPart>(bits); }
inline IPart as_int(FPart value) { return reinterpret_cast<IPart>(value); }
inline FPart absolute(FPart value) { return as_float(as_int(value) & 0x7FFFFFFF); }
inline FPart select(IPart mask, FPart yes, FPart no) { return mask ? yes : no; }
inline bool any(IPart mask) {
#if defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  int64_t words[4];
  __builtin_memcpy(words, &mask, sizeof(words));
  return (words[0] | words[1] | words[2] | words[3]) != 0;
#endif
}
#endif

inline float reduce_max(F16 value) {
  float most = value[0];
  for (int i = 1; i < kLanes; ++i) most = value[i] > most ? value[i] : most;
  return most;
}

inline float reduce_max(const FPart* parts) {
  F16 all;
  __builtin_memcpy(&all, parts, sizeof(all));
  return reduce_max(all);
}

// Fold 8, 4, 2, 1: the order of ops/reference.py, ordered_sum.
inline float fold(const void* sixteen_lanes) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, sixteen_lanes, sizeof(lanes));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
inline float fold(F16 value) { return fold(static_cast<const void*>(&value)); }

inline F16 load_f16(const uint16_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<F16>(_mm512_cvtph_ps(load<__m256i>(from)));
#elif defined(__F16C__)
  F16 value;
  const __m256 low = _mm256_cvtph_ps(load<__m128i>(from)), high = _mm256_cvtph_ps(load<__m128i>(from + 8));
  __builtin_memcpy(&value, &low, 32);
  __builtin_memcpy(reinterpret_cast<char*>(&value) + 32, &high, 32);
  return value;
#else
  F16 value;
  for (int i = 0; i < kLanes; ++i) value[i] = f16_to_float(from[i]);
  return value;
#endif
}

inline F16 load_floats(const void* data, int64_t index, Float type) {
  if (type == Float::f32) return load<F16>(static_cast<const float*>(data) + index);
  const uint16_t* halves = static_cast<const uint16_t*>(data) + index;
  if (type == Float::bf16) {
    const U16 wide = __builtin_convertvector(load<H16>(halves), U16);
    return reinterpret_cast<F16>(wide << 16);
  }
  return load_f16(halves);
}

// Convert `count` values to float32, then zeros up to `padded` (a multiple of 16).
inline void load_row(const void* data, int64_t index, Float type, int64_t count, int64_t padded, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_floats(data, index + i, type));
  for (; i < count; ++i) to[i] = load_float(data, index + i, type);
  for (; i < padded; ++i) to[i] = 0.0f;
}

inline void store_floats(void* data, int64_t index, Float type, F16 value) {
  if (type == Float::f32) {
    store(static_cast<float*>(data) + index, value);
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(data) + index;
  if (type == Float::bf16) {
    const U16 bits = reinterpret_cast<U16>(value);
    const U16 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const U16 nan = (bits >> 16) | 0x40u;
    const U16 result = (bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded;
    store(halves, __builtin_convertvector(result, H16));
    return;
  }
#if defined(__AVX512F__)
  store(halves, _mm512_cvtps_ph(reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) halves[i] = float_to_f16(value[i]);
#endif
}

inline FPart fused_multiply_add(FPart a, FPart b, FPart c) {
#if defined(__AVX512F__)
  return reinterpret_cast<FPart>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<FPart>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  FPart result;
  for (int i = 0; i < kPart; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return result;
#endif
}

#if !defined(__AVX512F__)
inline F16 fused_multiply_add(F16 a, F16 b, F16 c) {
  FPart x[kParts], y[kParts], z[kParts];
  store(x, a);
  store(y, b);
  store(z, c);
  for (int i = 0; i < kParts; ++i) z[i] = fused_multiply_add(x[i], y[i], z[i]);
  return load<F16>(z);
}
#endif

}  // namespace
}  // namespace olive
