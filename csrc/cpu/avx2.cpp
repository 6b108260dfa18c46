// AVX2: one vpshufb decodes 32 nibbles, vpmaddwd multiplies 16-bit words.
#include "cpu/lanes.h"

namespace olive {
namespace avx2 {
namespace {

#include "cpu/encode.inl"

#include "cpu/encode8.inl"

#include "cpu/decode.inl"

#include "cpu/decode8.inl"

#include "cpu/activations.inl"

#include "cpu/quantize_activations.inl"

#include "cpu/linear_common.inl"

inline __m256i byte_table(const int16_t* levels) {
  int8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<int8_t>(levels[i]);
  return _mm256_broadcastsi128_si256(load<__m128i>(bytes));
}

struct Decoder {
  __m256i normal, outlier, plain;
  bool is_int8;

  explicit Decoder(const Codebook& book)
      : normal(byte_table(book.normal)),
        outlier(byte_table(book.outlier)),
        plain(byte_table(book.plain)),
        is_int8(book.is_int8) {}

  static void widen(__m256i levels, int16_t* to) {
    store(to, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(levels)));
    store(to + 16, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(levels, 1)));
  }

  // To 16-bit levels; false = the codebook has levels that are no int8.
  bool decode(const uint8_t* codes, const int16_t* stored, int block, int16_t* words) const {
    if (!is_int8) return false;
    const I16 mask = block_plain_mask(stored);
    const __m256i nibble = _mm256_set1_epi8(15), identifier = _mm256_set1_epi8(kIdentifier);
    for (int half = 0; half < 2; ++half) {
      const __m256i plain_rows = load<__m256i>(reinterpret_cast<const char*>(&mask) + 32 * half);
      for (int vector = 0; vector < block / kPackColumns; ++vector) {
        const __m256i bytes = load<__m256i>(codes + vector * kVectorBytes + 32 * half);
        const __m256i low = _mm256_and_si256(bytes, nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        __m256i even = _mm256_blendv_epi8(_mm256_shuffle_epi8(normal, low), _mm256_shuffle_epi8(outlier, low),
                                          _mm256_cmpeq_epi8(high, identifier));
        __m256i odd = _mm256_blendv_epi8(_mm256_shuffle_epi8(normal, high), _mm256_shuffle_epi8(outlier, high),
                                         _mm256_cmpeq_epi8(low, identifier));
        even = _mm256_blendv_epi8(even, _mm256_shuffle_epi8(plain, low), plain_rows);
        odd = _mm256_blendv_epi8(odd, _mm256_shuffle_epi8(plain, high), plain_rows);
        widen(even, words + vector * 2 * kVectorBytes + 32 * half);
        widen(odd, words + (vector * 2 + 1) * kVectorBytes + 32 * half);
      }
    }
    return true;
  }
};

// Four vectors of 4 rows x 4 columns per step; each 32-bit lane sums two columns.
inline I16 multiply_block(const int16_t* words, const int16_t* x, int block) {
  __m256i sums[4] = {};
  for (int step = 0; step < block / 4; ++step) {
    const __m256i four = _mm256_set1_epi64x(load<int64_t>(x + 4 * step));
    for (int i = 0; i < 4; ++i) {
      const __m256i w = load<__m256i>(words + step * kVectorBytes + 16 * i);
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(w, four));
    }
  }
  const I16 low = load<I16>(sums), high = load<I16>(sums + 2);
  return __builtin_shuffle(low, high, I16{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}) +
         __builtin_shuffle(low, high, I16{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
}

#include "cpu/linear_words.inl"

}  // namespace

Kernels kernels() {
  Kernels set = {};
#include "cpu/common_kernels.inl"
  set.linear = linear;
  set.tile_rows = 1;
  return set;
}

}  // namespace avx2
}  // namespace olive
