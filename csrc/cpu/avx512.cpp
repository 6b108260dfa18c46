// AVX-512 (F, BW, DQ, VL) without VNNI: vpmaddwd on 16-bit words, 512 bits wide.
#include "cpu/lanes.h"
#include "cpu/uniform.h"

namespace olive {
namespace avx512 {
namespace {

#include "cpu/encode.inl"

#include "cpu/encode8.inl"

#include "cpu/compensate.inl"

#include "cpu/decode.inl"

#include "cpu/decode8.inl"

#include "cpu/training_lanes.inl"

#include "cpu/statsq.inl"

#include "cpu/lsq.inl"

#include "cpu/oscillation.inl"

#include "cpu/activations.inl"

#include "cpu/quantize_activations.inl"

#include "cpu/uniform_input.inl"

#include "cpu/uniform_dot_avx2.inl"

#include "cpu/uniform_linear.inl"

#include "cpu/linear_common.inl"

#include "cpu/decode_avx512.inl"

struct Decoder {
  Decoder512 levels;
  bool is_int8;

  explicit Decoder(const Codebook& book) : levels(book, 0), is_int8(book.is_int8) {}

  // Levels of 4 columns of 16 rows to two steps of words.
  static void widen(__m512i levels, int16_t* to) {
    const __m512i halves = _mm512_broadcast_i32x4(  // columns 0 1 of four rows, then 2 3
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    levels = _mm512_permutexvar_epi64(order, _mm512_shuffle_epi8(levels, halves));
    store(to, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(levels)));
    store(to + 2 * kPackRows, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(levels, 1)));
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

constexpr int kWordRows = 12;  // as many sums; the load ports keep up with a broadcast per product

// One vector of 16 rows x 2 columns per step.
template <int kRows>
inline void multiply_words(const int16_t* words, const int16_t* x, int block, I16* sums) {
  __m512i lanes[kRows];
  repeat<kRows>(OLIVE_EACH(m) { lanes[m] = _mm512_setzero_si512(); });
  for (int step = 0; step < block / 2; ++step) {
    const __m512i w = load<__m512i>(words + step * 2 * kPackRows);
    repeat<kRows>(OLIVE_EACH(m) {
      const __m512i two = _mm512_set1_epi32(load<int32_t>(x + m * block + 2 * step));
      lanes[m] = _mm512_add_epi32(lanes[m], _mm512_madd_epi16(w, two));
    });
  }
  repeat<kRows>(OLIVE_EACH(m) { store(&sums[m], lanes[m]); });
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
