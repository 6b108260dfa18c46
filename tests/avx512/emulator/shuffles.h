// Bytes and words that change places: casts, parts, broadcasts, shuffles within 128 bits and across them.
#pragma once

namespace olive {

// Casts that widen leave the rest undefined; zext clears it.
#define OLIVE_CAST(To, From, name) \
  inline To _mm512_##name(From vector) { return emulator::part<To>(vector, 0); }
#define OLIVE_WIDEN(To, From, name, rest) \
  inline To _mm512_##name(From vector) { return emulator::with_part<To>(rest, vector, 0); }

OLIVE_CAST(__m256i, __m512i, castsi512_si256)
OLIVE_CAST(__m128i, __m512i, castsi512_si128)
OLIVE_CAST(__m256, __m512, castps512_ps256)
OLIVE_CAST(__m128, __m512, castps512_ps128)
OLIVE_CAST(__m512, __m512i, castsi512_ps)
OLIVE_CAST(__m512i, __m512, castps_si512)
OLIVE_WIDEN(__m512i, __m256i, castsi256_si512, emulator::undefined<__m512i>())
OLIVE_WIDEN(__m512i, __m128i, castsi128_si512, emulator::undefined<__m512i>())
OLIVE_WIDEN(__m512, __m256, castps256_ps512, emulator::undefined<__m512>())
OLIVE_WIDEN(__m512, __m128, castps128_ps512, emulator::undefined<__m512>())
OLIVE_WIDEN(__m512i, __m256i, zextsi256_si512, __m512i{})
OLIVE_WIDEN(__m512i, __m128i, zextsi128_si512, __m512i{})
OLIVE_WIDEN(__m512, __m256, zextps256_ps512, __m512{})
OLIVE_WIDEN(__m512, __m128, zextps128_ps512, __m512{})
inline int _mm512_cvtsi512_si32(__m512i vector) { return emulator::part<int>(vector, 0); }
inline float _mm512_cvtss_f32(__m512 vector) { return emulator::part<float>(vector, 0); }

#define OLIVE_EXTRACT(V, Part, name) \
  inline Part _mm512_##name(V vector, int index) { return emulator::part<Part>(vector, index); }
#define OLIVE_INSERT(V, Part, name) \
  inline V _mm512_##name(V vector, Part value, int index) { return emulator::with_part(vector, value, index); }

OLIVE_EXTRACT(__m512i, __m256i, extracti64x4_epi64)
OLIVE_EXTRACT(__m512i, __m256i, extracti32x8_epi32)
OLIVE_EXTRACT(__m512i, __m128i, extracti32x4_epi32)
OLIVE_EXTRACT(__m512i, __m128i, extracti64x2_epi64)
OLIVE_EXTRACT(__m512, __m128, extractf32x4_ps)
OLIVE_EXTRACT(__m512, __m256, extractf32x8_ps)
OLIVE_INSERT(__m512i, __m256i, inserti64x4)
OLIVE_INSERT(__m512i, __m256i, inserti32x8)
OLIVE_INSERT(__m512i, __m128i, inserti32x4)
OLIVE_INSERT(__m512i, __m128i, inserti64x2)
OLIVE_INSERT(__m512, __m128, insertf32x4)
OLIVE_INSERT(__m512, __m256, insertf32x8)

#define OLIVE_BROADCAST(V, Part, From, T, name)                                                          \
  inline V _mm512_##name(From vector) { return emulator::repeated<V>(emulator::part<Part>(vector, 0)); } \
  OLIVE_MASKED_AS(V, T, _mm512, name)

OLIVE_BROADCAST(__m512i, __m128i, __m128i, std::int32_t, broadcast_i32x4)
OLIVE_BROADCAST(__m512i, __m128i, __m128i, std::int64_t, broadcast_i64x2)
OLIVE_BROADCAST(__m512i, __m256i, __m256i, std::int32_t, broadcast_i32x8)
OLIVE_BROADCAST(__m512i, __m256i, __m256i, std::int64_t, broadcast_i64x4)
OLIVE_BROADCAST(__m512, __m128, __m128, std::int32_t, broadcast_f32x4)
OLIVE_BROADCAST(__m512i, std::int8_t, __m128i, std::int8_t, broadcastb_epi8)
OLIVE_BROADCAST(__m512i, std::int16_t, __m128i, std::int16_t, broadcastw_epi16)
OLIVE_BROADCAST(__m512i, std::int32_t, __m128i, std::int32_t, broadcastd_epi32)
OLIVE_BROADCAST(__m512i, std::int64_t, __m128i, std::int64_t, broadcastq_epi64)
OLIVE_BROADCAST(__m512, float, __m128, std::int32_t, broadcastss_ps)

// Within each 128 bits, as AVX2 does them.
OLIVE_EACH_2(std::int8_t, shuffle_epi8)
OLIVE_EACH_2(std::int8_t, unpacklo_epi8)
OLIVE_EACH_2(std::int8_t, unpackhi_epi8)
OLIVE_EACH_2(std::int16_t, unpacklo_epi16)
OLIVE_EACH_2(std::int16_t, unpackhi_epi16)
OLIVE_EACH_2(std::int32_t, unpacklo_epi32)
OLIVE_EACH_2(std::int32_t, unpackhi_epi32)
OLIVE_EACH_2(std::int64_t, unpacklo_epi64)
OLIVE_EACH_2(std::int64_t, unpackhi_epi64)
OLIVE_EACH_2(std::int8_t, packs_epi16)
OLIVE_EACH_2(std::int8_t, packus_epi16)
OLIVE_EACH_2(std::int16_t, packs_epi32)
OLIVE_EACH_2(std::int16_t, packus_epi32)
OLIVE_HALVES_2(__m512, std::int32_t, unpacklo_ps)
OLIVE_HALVES_2(__m512, std::int32_t, unpackhi_ps)

namespace emulator {

// out[i] = in[source(i)]; T gives the lanes their width.
template <class T, class V, class F>
inline V permute(V vector, F source) {
  const Lanes<T, V> in(vector);
  Lanes<T, V> out(vector);
  for (int i = 0; i < out.kCount; ++i) out.at[i] = in.at[source(i)];
  return out;
}

// Lanes of a, then those of b, numbered through.
template <class T, class V>
inline V permute_two(V a, __m512i index, V b) {
  const Lanes<T, V> first(a), second(b);
  const Lanes<T, __m512i> from(index);
  Lanes<T, V> out(a);
  for (int i = 0; i < out.kCount; ++i) {
    const int lane = static_cast<int>(static_cast<std::uint64_t>(from.at[i]) % (2 * out.kCount));
    out.at[i] = lane < out.kCount ? first.at[lane] : second.at[lane - out.kCount];
  }
  return out;
}

// `bytes` from the concatenation of b (low) and a, per run of kRun bytes; past both there are zeros.
template <int kRun>
inline __m512i align_right(__m512i a, __m512i b, unsigned bytes) {
  const Lanes<std::uint8_t, __m512i> high(a), low(b);
  Lanes<std::uint8_t, __m512i> out(a);
  for (int i = 0; i < out.kCount; ++i) {
    const int run = i / kRun * kRun;
    const unsigned at = i % kRun + bytes;
    out.at[i] = at < kRun ? low.at[run + at] : at < 2 * kRun ? high.at[run + at - kRun] : 0;
  }
  return out;
}

}  // namespace emulator

inline __m512i _mm512_shuffle_epi32(__m512i a, int order) {
  return emulator::permute<std::int32_t>(a, [=](int i) { return (i & ~3) | (order >> 2 * (i & 3) & 3); });
}
inline __m512 _mm512_permute_ps(__m512 a, int order) {
  return emulator::permute<std::int32_t>(a, [=](int i) { return (i & ~3) | (order >> 2 * (i & 3) & 3); });
}
inline __m512i _mm512_permutex_epi64(__m512i a, int order) {
  return emulator::permute<std::int64_t>(a, [=](int i) { return (i & ~3) | (order >> 2 * (i & 3) & 3); });
}
inline __m512i _mm512_alignr_epi8(__m512i a, __m512i b, int bytes) {
  return emulator::align_right<16>(a, b, static_cast<std::uint8_t>(bytes));
}
inline __m512i _mm512_alignr_epi32(__m512i a, __m512i b, int lanes) {
  return emulator::align_right<64>(a, b, static_cast<unsigned>(lanes % 16) * 4);
}
inline __m512i _mm512_alignr_epi64(__m512i a, __m512i b, int lanes) {
  return emulator::align_right<64>(a, b, static_cast<unsigned>(lanes % 8) * 8);
}
inline __m512i _mm512_bsrli_epi128(__m512i a, int bytes) {
  return emulator::align_right<16>(__m512i{}, a, static_cast<std::uint8_t>(bytes));
}
inline __m512i _mm512_bslli_epi128(__m512i a, int bytes) {
  return emulator::align_right<16>(a, __m512i{}, bytes > 15 ? 32u : 16u - static_cast<unsigned>(bytes));
}
// Two 128-bit parts of a, then two of b.
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order) {
  __m512i out = {};
  for (int i = 0; i < 4; ++i) {
    out = emulator::with_part(out, emulator::part<__m128i>(i < 2 ? a : b, order >> 2 * i & 3), i);
  }
  return out;
}
inline __m512i _mm512_shuffle_i64x2(__m512i a, __m512i b, int order) { return _mm512_shuffle_i32x4(a, b, order); }
OLIVE_MASKED(std::int32_t, shuffle_epi32)
OLIVE_MASKED_PS(permute_ps)
OLIVE_MASKED(std::int64_t, permutex_epi64)
OLIVE_MASKED(std::int8_t, alignr_epi8)
OLIVE_MASKED(std::int32_t, alignr_epi32)
OLIVE_MASKED(std::int64_t, alignr_epi64)
OLIVE_MASKED(std::int32_t, shuffle_i32x4)
OLIVE_MASKED(std::int64_t, shuffle_i64x2)

// Their argument may have a type of the global namespace (_MM_PERM_ENUM), and the compiler's functions would be found
// by it; a number has none.
#define _mm512_shuffle_epi32(a, order) (_mm512_shuffle_epi32)(a, static_cast<int>(order))
#define _mm512_mask_shuffle_epi32(source, mask, a, order) \
  (_mm512_mask_shuffle_epi32)(source, mask, a, static_cast<int>(order))
#define _mm512_maskz_shuffle_epi32(mask, a, order) (_mm512_maskz_shuffle_epi32)(mask, a, static_cast<int>(order))

// Across the vector. The index comes first, or between the two vectors.
#define OLIVE_PERMUTE(V, T, suffix)                                                                                \
  inline V _mm512_permutexvar_##suffix(__m512i index, V vector) {                                                  \
    const emulator::Lanes<T, __m512i> from(index);                                                                 \
    return emulator::permute<T>(vector, [&](int i) { return from.at[i] & (from.kCount - 1); });                    \
  }                                                                                                                \
  inline V _mm512_permutex2var_##suffix(V a, __m512i index, V b) { return emulator::permute_two<T>(a, index, b); } \
  inline V _mm512_mask_permutex2var_##suffix(V a, emulator::Mask<V, T> mask, __m512i index, V b) {                 \
    return emulator::merge<T>(mask, emulator::permute_two<T>(a, index, b), a);                                     \
  }                                                                                                                \
  inline V _mm512_maskz_permutex2var_##suffix(emulator::Mask<V, T> mask, V a, __m512i index, V b) {                \
    return emulator::merge<T>(mask, emulator::permute_two<T>(a, index, b), V{});                                   \
  }                                                                                                                \
  OLIVE_MASKED_AS(V, T, _mm512, permutexvar_##suffix)

OLIVE_PERMUTE(__m512i, std::int16_t, epi16)
OLIVE_PERMUTE(__m512i, std::int32_t, epi32)
OLIVE_PERMUTE(__m512i, std::int64_t, epi64)
OLIVE_PERMUTE(__m512, std::int32_t, ps)
#if defined(OLIVE_EMULATE_VBMI)
OLIVE_PERMUTE(__m512i, std::int8_t, epi8)
#endif

}  // namespace olive
