// ovp_linear with vpdpbusd: 16 rows x 4 columns per instruction, one instruction per 64 weights and activation row for
// levels, two (high and low digit) for 16-bit activations, three for float32.
//
// Few rows: weights are decoded in registers and used at once. Many rows: a block of 32 rows is decoded to the
// first-level cache and multiplied with as many activation rows as make 24 independent sums in registers.
//
// Include inside a namespace of the instruction set, after linear_bytes.inl.

// Bytes ahead of the stream of codes that are asked for: the hardware prefetcher stops at page borders.
constexpr int kPrefetch = 4096;

inline I16 as_lanes(__m512i value) { return reinterpret_cast<I16>(value); }

inline __m512i broadcast4(const int8_t* from) { return _mm512_set1_epi32(load<int32_t>(from)); }

// sum += four byte products per lane. Not the intrinsic: gcc 12 copies its accumulator before and spills it after
// every instruction, which halves the speed; with "+v" it stays in its register.
__attribute__((always_inline)) inline void dot4(__m512i& sum, __m512i levels, __m512i digits) {
#if defined(OLIVE_EMULATED)  // tests/avx512/emulator knows intrinsics, not assembly
  sum = _mm512_dpbusd_epi32(sum, levels, digits);
#else
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(levels), "v"(digits));
#endif
}

template <int kRows, int kDigits>
inline void few_rows(const Linear& problem, int64_t m_begin, int64_t begin, int64_t end) {
  const Activations& x = problem.x;
  const Decoder512 decoder(problem.book, kOffset);
  for (int64_t row_block = begin; row_block < end; ++row_block) {
    F16 total[kRows] = {};
    const uint8_t* codes = problem.codes + row_block * x.columns * kPackRows / 2;
    for (int64_t block = 0; block < x.blocks(); ++block) {
      const int16_t* stored = problem.block_scale(row_block, block);
      const __mmask64 plain = Decoder512::plain_bytes(stored);
      __m512i high[kDigits >= 2 ? kRows : 1][2], low[kRows][2], rest[kDigits == 3 ? kRows : 1][2];
      repeat<kRows>(OLIVE_EACH(m) {
        const int64_t index = x.index(m_begin + m, block);
        low[m][0] = _mm512_set1_epi32(x.offset[index]);
        low[m][1] = _mm512_setzero_si512();
        if constexpr (kDigits >= 2) high[m][0] = high[m][1] = low[m][1];
        if constexpr (kDigits == 3) rest[m][0] = _mm512_set1_epi32(x.rest_offset[index]), rest[m][1] = low[m][1];
      });
      const int64_t at = x.at(m_begin, block);
      for (int column = 0; column < x.block; column += kPackColumns, codes += kVectorBytes) {
        prefetch(codes + kPrefetch);
        __m512i levels[2];
        decoder(load<__m512i>(codes), plain, &levels[0], &levels[1]);
        repeat<kRows>(OLIVE_EACH(m) {
          const int64_t first = at + m * x.block + column;
          repeat<2>(OLIVE_EACH(half) {
            const int64_t four = first + 4 * half;
            if constexpr (kDigits >= 2) {
              dot4(high[m][half], levels[half], broadcast4(x.high + four));
            }
            dot4(low[m][half], levels[half], broadcast4(x.low + four));
            if constexpr (kDigits == 3) {
              dot4(rest[m][half], levels[half], broadcast4(x.rest8 + four));
            }
          });
        });
      }
      const F16 scale_w = block_scale_values(stored);
      repeat<kRows>(OLIVE_EACH(m) {
        const int64_t index = x.index(m_begin + m, block);
        I16 sum = as_lanes(low[m][0]) + as_lanes(low[m][1]), r = {};
        if constexpr (kDigits >= 2) sum = combine_s15(as_lanes(high[m][0]) + as_lanes(high[m][1]), sum);
        if constexpr (kDigits == 3) r = as_lanes(rest[m][0]) + as_lanes(rest[m][1]);
        total[m] = accumulate(x, total[m], sum, r, x.scale[index], scale_w);
      });
    }
    repeat<kRows>(OLIVE_EACH(m) { store_outputs(problem, m_begin + m, row_block, total[m]); });
  }
}

// One decoded block of up to two row blocks, and where the codes of the next one lie.
struct Panel {
  alignas(64) uint8_t levels[kPanel * kMaxBlock * kPackRows];
  F16 scale_w[kPanel];
  const uint8_t* next[kPanel];
};

// One block of kRows activation rows times kBlocks row blocks; total [row block][kTileRows].
//
// The next block's codes are asked for here, a line per step: asked for all at once they would wait for each other
// (a core has two dozen lines on their way at most), and the decoder for them.
template <int kRows, int kBlocks, int kDigits>
inline void multiply_tile(const Activations& x, const Panel& panel, int64_t m, int64_t block, F16* total) {
  __m512i high[kDigits >= 2 ? kRows : 1][kBlocks], low[kRows][kBlocks], rest[kDigits == 3 ? kRows : 1][kBlocks];
  repeat<kRows>(OLIVE_EACH(i) {
    const int64_t index = x.index(m + i, block);
    repeat<kBlocks>(OLIVE_EACH(n) {
      low[i][n] = _mm512_set1_epi32(x.offset[index]);
      if constexpr (kDigits >= 2) high[i][n] = _mm512_setzero_si512();
      if constexpr (kDigits == 3) rest[i][n] = _mm512_set1_epi32(x.rest_offset[index]);
    });
  });
  const int64_t at = x.at(m, block), columns = x.block;
  const int8_t *x_high = kDigits >= 2 ? x.high + at : nullptr, *x_low = x.low + at;
  const int8_t* x_rest = kDigits == 3 ? x.rest8 + at : nullptr;
  for (int step = 0; step < x.block / 4; ++step) {
    __m512i w[kBlocks];
    prefetch(panel.next[step % kBlocks] + step / kBlocks * kVectorBytes);
    repeat<kBlocks>(
        OLIVE_EACH(n) { w[n] = load<__m512i>(panel.levels + n * kMaxBlock * kPackRows + step * kVectorBytes); });
    repeat<kRows>(OLIVE_EACH(i) {
      const int64_t four = i * columns + 4 * step;
      const __m512i l = broadcast4(x_low + four);
      repeat<kBlocks>(OLIVE_EACH(n) {
        dot4(low[i][n], w[n], l);
        if constexpr (kDigits >= 2) dot4(high[i][n], w[n], broadcast4(x_high + four));
        if constexpr (kDigits == 3) dot4(rest[i][n], w[n], broadcast4(x_rest + four));
      });
    });
  }
  repeat<kRows>(OLIVE_EACH(i) {
    const int64_t index = x.index(m + i, block);
    repeat<kBlocks>(OLIVE_EACH(n) {
      I16 sum = as_lanes(low[i][n]), r = {};
      if constexpr (kDigits >= 2) sum = combine_s15(as_lanes(high[i][n]), sum);
      if constexpr (kDigits == 3) r = as_lanes(rest[i][n]);
      F16& to = total[n * kTileRows + i];
      to = accumulate(x, to, sum, r, x.scale[index], panel.scale_w[n]);
    });
  });
}

template <int kRows, int kDigits>
inline void multiply_rows(const Activations& x, const Panel& panel, int count, int64_t m, int64_t block, F16* total,
                          int rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<kRows - 1, kDigits>(x, panel, count, m, block, total, rows);
  }
  if (count == kPanel) {
    multiply_tile<kRows, kPanel, kDigits>(x, panel, m, block, total);
  } else {
    multiply_tile<kRows, 1, kDigits>(x, panel, m, block, total);
  }
}

template <int kDigits>
inline void many_rows(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  constexpr int kRows = 12 / kDigits;  // 24 sums in any case: 32 registers hold them, weights and broadcasts
  const Activations& x = problem.x;
  const Decoder512 decoder(problem.book, kOffset);
  Panel panel;
  F16 total[kPanel * kTileRows];
  for (int64_t row_block = begin; row_block < end; row_block += kPanel) {
    const int count = end - row_block < kPanel ? 1 : kPanel;
    __builtin_memset(total, 0, sizeof(total));
    for (int64_t block = 0; block < x.blocks(); ++block) {
      decode_panel(problem, decoder, row_block, count, block, panel.levels, panel.scale_w);
      for (int i = 0; i < kPanel; ++i) panel.next[i] = next_codes(problem, row_block + i, block);
      // Equal shares: 16 rows go as 6, 5, 5, because few sums in flight leave the multiplier waiting.
      int64_t parts = (m_end - m_begin + kRows - 1) / kRows;
      for (int64_t m = m_begin; m < m_end; --parts) {
        const int rows = static_cast<int>((m_end - m + parts - 1) / parts);
        multiply_rows<kRows, kDigits>(x, panel, count, m, block, total + (m - m_begin), rows);
        m += rows;
      }
    }
    for (int i = 0; i < count; ++i) {
      for (int64_t m = m_begin; m < m_end; ++m) {
        store_outputs(problem, m, row_block + i, total[i * kTileRows + (m - m_begin)]);
      }
    }
  }
}

template <int kRows, int kDigits>
inline void few_or_many_rows(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  if constexpr (kRows == 0) {
    many_rows<kDigits>(problem, m_begin, m_end, begin, end);
  } else {
    if (m_end - m_begin == kRows) return few_rows<kRows, kDigits>(problem, m_begin, begin, end);
    few_or_many_rows<kRows - 1, kDigits>(problem, m_begin, m_end, begin, end);
  }
}

// 24 sums at most for few rows, two per row and digit, as in many_rows; with more than 8 rows decoding is no matter.
void linear_vnni(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  if (problem.x.digits == 1) return few_or_many_rows<8, 1>(problem, m_begin, m_end, begin, end);
  if (problem.x.digits == 2) return few_or_many_rows<6, 2>(problem, m_begin, m_end, begin, end);
  few_or_many_rows<4, 3>(problem, m_begin, m_end, begin, end);
}
