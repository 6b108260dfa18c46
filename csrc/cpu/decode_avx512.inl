// Decode 64 packed bytes (8 columns of 16 rows) in registers: one vpshufb per table and nibble.
//
// Levels may be offset (+128 makes them unsigned bytes for vpdpbusd); the identifier's own entry is level 0 plus the
// offset, so victims need no extra step.
//
// Include inside a namespace of the instruction set.

inline __m512i byte_table(const int16_t* levels, int offset) {
  int8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<int8_t>(levels[i] + offset);
  return _mm512_broadcast_i32x4(load<__m128i>(bytes));
}

struct Decoder512 {
  __m512i normal, outlier, plain;

  Decoder512(const Codebook& book, int offset)
      : normal(byte_table(book.normal, offset)),
        outlier(byte_table(book.outlier, offset)),
        plain(byte_table(book.plain, offset)) {}

  // One bit per byte: set where the row's group is plain.
  static __mmask64 plain_bytes(const int16_t* stored) {
    return _mm512_movepi8_mask(reinterpret_cast<__m512i>(block_plain_mask(stored)));
  }

  void operator()(__m512i bytes, __mmask64 plain_rows, __m512i* even, __m512i* odd) const {
    const __m512i nibble = _mm512_set1_epi8(15), identifier = _mm512_set1_epi8(kIdentifier);
    const __m512i low = _mm512_and_si512(bytes, nibble);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
    const __mmask64 low_victim = _mm512_cmpeq_epi8_mask(low, identifier);
    const __mmask64 high_victim = _mm512_cmpeq_epi8_mask(high, identifier);
    __m512i levels = _mm512_shuffle_epi8(normal, low);
    levels = _mm512_mask_shuffle_epi8(levels, high_victim, outlier, low);
    *even = _mm512_mask_shuffle_epi8(levels, plain_rows, plain, low);
    levels = _mm512_shuffle_epi8(normal, high);
    levels = _mm512_mask_shuffle_epi8(levels, low_victim, outlier, high);
    *odd = _mm512_mask_shuffle_epi8(levels, plain_rows, plain, high);
  }
};
