// ovp_linear on signed-byte activations and unsigned-byte weights (level + 128): sums = S + 128 * sum of q, and the
// second term depends on the activation alone: sums start from Activations::offset, which is its negative.
//
// Include inside a namespace of the instruction set, after linear_common.inl and decode_avx512.inl.

constexpr int kPanel = 2;  // row blocks decoded together
// Bytes ahead of the stream of codes that are asked for: the hardware prefetcher stops at page borders.
constexpr int kPrefetch = 4096;

inline I16 combine_s15(I16 high, I16 low) { return (high << 8) + low; }

// Decode one block of up to two row blocks to [row block][block / 4 steps][16 rows][4] unsigned bytes.
inline void decode_panel(const Linear& problem, const Decoder512& decoder, int64_t row_block, int count, int64_t block,
                         uint8_t* levels, F16* scale_w) {
  const Activations& x = problem.x;
  for (int i = 0; i < count; ++i) {
    const int16_t* stored = problem.block_scale(row_block + i, block);
    const uint8_t* codes = problem.codes + ((row_block + i) * x.columns + block * x.block) * kPackRows / 2;
    const __mmask64 plain = Decoder512::plain_bytes(stored);
    scale_w[i] = block_scale_values(stored);
    uint8_t* to = levels + i * kMaxBlock * kPackRows;
    for (int vector = 0; vector < x.block / kPackColumns; ++vector) {
      __m512i even, odd;
      _mm_prefetch(reinterpret_cast<const char*>(codes + vector * kVectorBytes + kPrefetch), _MM_HINT_T0);
      decoder(load<__m512i>(codes + vector * kVectorBytes), plain, &even, &odd);
      store(to + vector * 2 * kVectorBytes, even);
      store(to + (vector * 2 + 1) * kVectorBytes, odd);
    }
  }
}
