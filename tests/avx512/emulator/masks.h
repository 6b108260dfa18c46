// Masks: from comparisons and from vectors, to vectors, and arithmetic on them.
#pragma once

namespace olive {

// Immediate operands 0 to 7 of the integer comparisons.
namespace emulator {
template <class T>
inline bool relation(T x, T y, int predicate) {
  switch (predicate & 7) {
    case 0:
      return x == y;
    case 1:
      return x < y;
    case 2:
      return x <= y;
    case 3:
      return false;
    case 4:
      return x != y;
    case 5:
      return x >= y;
    case 6:
      return x > y;
    default:
      return true;
  }
}
}  // namespace emulator

#define OLIVE_COMPARE_AS(T, relation_name, suffix, predicate)                                                         \
  inline emulator::Mask<__m512i, T> _mm512_cmp##relation_name##_##suffix##_mask(__m512i a, __m512i b) {               \
    return emulator::compare<T>(a, b, [](T x, T y) { return emulator::relation(x, y, predicate); });                  \
  }                                                                                                                   \
  inline emulator::Mask<__m512i, T> _mm512_mask_cmp##relation_name##_##suffix##_mask(emulator::Mask<__m512i, T> mask, \
                                                                                     __m512i a, __m512i b) {          \
    return mask & _mm512_cmp##relation_name##_##suffix##_mask(a, b);                                                  \
  }
#define OLIVE_COMPARE(T, suffix)                                                                                \
  OLIVE_COMPARE_AS(T, eq, suffix, 0)                                                                            \
  OLIVE_COMPARE_AS(T, lt, suffix, 1)                                                                            \
  OLIVE_COMPARE_AS(T, le, suffix, 2)                                                                            \
  OLIVE_COMPARE_AS(T, neq, suffix, 4)                                                                           \
  OLIVE_COMPARE_AS(T, ge, suffix, 5)                                                                            \
  OLIVE_COMPARE_AS(T, gt, suffix, 6)                                                                            \
  inline emulator::Mask<__m512i, T> _mm512_cmp_##suffix##_mask(__m512i a, __m512i b, int predicate) {           \
    return emulator::compare<T>(a, b, [=](T x, T y) { return emulator::relation(x, y, predicate); });           \
  }                                                                                                             \
  inline emulator::Mask<__m512i, T> _mm512_mask_cmp_##suffix##_mask(emulator::Mask<__m512i, T> mask, __m512i a, \
                                                                    __m512i b, int predicate) {                 \
    return mask & _mm512_cmp_##suffix##_mask(a, b, predicate);                                                  \
  }

OLIVE_COMPARE(std::int8_t, epi8)
OLIVE_COMPARE(std::uint8_t, epu8)
OLIVE_COMPARE(std::int16_t, epi16)
OLIVE_COMPARE(std::uint16_t, epu16)
OLIVE_COMPARE(std::int32_t, epi32)
OLIVE_COMPARE(std::uint32_t, epu32)
OLIVE_COMPARE(std::int64_t, epi64)
OLIVE_COMPARE(std::uint64_t, epu64)

#define OLIVE_MASK_OF(T, suffix)                                                                                 \
  inline emulator::Mask<__m512i, T> _mm512_test_##suffix##_mask(__m512i a, __m512i b) {                          \
    return emulator::compare<T>(a, b, [](T x, T y) { return (x & y) != 0; });                                    \
  }                                                                                                              \
  inline emulator::Mask<__m512i, T> _mm512_testn_##suffix##_mask(__m512i a, __m512i b) {                         \
    return emulator::compare<T>(a, b, [](T x, T y) { return (x & y) == 0; });                                    \
  }                                                                                                              \
  inline emulator::Mask<__m512i, T> _mm512_mask_test_##suffix##_mask(emulator::Mask<__m512i, T> mask, __m512i a, \
                                                                     __m512i b) {                                \
    return mask & _mm512_test_##suffix##_mask(a, b);                                                             \
  }                                                                                                              \
  inline emulator::Mask<__m512i, T> _mm512_mov##suffix##_mask(__m512i a) {                                       \
    return emulator::compare<T>(a, a, [](T x, T) { return x < 0; });                                             \
  }                                                                                                              \
  inline __m512i _mm512_movm_##suffix(emulator::Mask<__m512i, T> mask) {                                         \
    return emulator::merge<T>(mask, ~__m512i{}, __m512i{});                                                      \
  }                                                                                                              \
  inline __m512i _mm512_mask_blend_##suffix(emulator::Mask<__m512i, T> mask, __m512i no, __m512i yes) {          \
    return emulator::merge<T>(mask, yes, no);                                                                    \
  }                                                                                                              \
  inline __m512i _mm512_mask_mov_##suffix(__m512i no, emulator::Mask<__m512i, T> mask, __m512i yes) {            \
    return emulator::merge<T>(mask, yes, no);                                                                    \
  }                                                                                                              \
  inline __m512i _mm512_maskz_mov_##suffix(emulator::Mask<__m512i, T> mask, __m512i yes) {                       \
    return emulator::merge<T>(mask, yes, __m512i{});                                                             \
  }

OLIVE_MASK_OF(std::int8_t, epi8)
OLIVE_MASK_OF(std::int16_t, epi16)
OLIVE_MASK_OF(std::int32_t, epi32)
OLIVE_MASK_OF(std::int64_t, epi64)

inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 no, __m512 yes) {
  return emulator::merge<std::int32_t>(mask, yes, no);
}
inline __m512 _mm512_mask_mov_ps(__m512 no, __mmask16 mask, __m512 yes) {
  return emulator::merge<std::int32_t>(mask, yes, no);
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 yes) {
  return emulator::merge<std::int32_t>(mask, yes, __m512{});
}

// Arithmetic on masks; of 16 bits the compiler's _kand_mask16 and so on are macros for _mm512_kand and so on.
#define OLIVE_MASK_ARITHMETIC(M, and_, or_, xor_, andn, not_, xnor) \
  inline M and_(M a, M b) { return a & b; }                         \
  inline M or_(M a, M b) { return a | b; }                          \
  inline M xor_(M a, M b) { return a ^ b; }                         \
  inline M andn(M a, M b) { return static_cast<M>(~a & b); }        \
  inline M not_(M a) { return static_cast<M>(~a); }                 \
  inline M xnor(M a, M b) { return static_cast<M>(~(a ^ b)); }

OLIVE_MASK_ARITHMETIC(__mmask8, _kand_mask8, _kor_mask8, _kxor_mask8, _kandn_mask8, _knot_mask8, _kxnor_mask8)
OLIVE_MASK_ARITHMETIC(__mmask16, _mm512_kand, _mm512_kor, _mm512_kxor, _mm512_kandn, _mm512_knot, _mm512_kxnor)
OLIVE_MASK_ARITHMETIC(__mmask32, _kand_mask32, _kor_mask32, _kxor_mask32, _kandn_mask32, _knot_mask32, _kxnor_mask32)
OLIVE_MASK_ARITHMETIC(__mmask64, _kand_mask64, _kor_mask64, _kxor_mask64, _kandn_mask64, _knot_mask64, _kxnor_mask64)

inline __mmask64 _cvtu64_mask64(unsigned long long bits) { return bits; }
inline __mmask32 _cvtu32_mask32(unsigned bits) { return bits; }
inline __mmask16 _cvtu32_mask16(unsigned bits) { return static_cast<__mmask16>(bits); }
inline unsigned long long _cvtmask64_u64(__mmask64 mask) { return mask; }
inline unsigned _cvtmask32_u32(__mmask32 mask) { return mask; }
inline unsigned _cvtmask16_u32(__mmask16 mask) { return mask; }
inline __mmask16 _mm512_int2mask(int bits) { return static_cast<__mmask16>(bits); }
inline int _mm512_mask2int(__mmask16 mask) { return mask; }
inline __mmask64 _mm512_kunpackd(__mmask64 high, __mmask64 low) { return high << 32 | (low & 0xFFFFFFFFu); }

}  // namespace olive
