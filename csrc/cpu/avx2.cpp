// AVX2: one vpshufb decodes 32 nibbles, vpmaddwd multiplies 16-bit words.
#include "cpu/lanes.h"
#include "cpu/uniform.h"

namespace olive {
namespace avx2 {
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

  // Half a packed vector, 8 columns of 8 rows, to the levels of its even and its odd columns.
  void operator()(__m256i bytes, __m256i plain_rows, __m256i* even, __m256i* odd) const {
    const __m256i nibble = _mm256_set1_epi8(15), identifier = _mm256_set1_epi8(kIdentifier);
    const __m256i low = _mm256_and_si256(bytes, nibble);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    *even = _mm256_blendv_epi8(_mm256_shuffle_epi8(normal, low), _mm256_shuffle_epi8(outlier, low),
                               _mm256_cmpeq_epi8(high, identifier));
    *odd = _mm256_blendv_epi8(_mm256_shuffle_epi8(normal, high), _mm256_shuffle_epi8(outlier, high),
                              _mm256_cmpeq_epi8(low, identifier));
    *even = _mm256_blendv_epi8(*even, _mm256_shuffle_epi8(plain, low), plain_rows);
    *odd = _mm256_blendv_epi8(*odd, _mm256_shuffle_epi8(plain, high), plain_rows);
  }

  // Levels of 4 columns of 8 rows to two steps of words; the other 8 rows of a step lie 16 words on.
  static void widen(__m256i levels, int16_t* to) {
    const __m256i halves = _mm256_broadcastsi128_si256(  // columns 0 1 of four rows, then 2 3
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    levels = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(levels, halves), 0xD8);
    store(to, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(levels)));
    store(to + 2 * kPackRows, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(levels, 1)));
  }

  // To 16-bit levels; false = the codebook has levels that are no int8.
  bool decode(const uint8_t* codes, const int16_t* stored, int block, int16_t* words) const {
    if (!is_int8) return false;
    const PlainRows rows(stored);
    for (int vector = 0; vector < block / kPackColumns; ++vector) {
      repeat<2>(OLIVE_EACH(half) {
        __m256i even, odd;
        (*this)(load<__m256i>(codes + vector * kVectorBytes + 32 * half), rows.half[half], &even, &odd);
        int16_t* to = words + vector * 2 * kVectorBytes + kPackRows * half;
        widen(even, to);
        widen(odd, to + kVectorBytes);
      });
    }
    return true;
  }

  // 32-bit masks of the rows whose group is plain, 8 rows each.
  struct PlainRows {
    __m256i half[2];
    explicit PlainRows(const int16_t* stored) {
      const I16 mask = block_plain_mask(stored);
      __builtin_memcpy(half, &mask, sizeof(half));
    }
  };
};

constexpr int kWordRows = 6;  // 12 sums, 2 vectors of weights, a broadcast and a product: all 16 registers

// Two vectors of 8 rows x 2 columns per step.
template <int kRows>
inline void multiply_words(const int16_t* words, const int16_t* x, int block, I16* sums) {
  __m256i first[kRows], second[kRows];
  repeat<kRows>(OLIVE_EACH(m) { first[m] = second[m] = _mm256_setzero_si256(); });
  for (int step = 0; step < block / 2; ++step) {
    const __m256i low = load<__m256i>(words + step * 2 * kPackRows);
    const __m256i high = load<__m256i>(words + step * 2 * kPackRows + kPackRows);
    repeat<kRows>(OLIVE_EACH(m) {
      const __m256i two = _mm256_set1_epi32(load<int32_t>(x + m * block + 2 * step));
      first[m] = _mm256_add_epi32(first[m], _mm256_madd_epi16(low, two));
      second[m] = _mm256_add_epi32(second[m], _mm256_madd_epi16(high, two));
    });
  }
  repeat<kRows>(OLIVE_EACH(m) {
    store(&sums[m], first[m]);
    store(reinterpret_cast<__m256i*>(&sums[m]) + 1, second[m]);
  });
}

#include "cpu/linear_words.inl"

constexpr int kByteRows = 8;  // beyond, decoding to words once for all rows wins
// Ask for codes that lie 2 KiB ahead in the stream: the hardware prefetcher stops at page borders.
inline void prefetch(const uint8_t* codes) { _mm_prefetch(reinterpret_cast<const char*>(codes + 2048), _MM_HINT_T0); }

// sum += four products of signed bytes per lane. vpmaddubsw takes an unsigned factor: |w| times x with w's sign. Two
// products of levels up to 127 are at most 32258, so nothing saturates.
__attribute__((always_inline)) inline void dot4(__m256i& sum, __m256i w, __m256i magnitude, const int8_t* x) {
  const __m256i four = _mm256_sign_epi8(_mm256_set1_epi32(load<int32_t>(x)), w);
  const __m256i pairs = _mm256_maddubs_epi16(magnitude, four);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Few rows of levels: weights are decoded in registers and used at once.
template <int kRows>
inline void few_rows(const Linear& problem, int64_t m_begin, int64_t begin, int64_t end) {
  const Activations& x = problem.x;
  const Decoder decoder(problem.book);
  for (int64_t row_block = begin; row_block < end; ++row_block) {
    F16 total[kRows] = {};
    const uint8_t* codes = problem.codes + row_block * x.columns * kPackRows / 2;
    for (int64_t block = 0; block < x.blocks(); ++block) {
      const int16_t* stored = problem.block_scale(row_block, block);
      const Decoder::PlainRows plain(stored);
      const int8_t* levels = x.low + x.at(m_begin, block);
      __m256i sums[kRows][2];
      repeat<kRows>(OLIVE_EACH(m) { sums[m][0] = sums[m][1] = _mm256_setzero_si256(); });
      for (int column = 0; column < x.block; column += kPackColumns, codes += kVectorBytes) {
        prefetch(codes);
        repeat<2>(OLIVE_EACH(half) {
          __m256i even, odd;
          decoder(load<__m256i>(codes + 32 * half), plain.half[half], &even, &odd);
          const __m256i even_magnitude = _mm256_abs_epi8(even), odd_magnitude = _mm256_abs_epi8(odd);
          repeat<kRows>(OLIVE_EACH(m) {
            dot4(sums[m][half], even, even_magnitude, levels + m * x.block + column);
            dot4(sums[m][half], odd, odd_magnitude, levels + m * x.block + column + 4);
          });
        });
      }
      const F16 scale_w = block_scale_values(stored);
      repeat<kRows>(OLIVE_EACH(m) {
        I16 sum;  // copied half by half, or gcc keeps the sums in memory throughout
        repeat<2>(OLIVE_EACH(half) { store(reinterpret_cast<__m256i*>(&sum) + half, sums[m][half]); });
        accumulate_parts(x, &total[m], &sum, nullptr, x.scale[x.index(m_begin + m, block)], &scale_w);
      });
    }
    repeat<kRows>(OLIVE_EACH(m) { store_outputs(problem, m_begin + m, row_block, total[m]); });
  }
}

template <int kRows>
inline void few_rows_of(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  if constexpr (kRows > 1) {
    if (m_end - m_begin < kRows) return few_rows_of<kRows - 1>(problem, m_begin, m_end, begin, end);
  }
  few_rows<kRows>(problem, m_begin, begin, end);
}

void linear(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  if (problem.x.low != nullptr) return few_rows_of<kByteRows>(problem, m_begin, m_end, begin, end);
  linear_words(problem, m_begin, m_end, begin, end);
}

}  // namespace

Kernels kernels() {
  Kernels set = {};
#include "cpu/common_kernels.inl"
  set.linear = linear;
  set.level_bytes_rows = kByteRows;
  set.tile_rows = 1;
  return set;
}

}  // namespace avx2
}  // namespace olive
