// ovp_linear on 16-bit words: decode a block of 16 rows to int16 once, then multiply it with every activation row.
//
// Include inside a namespace of the instruction set, after linear_common.inl, decode.inl, a Decoder that fills `words`
// (or says that it cannot), kWordRows, and multiply_words<kRows>, which gives the 16 sums of a block with each of kRows
// activation rows that lie one after another.

constexpr int kStepWords = 2 * kPackRows;  // two columns of a row block

// Decode one packed block to 16-bit levels [block / 2 steps][16 rows][2]: an output per 32-bit lane. The four steps of
// a vector are its columns 0 2, 4 6, 1 3 and 5 7.
inline void decode_block_words(const uint8_t* codes, const int16_t* stored, int block, const PairTable& table,
                               int16_t* words) {
  for (int vector = 0; vector < block / kPackColumns; ++vector) {
    int16_t* even = words + vector * 4 * kStepWords;
    int16_t* odd = even + 2 * kStepWords;
    const uint8_t* bytes = codes + vector * kVectorBytes;
    for (int row = 0; row < kPackRows; ++row) {
      const int16_t (*levels)[2] = table.levels[scale_is_plain(stored[row]) ? 1 : 0];
      for (int j = 0; j < 4; ++j) {
        const int at = (j / 2) * kStepWords + 2 * row + j % 2;
        even[at] = levels[bytes[4 * row + j]][0];
        odd[at] = levels[bytes[4 * row + j]][1];
      }
    }
  }
}

// Rows of activations that multiply_words takes at once, from kWordRows down.
template <int kRows>
inline void multiply_some(const int16_t* words, const int16_t* x, int block, int rows, I16* sums) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_some<kRows - 1>(words, x, block, rows, sums);
  }
  multiply_words<kRows>(words, x, block, sums);
}

void linear_words(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
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
      for (int64_t m = m_begin; m < m_end; m += kWordRows) {
        const int rows = m_end - m < kWordRows ? static_cast<int>(m_end - m) : kWordRows;
        I16 s15[kWordRows], rest[kWordRows];
        multiply_some<kWordRows>(words, x.words + x.at(m, block), x.block, rows, s15);
        if (x.digits == 3) multiply_some<kWordRows>(words, x.rest + x.at(m, block), x.block, rows, rest);
        for (int i = 0; i < rows; ++i) {
          const float scale_x = x.scale[x.index(m + i, block)];
          accumulate_parts(x, &total[m - m_begin + i], &s15[i], &rest[i], scale_x, &scale_w);
        }
      }
    }
    for (int64_t m = m_begin; m < m_end; ++m) store_outputs(problem, m, row_block, total[m - m_begin]);
  }
}
