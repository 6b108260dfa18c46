// Lanes to wider and narrower ones, to float32 and from it.
#pragma once

namespace olive {

#define OLIVE_CONVERT(V, From, T, F, name, expression)                             \
  inline V _mm512_##name(From vector) {                                            \
    return emulator::convert<V, T, F>(vector, [](F value) { return expression; }); \
  }                                                                                \
  OLIVE_MASKED_AS(V, T, _mm512, name)

OLIVE_CONVERT(__m512i, __m256i, std::int16_t, std::int8_t, cvtepi8_epi16, value)
OLIVE_CONVERT(__m512i, __m128i, std::int32_t, std::int8_t, cvtepi8_epi32, value)
OLIVE_CONVERT(__m512i, __m128i, std::int64_t, std::int8_t, cvtepi8_epi64, value)
OLIVE_CONVERT(__m512i, __m256i, std::int32_t, std::int16_t, cvtepi16_epi32, value)
OLIVE_CONVERT(__m512i, __m128i, std::int64_t, std::int16_t, cvtepi16_epi64, value)
OLIVE_CONVERT(__m512i, __m256i, std::int64_t, std::int32_t, cvtepi32_epi64, value)
OLIVE_CONVERT(__m512i, __m256i, std::int16_t, std::uint8_t, cvtepu8_epi16, value)
OLIVE_CONVERT(__m512i, __m128i, std::int32_t, std::uint8_t, cvtepu8_epi32, value)
OLIVE_CONVERT(__m512i, __m128i, std::int64_t, std::uint8_t, cvtepu8_epi64, value)
OLIVE_CONVERT(__m512i, __m256i, std::int32_t, std::uint16_t, cvtepu16_epi32, value)
OLIVE_CONVERT(__m512i, __m256i, std::int64_t, std::uint32_t, cvtepu32_epi64, value)

// Narrower: the low bits, or saturated to signed (s) or unsigned (us) lanes. The forms that store take a mask.
#define OLIVE_NARROW_AS(V, T, F, name, to, value_of)                                                     \
  OLIVE_CONVERT(V, __m512i, T, F, name##_##to, value_of)                                                 \
  inline void _mm512_mask_##name##_storeu_##to(void* to_address, emulator::Mask<V, T> mask, __m512i a) { \
    emulator::store_masked<T>(to_address, mask, _mm512_##name##_##to(a));                                \
  }
#define OLIVE_NARROW(V, T, F, from, to)                                                 \
  OLIVE_NARROW_AS(V, T, F, cvt##from, to, value)                                        \
  OLIVE_NARROW_AS(V, T, F, cvts##from, to, emulator::saturate<T>(value))                \
  OLIVE_NARROW_AS(V, std::make_unsigned_t<T>, std::make_unsigned_t<F>, cvtus##from, to, \
                  value > std::numeric_limits<std::make_unsigned_t<T>>::max()           \
                      ? std::numeric_limits<std::make_unsigned_t<T>>::max()             \
                      : value)

OLIVE_NARROW(__m256i, std::int8_t, std::int16_t, epi16, epi8)
OLIVE_NARROW(__m128i, std::int8_t, std::int32_t, epi32, epi8)
OLIVE_NARROW(__m256i, std::int16_t, std::int32_t, epi32, epi16)
OLIVE_NARROW(__m256i, std::int32_t, std::int64_t, epi64, epi32)
OLIVE_NARROW(__m128i, std::int16_t, std::int64_t, epi64, epi16)

// The narrow results of 256 bits, which AVX2 lacks.
#define OLIVE_NARROW_256(T, F, name, expression)                                         \
  inline __m128i _mm256_##name(__m256i vector) {                                         \
    return emulator::convert<__m128i, T, F>(vector, [](F value) { return expression; }); \
  }
OLIVE_NARROW_256(std::int8_t, std::int16_t, cvtepi16_epi8, value)
OLIVE_NARROW_256(std::int8_t, std::int16_t, cvtsepi16_epi8, emulator::saturate<std::int8_t>(value))
OLIVE_NARROW_256(std::int8_t, std::int32_t, cvtepi32_epi8, value)
OLIVE_NARROW_256(std::int8_t, std::int32_t, cvtsepi32_epi8, emulator::saturate<std::int8_t>(value))
OLIVE_NARROW_256(std::int16_t, std::int32_t, cvtepi32_epi16, value)
OLIVE_NARROW_256(std::int16_t, std::int32_t, cvtsepi32_epi16, emulator::saturate<std::int16_t>(value))

namespace emulator {

// The value that says "does not fit", also for NaN: 0x80000000.
inline std::int32_t to_int32(float value, int rounding) {
  const double whole = round_to_whole(value, rounding);
  return whole >= -2147483648.0 && whole < 2147483648.0 ? static_cast<std::int32_t>(whole) : INT32_MIN;
}

// Likewise unsigned: 0xFFFFFFFF.
inline std::uint32_t to_uint32(float value, int rounding) {
  const double whole = round_to_whole(value, rounding);
  return whole >= 0.0 && whole < 4294967296.0 ? static_cast<std::uint32_t>(whole) : UINT32_MAX;
}

}  // namespace emulator

OLIVE_CONVERT(__m512, __m512i, float, std::int32_t, cvtepi32_ps, static_cast<float>(value))
OLIVE_CONVERT(__m512, __m512i, float, std::uint32_t, cvtepu32_ps, static_cast<float>(value))
OLIVE_CONVERT(__m512i, __m512, std::int32_t, float, cvtps_epi32, emulator::to_int32(value, _MM_FROUND_TO_NEAREST_INT))
OLIVE_CONVERT(__m512i, __m512, std::int32_t, float, cvttps_epi32, emulator::to_int32(value, _MM_FROUND_TO_ZERO))
OLIVE_CONVERT(__m512i, __m512, std::uint32_t, float, cvtps_epu32, emulator::to_uint32(value, _MM_FROUND_TO_NEAREST_INT))
OLIVE_CONVERT(__m512i, __m512, std::uint32_t, float, cvttps_epu32, emulator::to_uint32(value, _MM_FROUND_TO_ZERO))

inline __m512i _mm512_cvt_roundps_epi32(__m512 vector, int rounding) {
  return emulator::convert<__m512i, std::int32_t, float>(
      vector, [=](float value) { return emulator::to_int32(value, rounding & 7); });
}
OLIVE_MASKED(std::int32_t, cvt_roundps_epi32)

inline __m512 _mm512_cvtph_ps(__m256i halves) {
  return emulator::join(_mm256_cvtph_ps(emulator::part<__m128i>(halves, 0)),
                        _mm256_cvtph_ps(emulator::part<__m128i>(halves, 1)));
}
// AVX2's instruction has the mode as a constant.
inline __m256i _mm512_cvtps_ph(__m512 vector, int rounding) {
  const auto with = [&](auto convert) {
    return emulator::with_part(emulator::with_part(__m256i{}, convert(emulator::low(vector)), 0),
                               convert(emulator::high(vector)), 1);
  };
  if (rounding & _MM_FROUND_CUR_DIRECTION) rounding = _MM_FROUND_TO_NEAREST_INT;
  switch (rounding & 3) {
    case _MM_FROUND_TO_NEG_INF:
      return with([](__m256 half) { return _mm256_cvtps_ph(half, _MM_FROUND_TO_NEG_INF); });
    case _MM_FROUND_TO_POS_INF:
      return with([](__m256 half) { return _mm256_cvtps_ph(half, _MM_FROUND_TO_POS_INF); });
    case _MM_FROUND_TO_ZERO:
      return with([](__m256 half) { return _mm256_cvtps_ph(half, _MM_FROUND_TO_ZERO); });
    default:
      return with([](__m256 half) { return _mm256_cvtps_ph(half, _MM_FROUND_TO_NEAREST_INT); });
  }
}
inline __m256i _mm512_cvt_roundps_ph(__m512 vector, int rounding) { return _mm512_cvtps_ph(vector, rounding); }
OLIVE_MASKED_PS(cvtph_ps)
OLIVE_MASKED_AS(__m256i, std::int16_t, _mm512, cvtps_ph)

}  // namespace olive
