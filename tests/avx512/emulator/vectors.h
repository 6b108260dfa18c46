// What the emulated intrinsics are made of: vectors as arrays of lanes, as two halves, and lanes chosen by a mask.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

namespace olive::emulator {

[[noreturn]] inline void refuse(const char* reason) {
  std::fprintf(stderr, "AVX-512 emulator: %s\n", reason);
  std::abort();
}

template <class V, class T>
constexpr int kLanesOf = static_cast<int>(sizeof(V) / sizeof(T));

// A vector V as lanes of type T.
template <class T, class V>
struct Lanes {
  static constexpr int kCount = kLanesOf<V, T>;
  T at[kCount];
  explicit Lanes(V vector) { std::memcpy(at, &vector, sizeof(V)); }
  operator V() const {
    V vector;
    std::memcpy(&vector, at, sizeof(V));
    return vector;
  }
};

// The mask type with one bit per lane.
template <int kCount>
using MaskOf = std::conditional_t<
    kCount <= 8, __mmask8,
    std::conditional_t<kCount == 16, __mmask16, std::conditional_t<kCount == 32, __mmask32, __mmask64>>>;
template <class V, class T>
using Mask = MaskOf<kLanesOf<V, T>>;

inline bool bit(std::uint64_t mask, int lane) { return (mask >> lane) & 1; }

// Lanes of `yes` where the mask has a one, else of `no`.
template <class T, class V>
inline V merge(std::uint64_t mask, V yes, V no) {
  Lanes<T, V> out(yes);
  const Lanes<T, V> other(no);
  for (int i = 0; i < out.kCount; ++i) out.at[i] = bit(mask, i) ? out.at[i] : other.at[i];
  return out;
}

// Lane by lane: f of one or of two vectors.
template <class T, class V, class F>
inline V map(V a, F f) {
  Lanes<T, V> out(a);
  for (T& value : out.at) value = static_cast<T>(f(value));
  return out;
}

template <class T, class V, class F>
inline V map(V a, V b, F f) {
  Lanes<T, V> out(a);
  const Lanes<T, V> other(b);
  for (int i = 0; i < out.kCount; ++i) out.at[i] = static_cast<T>(f(out.at[i], other.at[i]));
  return out;
}

// One bit per lane.
template <class T, class V, class F>
inline Mask<V, T> compare(V a, V b, F f) {
  const Lanes<T, V> left(a), right(b);
  std::uint64_t mask = 0;
  for (int i = 0; i < left.kCount; ++i) mask |= std::uint64_t{f(left.at[i], right.at[i])} << i;
  return static_cast<Mask<V, T>>(mask);
}

// As many lanes as both types have; lanes of the result beyond those are zero.
template <class To, class T, class From, class V, class F>
inline To convert(V vector, F f) {
  Lanes<T, To> out(To{});
  const Lanes<From, V> in(vector);
  for (int i = 0; i < out.kCount && i < in.kCount; ++i) out.at[i] = static_cast<T>(f(in.at[i]));
  return out;
}

// Part `index` of a vector, and a vector with that part replaced.
template <class Part, class V>
inline Part part(V vector, int index) {
  Part value;
  std::memcpy(&value, reinterpret_cast<const char*>(&vector) + index % kLanesOf<V, Part> * sizeof(Part), sizeof(Part));
  return value;
}

template <class V, class Part>
inline V with_part(V vector, Part value, int index) {
  std::memcpy(reinterpret_cast<char*>(&vector) + index % kLanesOf<V, Part> * sizeof(Part), &value, sizeof(Part));
  return vector;
}

// The same part everywhere.
template <class V, class Part>
inline V repeated(Part value) {
  V vector;
  for (int i = 0; i < kLanesOf<V, Part>; ++i) vector = with_part(vector, value, i);
  return vector;
}

// What a processor leaves undefined.
template <class V>
inline V undefined() {
  return repeated<V, std::uint8_t>(0xA5);
}

inline __m256i low(__m512i vector) { return part<__m256i>(vector, 0); }
inline __m256i high(__m512i vector) { return part<__m256i>(vector, 1); }
inline __m256 low(__m512 vector) { return part<__m256>(vector, 0); }
inline __m256 high(__m512 vector) { return part<__m256>(vector, 1); }
inline __m512i join(__m256i low, __m256i high) { return with_part(with_part(__m512i{}, low, 0), high, 1); }
inline __m512 join(__m256 low, __m256 high) { return with_part(with_part(__m512{}, low, 0), high, 1); }

template <class T>
inline T saturate(std::int64_t value) {
  constexpr std::int64_t least = std::numeric_limits<T>::min(), most = std::numeric_limits<T>::max();
  return static_cast<T>(value < least ? least : value > most ? most : value);
}

}  // namespace olive::emulator

// _mm512_<name>, which exists, with a mask: lanes of type T, result V.
#define OLIVE_MASKED_AS(V, T, prefix, name)                                             \
  template <class... A>                                                                 \
  inline V prefix##_mask_##name(V source, ::olive::emulator::Mask<V, T> mask, A... a) { \
    return ::olive::emulator::merge<T, V>(mask, prefix##_##name(a...), source);         \
  }                                                                                     \
  template <class... A>                                                                 \
  inline V prefix##_maskz_##name(::olive::emulator::Mask<V, T> mask, A... a) {          \
    return ::olive::emulator::merge<T, V>(mask, prefix##_##name(a...), V{});            \
  }
#define OLIVE_MASKED(T, name) OLIVE_MASKED_AS(__m512i, T, _mm512, name)
#define OLIVE_MASKED_PS(name) OLIVE_MASKED_AS(__m512, std::int32_t, _mm512, name)

// Instructions that AVX2 has for the two halves, one or two operands or a vector and a number. With masks.
#define OLIVE_HALVES_1(V, T, name)                                                            \
  inline V _mm512_##name(V a) {                                                               \
    return emulator::join(_mm256_##name(emulator::low(a)), _mm256_##name(emulator::high(a))); \
  }                                                                                           \
  OLIVE_MASKED_AS(V, T, _mm512, name)
#define OLIVE_HALVES_2(V, T, name)                                              \
  inline V _mm512_##name(V a, V b) {                                            \
    return emulator::join(_mm256_##name(emulator::low(a), emulator::low(b)),    \
                          _mm256_##name(emulator::high(a), emulator::high(b))); \
  }                                                                             \
  OLIVE_MASKED_AS(V, T, _mm512, name)
#define OLIVE_HALVES_N(T, name)                                                                     \
  inline __m512i _mm512_##name(__m512i a, unsigned number) {                                        \
    const int n = static_cast<int>(number);                                                         \
    return emulator::join(_mm256_##name(emulator::low(a), n), _mm256_##name(emulator::high(a), n)); \
  }                                                                                                 \
  OLIVE_MASKED(T, name)
