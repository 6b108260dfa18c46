// Arithmetic on float32. The estimates rcp14 and rsqrt14 are left out: their bits are a table of the processor's.
#pragma once

#include <cmath>

namespace olive {

#define OLIVE_FLOAT_1(name) OLIVE_HALVES_1(__m512, std::int32_t, name)
#define OLIVE_FLOAT_2(name) OLIVE_HALVES_2(__m512, std::int32_t, name)

OLIVE_FLOAT_2(add_ps)
OLIVE_FLOAT_2(sub_ps)
OLIVE_FLOAT_2(mul_ps)
OLIVE_FLOAT_2(div_ps)
OLIVE_FLOAT_2(max_ps)  // the second operand where one is NaN
OLIVE_FLOAT_2(min_ps)
OLIVE_FLOAT_2(and_ps)
OLIVE_FLOAT_2(or_ps)
OLIVE_FLOAT_2(xor_ps)
OLIVE_FLOAT_2(andnot_ps)
OLIVE_FLOAT_1(sqrt_ps)

inline __m512 _mm512_abs_ps(__m512 a) {
  return emulator::map<std::uint32_t>(a, [](std::uint32_t bits) { return bits & 0x7FFFFFFFu; });
}
inline __m512 _mm512_mask_abs_ps(__m512 source, __mmask16 mask, __m512 a) {
  return emulator::merge<std::int32_t>(mask, _mm512_abs_ps(a), source);
}

// Rounded once. Masks come in three forms: the first operand stays, zero, or the addend stays.
#define OLIVE_FUSED(name)                                                                          \
  inline __m512 _mm512_##name(__m512 a, __m512 b, __m512 c) {                                      \
    return emulator::join(_mm256_##name(emulator::low(a), emulator::low(b), emulator::low(c)),     \
                          _mm256_##name(emulator::high(a), emulator::high(b), emulator::high(c))); \
  }                                                                                                \
  inline __m512 _mm512_mask_##name(__m512 a, __mmask16 mask, __m512 b, __m512 c) {                 \
    return emulator::merge<std::int32_t>(mask, _mm512_##name(a, b, c), a);                         \
  }                                                                                                \
  inline __m512 _mm512_maskz_##name(__mmask16 mask, __m512 a, __m512 b, __m512 c) {                \
    return emulator::merge<std::int32_t>(mask, _mm512_##name(a, b, c), __m512{});                  \
  }                                                                                                \
  inline __m512 _mm512_mask3_##name(__m512 a, __m512 b, __m512 c, __mmask16 mask) {                \
    return emulator::merge<std::int32_t>(mask, _mm512_##name(a, b, c), c);                         \
  }

OLIVE_FUSED(fmadd_ps)
OLIVE_FUSED(fmsub_ps)
OLIVE_FUSED(fnmadd_ps)
OLIVE_FUSED(fnmsub_ps)

namespace emulator {

// To a whole number; `rounding` as an instruction has it in its lowest three bits.
inline double round_to_whole(double value, int rounding) {
  if (rounding & _MM_FROUND_CUR_DIRECTION) return std::nearbyint(value);
  switch (rounding & 3) {
    case _MM_FROUND_TO_NEG_INF:
      return std::floor(value);
    case _MM_FROUND_TO_POS_INF:
      return std::ceil(value);
    case _MM_FROUND_TO_ZERO:
      return std::trunc(value);
    default:
      return std::nearbyint(value);  // nothing here changes the mode from nearest, ties to even
  }
}

// Predicates 16 to 31 differ from 0 to 15 in exceptions only.
inline bool float_relation(float x, float y, int predicate) {
  const bool unordered = std::isnan(x) || std::isnan(y);
  switch (predicate & 15) {
    case _CMP_EQ_OQ:
      return x == y;
    case _CMP_LT_OS:
      return x < y;
    case _CMP_LE_OS:
      return x <= y;
    case _CMP_UNORD_Q:
      return unordered;
    case _CMP_NEQ_UQ:
      return unordered || x != y;
    case _CMP_NLT_US:
      return unordered || x >= y;
    case _CMP_NLE_US:
      return unordered || x > y;
    case _CMP_ORD_Q:
      return !unordered;
    case _CMP_EQ_UQ:
      return unordered || x == y;
    case _CMP_NGE_US:
      return unordered || x < y;
    case _CMP_NGT_US:
      return unordered || x <= y;
    case _CMP_FALSE_OQ:
      return false;
    case _CMP_NEQ_OQ:
      return !unordered && x != y;
    case _CMP_GE_OS:
      return x >= y;
    case _CMP_GT_OS:
      return x > y;
    default:
      return true;
  }
}

}  // namespace emulator

// Control: bits 4 to 7 are how many fraction bits stay. Sixteen times a float32 is exact in float64.
inline __m512 _mm512_roundscale_ps(__m512 a, int control) {
  return emulator::map<float>(a, [=](float value) {
    if (!std::isfinite(value)) return value + value;  // quiet, the sign stays
    const int bits = control >> 4 & 15;
    return static_cast<float>(
        std::ldexp(emulator::round_to_whole(std::ldexp(double{value}, bits), control & 7), -bits));
  });
}
inline __m512 _mm512_floor_ps(__m512 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF); }
inline __m512 _mm512_ceil_ps(__m512 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_POS_INF); }
OLIVE_MASKED_PS(roundscale_ps)

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  return emulator::compare<float>(a, b, [=](float x, float y) { return emulator::float_relation(x, y, predicate); });
}
inline __mmask16 _mm512_mask_cmp_ps_mask(__mmask16 mask, __m512 a, __m512 b, int predicate) {
  return mask & _mm512_cmp_ps_mask(a, b, predicate);
}
#define OLIVE_COMPARE_PS(name, predicate)                                                                         \
  inline __mmask16 _mm512_cmp##name##_ps_mask(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, predicate); } \
  inline __mmask16 _mm512_mask_cmp##name##_ps_mask(__mmask16 mask, __m512 a, __m512 b) {                          \
    return mask & _mm512_cmp_ps_mask(a, b, predicate);                                                            \
  }
OLIVE_COMPARE_PS(eq, _CMP_EQ_OQ)
OLIVE_COMPARE_PS(lt, _CMP_LT_OS)
OLIVE_COMPARE_PS(le, _CMP_LE_OS)
OLIVE_COMPARE_PS(unord, _CMP_UNORD_Q)
OLIVE_COMPARE_PS(neq, _CMP_NEQ_UQ)
OLIVE_COMPARE_PS(nlt, _CMP_NLT_US)
OLIVE_COMPARE_PS(nle, _CMP_NLE_US)
OLIVE_COMPARE_PS(ord, _CMP_ORD_Q)

// Classes: 1 quiet NaN, 2 zero, 4 minus zero, 8 infinite, 16 minus infinite, 32 subnormal, 64 finite below zero,
// 128 signalling NaN.
inline __mmask16 _mm512_fpclass_ps_mask(__m512 a, int classes) {
  return emulator::compare<std::uint32_t>(a, a, [=](std::uint32_t bits, std::uint32_t) {
    const bool minus = bits >> 31;
    const std::uint32_t exponent = bits >> 23 & 255, fraction = bits & 0x7FFFFF;
    int found = 0;
    if (exponent == 255) {
      found = fraction == 0 ? (minus ? 16 : 8) : (fraction >> 22 ? 1 : 128);
    } else {
      if (exponent == 0) found = fraction == 0 ? (minus ? 4 : 2) : 32;
      if (minus && (exponent | fraction) != 0) found |= 64;
    }
    return (found & classes) != 0;
  });
}

// Halves are folded as the compiler folds them: 8 lanes on 8, 4 on 4, 2 on 2, 1 on 1. Where NaN is among the lanes,
// max and min depend on that order.
#define OLIVE_REDUCE_PS(name)                                                                            \
  inline float _mm512_reduce_##name##_ps(__m512 vector) {                                                \
    const __m256 eight = _mm256_##name##_ps(emulator::high(vector), emulator::low(vector));              \
    const __m128 four = _mm_##name##_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight)); \
    const __m128 two = _mm_##name##_ps(four, _mm_shuffle_ps(four, four, _MM_SHUFFLE(1, 0, 3, 2)));       \
    const __m128 one = _mm_##name##_ps(two, _mm_shuffle_ps(two, two, _MM_SHUFFLE(2, 3, 0, 1)));          \
    return _mm_cvtss_f32(one);                                                                           \
  }

OLIVE_REDUCE_PS(add)
OLIVE_REDUCE_PS(mul)
OLIVE_REDUCE_PS(max)
OLIVE_REDUCE_PS(min)

}  // namespace olive
