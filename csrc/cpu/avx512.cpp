// AVX-512 (F, BW, DQ, VL) without VNNI: vpmaddwd on 16-bit words, 512 bits wide.
#include "cpu/lanes.h"

namespace olive {
namespace avx512 {
namespace {

#include "cpu/encode.inl"

#include "cpu/encode8.inl"

#include "cpu/decode.inl"

#include "cpu/decode8.inl"

#include "cpu/activations.inl"

#include "cpu/quantize_activations.inl"

#include "cpu/linear_common.inl"

#include "cpu/decode_avx512.inl"

struct Decoder {
  Decoder512 levels;
  bool is_int8;

  explicit Decoder(const Codebook& book) : levels(book, 0), is_int8(book.is_int8) {}

  static void widen(__m512i bytes, int16_t* to) {
    store(to, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes)));
    store(to + 32, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1)));
  }

  // To 16-bit levels; false = the codebook has levels that are no int8.
  bool decode(const uint8_t* codes, const int16_t* stored, int block, int16_t* words) const {
    if (!is_int8) return false;
    const __mmask64 plain = Decoder512::plain_bytes(stored);
    for (int vector = 0; vector < block / kPackColumns; ++vector) {
      __m512i even, odd;
      levels(load<__m512i>(codes + vector * kVectorBytes), plain, &even, &odd);
      widen(even, words + vector * 2 * kVectorBytes);
      widen(odd, words + (vector * 2 + 1) * kVectorBytes);
    }
    return true;
  }
};

constexpr int kWordRows = 6;  // 12 sums, 6 broadcasts and 2 vectors of weights in 32 registers

// Two vectors of 8 rows x 4 columns per step; each 32-bit lane sums two columns.
template <int kRows>
inline void multiply_words(const int16_t* words, const int16_t* x, int block, I16* sums) {
  __m512i lanes[kRows][2];
  repeat<kRows>(OLIVE_EACH(m) { lanes[m][0] = lanes[m][1] = _mm512_setzero_si512(); });
  for (int step = 0; step < block / 4; ++step) {
    const __m512i low = load<__m512i>(words + step * kVectorBytes);
    const __m512i high = load<__m512i>(words + step * kVectorBytes + 32);
    repeat<kRows>(OLIVE_EACH(m) {
      const __m512i four = _mm512_set1_epi64(load<int64_t>(x + m * block + 4 * step));
      lanes[m][0] = _mm512_add_epi32(lanes[m][0], _mm512_madd_epi16(low, four));
      lanes[m][1] = _mm512_add_epi32(lanes[m][1], _mm512_madd_epi16(high, four));
    });
  }
  repeat<kRows>(OLIVE_EACH(m) {
    const I16 low = reinterpret_cast<I16>(lanes[m][0]), high = reinterpret_cast<I16>(lanes[m][1]);
    sums[m] = __builtin_shuffle(low, high, I16{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}) +
              __builtin_shuffle(low, high, I16{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
  });
}

#include "cpu/linear_words.inl"

}  // namespace

Kernels kernels() {
  Kernels set = {};
#include "cpu/common_kernels.inl"
  set.linear = linear_words;
  set.tile_rows = 1;
  return set;
}

}  // namespace avx512
}  // namespace olive
