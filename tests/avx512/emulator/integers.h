// Integer arithmetic, lane by lane; sums and products of neighbours within a lane of the result.
#pragma once

namespace olive {

#define OLIVE_EACH_1(T, name) OLIVE_HALVES_1(__m512i, T, name)
#define OLIVE_EACH_2(T, name) OLIVE_HALVES_2(__m512i, T, name)

OLIVE_EACH_2(std::int8_t, add_epi8)
OLIVE_EACH_2(std::int16_t, add_epi16)
OLIVE_EACH_2(std::int32_t, add_epi32)
OLIVE_EACH_2(std::int64_t, add_epi64)
OLIVE_EACH_2(std::int8_t, sub_epi8)
OLIVE_EACH_2(std::int16_t, sub_epi16)
OLIVE_EACH_2(std::int32_t, sub_epi32)
OLIVE_EACH_2(std::int64_t, sub_epi64)
OLIVE_EACH_2(std::int8_t, adds_epi8)
OLIVE_EACH_2(std::int16_t, adds_epi16)
OLIVE_EACH_2(std::int8_t, adds_epu8)
OLIVE_EACH_2(std::int16_t, adds_epu16)
OLIVE_EACH_2(std::int8_t, subs_epi8)
OLIVE_EACH_2(std::int16_t, subs_epi16)
OLIVE_EACH_2(std::int8_t, subs_epu8)
OLIVE_EACH_2(std::int16_t, subs_epu16)
OLIVE_EACH_2(std::int8_t, avg_epu8)
OLIVE_EACH_2(std::int16_t, avg_epu16)
OLIVE_EACH_2(std::int8_t, min_epi8)
OLIVE_EACH_2(std::int8_t, max_epi8)
OLIVE_EACH_2(std::int8_t, min_epu8)
OLIVE_EACH_2(std::int8_t, max_epu8)
OLIVE_EACH_2(std::int16_t, min_epi16)
OLIVE_EACH_2(std::int16_t, max_epi16)
OLIVE_EACH_2(std::int16_t, min_epu16)
OLIVE_EACH_2(std::int16_t, max_epu16)
OLIVE_EACH_2(std::int32_t, min_epi32)
OLIVE_EACH_2(std::int32_t, max_epi32)
OLIVE_EACH_2(std::int32_t, min_epu32)
OLIVE_EACH_2(std::int32_t, max_epu32)
OLIVE_EACH_1(std::int8_t, abs_epi8)
OLIVE_EACH_1(std::int16_t, abs_epi16)
OLIVE_EACH_1(std::int32_t, abs_epi32)

OLIVE_EACH_2(std::int16_t, mullo_epi16)
OLIVE_EACH_2(std::int32_t, mullo_epi32)
OLIVE_EACH_2(std::int16_t, mulhi_epi16)
OLIVE_EACH_2(std::int16_t, mulhi_epu16)
OLIVE_EACH_2(std::int16_t, mulhrs_epi16)
OLIVE_EACH_2(std::int64_t, mul_epi32)
OLIVE_EACH_2(std::int64_t, mul_epu32)
OLIVE_EACH_2(std::int32_t, madd_epi16)
OLIVE_EACH_2(std::int16_t, maddubs_epi16)
OLIVE_EACH_2(std::int64_t, sad_epu8)

OLIVE_HALVES_N(std::int16_t, slli_epi16)
OLIVE_HALVES_N(std::int32_t, slli_epi32)
OLIVE_HALVES_N(std::int64_t, slli_epi64)
OLIVE_HALVES_N(std::int16_t, srli_epi16)
OLIVE_HALVES_N(std::int32_t, srli_epi32)
OLIVE_HALVES_N(std::int64_t, srli_epi64)
OLIVE_HALVES_N(std::int16_t, srai_epi16)
OLIVE_HALVES_N(std::int32_t, srai_epi32)
OLIVE_EACH_2(std::int32_t, sllv_epi32)
OLIVE_EACH_2(std::int32_t, srlv_epi32)
OLIVE_EACH_2(std::int32_t, srav_epi32)
OLIVE_EACH_2(std::int64_t, sllv_epi64)
OLIVE_EACH_2(std::int64_t, srlv_epi64)

// AVX2 shifts no 16-bit lanes by counts of their own, nor 64-bit lanes with their sign.
inline __m512i _mm512_sllv_epi16(__m512i a, __m512i count) {
  return emulator::map<std::uint16_t>(a, count, [](unsigned x, unsigned n) { return n > 15 ? 0 : x << n; });
}
inline __m512i _mm512_srlv_epi16(__m512i a, __m512i count) {
  return emulator::map<std::uint16_t>(a, count, [](unsigned x, unsigned n) { return n > 15 ? 0 : x >> n; });
}
inline __m512i _mm512_srav_epi16(__m512i a, __m512i count) {
  return emulator::map<std::int16_t>(
      a, count, [](std::int16_t x, std::int16_t n) { return x >> (static_cast<std::uint16_t>(n) > 15 ? 15 : n); });
}
inline __m512i _mm512_srai_epi64(__m512i a, unsigned count) {
  return emulator::map<std::int64_t>(a, [count](std::int64_t x) { return x >> (count > 63 ? 63 : count); });
}
inline __m512i _mm512_mullo_epi64(__m512i a, __m512i b) {
  return emulator::map<std::uint64_t>(a, b, [](std::uint64_t x, std::uint64_t y) { return x * y; });
}
OLIVE_MASKED(std::int16_t, sllv_epi16)
OLIVE_MASKED(std::int16_t, srlv_epi16)
OLIVE_MASKED(std::int16_t, srav_epi16)
OLIVE_MASKED(std::int64_t, srai_epi64)
OLIVE_MASKED(std::int64_t, mullo_epi64)

// One name per lane width, because of the masks.
#define OLIVE_BITWISE(name, expression)                                            \
  inline __m512i _mm512_##name##si512(__m512i a, __m512i b) { return expression; } \
  inline __m512i _mm512_##name##epi32(__m512i a, __m512i b) { return expression; } \
  inline __m512i _mm512_##name##epi64(__m512i a, __m512i b) { return expression; } \
  OLIVE_MASKED(std::int32_t, name##epi32)                                          \
  OLIVE_MASKED(std::int64_t, name##epi64)

OLIVE_BITWISE(and_, a& b)
OLIVE_BITWISE(or_, a | b)
OLIVE_BITWISE(xor_, a ^ b)
OLIVE_BITWISE(andnot_, ~a& b)

// Bit 4 a + 2 b + c of the table, for every bit.
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i out = {};
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return out;
}
inline __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
  return _mm512_ternarylogic_epi32(a, b, c, table);
}

// Sums wrap; the order of steps is the compiler's, which matters to floats only.
#define OLIVE_REDUCE(T, name, expression)            \
  inline T _mm512_reduce_##name(__m512i vector) {    \
    const emulator::Lanes<T, __m512i> lanes(vector); \
    T x = lanes.at[0];                               \
    for (int i = 1; i < lanes.kCount; ++i) {         \
      const T y = lanes.at[i];                       \
      x = static_cast<T>(expression);                \
    }                                                \
    return x;                                        \
  }

OLIVE_REDUCE(int, add_epi32, static_cast<unsigned>(x) + static_cast<unsigned>(y))
OLIVE_REDUCE(int, max_epi32, y > x ? y : x)
OLIVE_REDUCE(int, min_epi32, y < x ? y : x)
OLIVE_REDUCE(unsigned, max_epu32, y > x ? y : x)
OLIVE_REDUCE(unsigned, min_epu32, y < x ? y : x)
OLIVE_REDUCE(int, or_epi32, x | y)
OLIVE_REDUCE(int, and_epi32, x& y)
OLIVE_REDUCE(long long, add_epi64, static_cast<unsigned long long>(x) + static_cast<unsigned long long>(y))

}  // namespace olive
