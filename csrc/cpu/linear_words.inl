// ovp_linear on 16-bit words: decode a block of 16 rows to int16 once, then multiply it with every activation row.
//
// Include inside a namespace of the instruction set, after linear_common.inl, decode.inl, a Decoder that fills `words`
// (or says that it cannot) and multiply_block, which gives the 16 sums of a block with one activation row.

// Decode one packed block to 16-bit levels [block / 4 steps][16 rows][4]: step 2 i holds the even columns of vector i,
// step 2 i + 1 the odd ones.
inline void decode_block_words(const uint8_t* codes, const int16_t* stored, int block, const PairTable& table,
                               int16_t* words) {
  for (int vector = 0; vector < block / kPackColumns; ++vector) {
    int16_t* even = words + vector * 2 * kVectorBytes;
    int16_t* odd = even + kVectorBytes;
    const uint8_t* bytes = codes + vector * kVectorBytes;
    for (int row = 0; row < kPackRows; ++row) {
      const int16_t (*levels)[2] = table.levels[scale_is_plain(stored[row]) ? 1 : 0];
      for (int j = 4 * row; j < 4 * row + 4; ++j) {
        even[j] = levels[bytes[j]][0];
        odd[j] = levels[bytes[j]][1];
      }
    }
  }
}

void linear(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  const Activations& x = problem.x;
  alignas(64) int16_t words[kMaxBlock * kPackRows];
  F16 total[kTileRows];
  PairTable table;
  fill_pair_table(problem.book, &table);
  const Decoder decoder(problem.book);
  for (int64_t row_block = begin; row_block < end; ++row_block) {
    for (int64_t m = m_begin; m < m_end; ++m) total[m - m_begin] = F16{};
    for (int64_t block = 0; block < x.blocks(); ++block) {
      const int64_t column = block * x.block;
      const uint8_t* codes = problem.codes + (row_block * x.columns + column) * kPackRows / 2;
      const int16_t* stored = problem.block_scale(row_block, block);
      const F16 scale_w = block_scale_values(stored);
      if (!decoder.decode(codes, stored, x.block, words)) decode_block_words(codes, stored, x.block, table, words);
      for (int64_t m = m_begin; m < m_end; ++m) {
        const I16 s15 = multiply_block(words, x.words + x.at(m, block), x.block);
        const I16 rest = x.digits == 3 ? multiply_block(words, x.rest + x.at(m, block), x.block) : I16{};
        F16& sum = total[m - m_begin];
        sum = accumulate(x, sum, s15, rest, x.scale[x.index(m, block)], scale_w);
      }
    }
    for (int64_t m = m_begin; m < m_end; ++m) store_outputs(problem, m, row_block, total[m - m_begin]);
  }
}
