// ovp_linear on signed-byte activations and unsigned-byte weights (level + 128): sums = S + 128 * sum of q, and the
// second term depends on the activation alone: sums start from Activations::offset, which is its negative.
//
// Include inside a namespace of the instruction set, after linear_common.inl and decode_avx512.inl.

constexpr int kPanel = 2;  // row blocks decoded together

inline I16 combine_s15(I16 high, I16 low) { return (high << 8) + low; }

inline int64_t code_offset(const Activations& x, int64_t row_block, int64_t block) {
  return (row_block * x.columns + block * x.block) * kPackRows / 2;
}

// The codes that follow those of (row_block, block) in a panel's order: its next block, or the next panel's first.
inline const uint8_t* next_codes(const Linear& problem, int64_t row_block, int64_t block) {
  const Activations& x = problem.x;
  const bool last = block + 1 == x.blocks();
  return problem.codes + (last ? code_offset(x, row_block + kPanel, 0) : code_offset(x, row_block, block + 1));
}

inline void prefetch(const uint8_t* codes) { _mm_prefetch(reinterpret_cast<const char*>(codes), _MM_HINT_T0); }

// Decode one block of up to two row blocks to [row block][block / 4 steps][16 rows][4] unsigned bytes.
inline void decode_panel(const Linear& problem, const Decoder512& decoder, int64_t row_block, int count, int64_t block,
                         uint8_t* levels, F16* scale_w) {
  const Activations& x = problem.x;
  for (int i = 0; i < count; ++i) {
    const int16_t* stored = problem.block_scale(row_block + i, block);
    const uint8_t* codes = problem.codes + code_offset(x, row_block + i, block);
    const __mmask64 plain = Decoder512::plain_bytes(stored);
    scale_w[i] = block_scale_values(stored);
    uint8_t* to = levels + i * kMaxBlock * kPackRows;
    for (int vector = 0; vector < x.block / kPackColumns; ++vector) {
      __m512i even, odd;
      decoder(load<__m512i>(codes + vector * kVectorBytes), plain, &even, &odd);
      store(to + vector * 2 * kVectorBytes, even);
      store(to + (vector * 2 + 1) * kVectorBytes, odd);
    }
  }
}
