// Loads, stores, and vectors made of given values.
#pragma once

namespace olive {
namespace emulator {

// Lanes whose bit is not set are neither read nor written: they may lie outside of what is allocated.
template <class T, class V>
inline V load_masked(V otherwise, std::uint64_t mask, const void* from) {
  Lanes<T, V> out(otherwise);
  for (int i = 0; i < out.kCount; ++i) {
    if (bit(mask, i)) std::memcpy(&out.at[i], static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
  }
  return out;
}

template <class T, class V>
inline void store_masked(void* to, std::uint64_t mask, V vector) {
  const Lanes<T, V> in(vector);
  for (int i = 0; i < in.kCount; ++i) {
    if (bit(mask, i)) std::memcpy(static_cast<char*>(to) + i * sizeof(T), &in.at[i], sizeof(T));
  }
}

template <class V>
inline V load(const void* from) {
  V vector;
  std::memcpy(&vector, from, sizeof(V));
  return vector;
}

inline void check_aligned(const void* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % 64 != 0) refuse("an address is not a multiple of 64");
}

// Given from the last lane to the first, as set has them.
template <class T, class V, class... A>
inline V backwards(A... values) {
  static_assert(sizeof...(A) * sizeof(T) == sizeof(V), "one value per lane");
  Lanes<T, V> out(V{});
  int lane = out.kCount;
  ((out.at[--lane] = static_cast<T>(values)), ...);
  return out;
}

}  // namespace emulator

#define OLIVE_LOAD_STORE(V, name)                                                    \
  inline V _mm512_loadu_##name(const void* from) { return emulator::load<V>(from); } \
  inline void _mm512_storeu_##name(void* to, V vector) { std::memcpy(to, &vector, sizeof(V)); }
#define OLIVE_ALIGNED_LOAD_STORE(V, name)               \
  inline V _mm512_load_##name(const void* from) {       \
    emulator::check_aligned(from);                      \
    return emulator::load<V>(from);                     \
  }                                                     \
  inline void _mm512_store_##name(void* to, V vector) { \
    emulator::check_aligned(to);                        \
    std::memcpy(to, &vector, sizeof(V));                \
  }                                                     \
  inline void _mm512_stream_##name(void* to, V vector) { _mm512_store_##name(to, vector); }
#define OLIVE_MASKED_LOAD_STORE(V, T, prefix, name)                                               \
  inline V prefix##_mask_loadu_##name(V otherwise, emulator::Mask<V, T> mask, const void* from) { \
    return emulator::load_masked<T>(otherwise, mask, from);                                       \
  }                                                                                               \
  inline V prefix##_maskz_loadu_##name(emulator::Mask<V, T> mask, const void* from) {             \
    return emulator::load_masked<T>(V{}, mask, from);                                             \
  }                                                                                               \
  inline void prefix##_mask_storeu_##name(void* to, emulator::Mask<V, T> mask, V vector) {        \
    emulator::store_masked<T>(to, mask, vector);                                                  \
  }
#define OLIVE_MASKED_LOADS_STORES(T, name)          \
  OLIVE_MASKED_LOAD_STORE(__m512i, T, _mm512, name) \
  OLIVE_MASKED_LOAD_STORE(__m256i, T, _mm256, name) \
  OLIVE_MASKED_LOAD_STORE(__m128i, T, _mm, name)

OLIVE_LOAD_STORE(__m512i, si512)
OLIVE_LOAD_STORE(__m512i, epi8)
OLIVE_LOAD_STORE(__m512i, epi16)
OLIVE_LOAD_STORE(__m512i, epi32)
OLIVE_LOAD_STORE(__m512i, epi64)
OLIVE_LOAD_STORE(__m512, ps)
OLIVE_ALIGNED_LOAD_STORE(__m512i, si512)
OLIVE_ALIGNED_LOAD_STORE(__m512i, epi32)
OLIVE_ALIGNED_LOAD_STORE(__m512i, epi64)
OLIVE_ALIGNED_LOAD_STORE(__m512, ps)
OLIVE_MASKED_LOADS_STORES(std::int8_t, epi8)
OLIVE_MASKED_LOADS_STORES(std::int16_t, epi16)
OLIVE_MASKED_LOADS_STORES(std::int32_t, epi32)
OLIVE_MASKED_LOADS_STORES(std::int64_t, epi64)
OLIVE_MASKED_LOAD_STORE(__m512, std::int32_t, _mm512, ps)
OLIVE_MASKED_LOAD_STORE(__m256, std::int32_t, _mm256, ps)
OLIVE_MASKED_LOAD_STORE(__m128, std::int32_t, _mm, ps)

inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512i _mm512_setzero_epi32() { return __m512i{}; }
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_undefined_epi32() { return emulator::undefined<__m512i>(); }
inline __m512 _mm512_undefined_ps() { return emulator::undefined<__m512>(); }

inline __m512i _mm512_set1_epi8(char value) { return emulator::repeated<__m512i>(value); }
inline __m512i _mm512_set1_epi16(short value) { return emulator::repeated<__m512i>(value); }
inline __m512i _mm512_set1_epi32(int value) { return emulator::repeated<__m512i>(value); }
inline __m512i _mm512_set1_epi64(long long value) { return emulator::repeated<__m512i>(value); }
inline __m512 _mm512_set1_ps(float value) { return emulator::repeated<__m512>(value); }
OLIVE_MASKED(std::int8_t, set1_epi8)
OLIVE_MASKED(std::int16_t, set1_epi16)
OLIVE_MASKED(std::int32_t, set1_epi32)
OLIVE_MASKED(std::int64_t, set1_epi64)

// setr_epi32, setr_epi64 and setr_ps are the compiler's macros, which call these.
template <class... A>
inline __m512i _mm512_set_epi8(A... values) {
  return emulator::backwards<std::int8_t, __m512i>(values...);
}
template <class... A>
inline __m512i _mm512_set_epi16(A... values) {
  return emulator::backwards<std::int16_t, __m512i>(values...);
}
template <class... A>
inline __m512i _mm512_set_epi32(A... values) {
  return emulator::backwards<std::int32_t, __m512i>(values...);
}
template <class... A>
inline __m512i _mm512_set_epi64(A... values) {
  return emulator::backwards<std::int64_t, __m512i>(values...);
}
template <class... A>
inline __m512 _mm512_set_ps(A... values) {
  return emulator::backwards<float, __m512>(values...);
}
inline __m512i _mm512_set4_epi32(int d, int c, int b, int a) {
  return emulator::repeated<__m512i>(_mm_set_epi32(d, c, b, a));
}

}  // namespace olive
