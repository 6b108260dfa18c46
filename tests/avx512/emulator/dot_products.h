// VNNI: each 32-bit lane of the sums gains the products of its four bytes, or its two words.
#pragma once

// The compiler's narrow ones are macros.
#undef _mm256_dpbusd_epi32
#undef _mm256_dpbusds_epi32
#undef _mm256_dpwssd_epi32
#undef _mm256_dpwssds_epi32
#undef _mm_dpbusd_epi32
#undef _mm_dpbusds_epi32
#undef _mm_dpwssd_epi32
#undef _mm_dpwssds_epi32

namespace olive {
namespace emulator {

// T x U products of a run of lanes that fill 32 bits; sums wrap, or saturate once at the end.
template <class T, class U, bool kSaturate, class V>
inline V dot(V sums, V a, V b) {
  constexpr int kRun = 4 / sizeof(T);
  const Lanes<T, V> left(a);
  const Lanes<U, V> right(b);
  Lanes<std::int32_t, V> out(sums);
  for (int i = 0; i < out.kCount; ++i) {
    std::int64_t sum = out.at[i];
    for (int j = kRun * i; j < kRun * i + kRun; ++j) sum += std::int32_t{left.at[j]} * right.at[j];
    out.at[i] = kSaturate ? saturate<std::int32_t>(sum) : static_cast<std::int32_t>(sum);
  }
  return out;
}

}  // namespace emulator

// Masked, lanes keep the sums, or are zero.
#define OLIVE_DOT_AS(V, T, U, saturates, prefix, name)                                              \
  inline V prefix##_##name(V sums, V a, V b) { return emulator::dot<T, U, saturates>(sums, a, b); } \
  inline V prefix##_mask_##name(V sums, emulator::Mask<V, std::int32_t> mask, V a, V b) {           \
    return emulator::merge<std::int32_t>(mask, prefix##_##name(sums, a, b), sums);                  \
  }                                                                                                 \
  inline V prefix##_maskz_##name(emulator::Mask<V, std::int32_t> mask, V sums, V a, V b) {          \
    return emulator::merge<std::int32_t>(mask, prefix##_##name(sums, a, b), V{});                   \
  }
#define OLIVE_DOT(T, U, saturates, name)               \
  OLIVE_DOT_AS(__m512i, T, U, saturates, _mm512, name) \
  OLIVE_DOT_AS(__m256i, T, U, saturates, _mm256, name) \
  OLIVE_DOT_AS(__m128i, T, U, saturates, _mm, name)

OLIVE_DOT(std::uint8_t, std::int8_t, false, dpbusd_epi32)
OLIVE_DOT(std::uint8_t, std::int8_t, true, dpbusds_epi32)
OLIVE_DOT(std::int16_t, std::int16_t, false, dpwssd_epi32)
OLIVE_DOT(std::int16_t, std::int16_t, true, dpwssds_epi32)

}  // namespace olive
