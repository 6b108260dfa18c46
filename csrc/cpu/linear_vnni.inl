// ovp_linear with vpdpbusd: 16 rows x 4 columns per instruction, two instructions (high and low digit) per 64 weights
// and activation row, three for float32.
//
// Few rows: weights are decoded in registers and used at once. Many rows: a block of 32 rows is decoded to the
// first-level cache and multiplied with six activation rows at a time, 24 independent sums in registers.
//
// Include inside a namespace of the instruction set, after linear_bytes.inl.

// Bytes ahead of the stream of codes that are asked for: the hardware prefetcher stops at page borders.
constexpr int kPrefetch = 4096;

inline I16 as_lanes(__m512i value) { return reinterpret_cast<I16>(value); }

inline __m512i broadcast4(const int8_t* from) { return _mm512_set1_epi32(load<int32_t>(from)); }

// sum += four byte products per lane. Not the intrinsic: gcc 12 copies its accumulator before and spills it after
// every instruction, which halves the speed; with "+v" it stays in its register.
__attribute__((always_inline)) inline void dot4(__m512i& sum, __m512i levels, __m512i digits) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(levels), "v"(digits));
}

template <int kRows, bool kWide>
inline void few_rows(const Linear& problem, int64_t m_begin, int64_t begin, int64_t end) {
  const Activations& x = problem.x;
  const Decoder512 decoder(problem.book, kOffset);
  for (int64_t row_block = begin; row_block < end; ++row_block) {
    F16 total[kRows] = {};
    const uint8_t* codes = problem.codes + row_block * x.columns * kPackRows / 2;
    for (int64_t block = 0; block < x.blocks(); ++block) {
      const int16_t* stored = problem.block_scale(row_block, block);
      const __mmask64 plain = Decoder512::plain_bytes(stored);
      __m512i high[kRows][2], low[kRows][2], rest[kWide ? kRows : 1][2];
      repeat<kRows>(OLIVE_EACH(m) {
        const int64_t index = x.index(m_begin + m, block);
        high[m][0] = high[m][1] = low[m][1] = _mm512_setzero_si512();
        low[m][0] = _mm512_set1_epi32(x.offset[index]);
        if constexpr (kWide) rest[m][0] = _mm512_set1_epi32(x.rest_offset[index]), rest[m][1] = high[m][0];
      });
      const int64_t at = x.digits(m_begin, block);
      for (int column = 0; column < x.block; column += kPackColumns, codes += kVectorBytes) {
        prefetch(codes + kPrefetch);
        __m512i levels[2];
        decoder(load<__m512i>(codes), plain, &levels[0], &levels[1]);
        repeat<kRows>(OLIVE_EACH(m) {
          const int64_t first = at + m * x.block + column;
          repeat<2>(OLIVE_EACH(half) {
            const int64_t four = first + 4 * half;
            dot4(high[m][half], levels[half], broadcast4(x.high + four));
            dot4(low[m][half], levels[half], broadcast4(x.low + four));
            if constexpr (kWide) {
              dot4(rest[m][half], levels[half], broadcast4(x.rest8 + four));
            }
          });
        });
      }
      const F16 scale_w = block_scale_values(stored);
      repeat<kRows>(OLIVE_EACH(m) {
        const int64_t index = x.index(m_begin + m, block);
        const I16 s15 =
            combine_s15(as_lanes(high[m][0]) + as_lanes(high[m][1]), as_lanes(low[m][0]) + as_lanes(low[m][1]));
        I16 r = {};
        if constexpr (kWide) r = as_lanes(rest[m][0]) + as_lanes(rest[m][1]);
        total[m] = accumulate(total[m], s15, r, kWide, x.scale[index], scale_w);
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
template <int kRows, int kBlocks, bool kWide>
inline void multiply_tile(const Activations& x, const Panel& panel, int64_t m, int64_t block, F16* total) {
  __m512i high[kRows][kBlocks], low[kRows][kBlocks], rest[kWide ? kRows : 1][kBlocks];
  repeat<kRows>(OLIVE_EACH(i) {
    const int64_t index = x.index(m + i, block);
    repeat<kBlocks>(OLIVE_EACH(n) {
      high[i][n] = _mm512_setzero_si512();
      low[i][n] = _mm512_set1_epi32(x.offset[index]);
      if constexpr (kWide) rest[i][n] = _mm512_set1_epi32(x.rest_offset[index]);
    });
  });
  const int64_t at = x.digits(m, block), columns = x.block;
  const int8_t *x_high = x.high + at, *x_low = x.low + at, *x_rest = kWide ? x.rest8 + at : nullptr;
  for (int step = 0; step < x.block / 4; ++step) {
    __m512i w[kBlocks];
    prefetch(panel.next[step % kBlocks] + step / kBlocks * kVectorBytes);
    repeat<kBlocks>(
        OLIVE_EACH(n) { w[n] = load<__m512i>(panel.levels + n * kMaxBlock * kPackRows + step * kVectorBytes); });
    repeat<kRows>(OLIVE_EACH(i) {
      const int64_t four = i * columns + 4 * step;
      const __m512i h = broadcast4(x_high + four), l = broadcast4(x_low + four);
      repeat<kBlocks>(OLIVE_EACH(n) {
        dot4(high[i][n], w[n], h);
        dot4(low[i][n], w[n], l);
        if constexpr (kWide) dot4(rest[i][n], w[n], broadcast4(x_rest + four));
      });
    });
  }
  repeat<kRows>(OLIVE_EACH(i) {
    const int64_t index = x.index(m + i, block);
    repeat<kBlocks>(OLIVE_EACH(n) {
      const I16 s15 = combine_s15(as_lanes(high[i][n]), as_lanes(low[i][n]));
      I16 r = {};
      if constexpr (kWide) r = as_lanes(rest[i][n]);
      F16& sum = total[n * kTileRows + i];
      sum = accumulate(sum, s15, r, kWide, x.scale[index], panel.scale_w[n]);
    });
  });
}

template <int kRows, bool kWide>
inline void multiply_rows(const Activations& x, const Panel& panel, int count, int64_t m, int64_t block, F16* total,
                          int rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<kRows - 1, kWide>(x, panel, count, m, block, total, rows);
  }
  if (count == kPanel) {
    multiply_tile<kRows, kPanel, kWide>(x, panel, m, block, total);
  } else {
    multiply_tile<kRows, 1, kWide>(x, panel, m, block, total);
  }
}

template <bool kWide>
inline void many_rows(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  constexpr int kRows = kWide ? 4 : 6;  // 24 sums either way: 32 registers hold them, weights and broadcasts
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
        multiply_rows<kRows, kWide>(x, panel, count, m, block, total + (m - m_begin), rows);
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

template <bool kWide>
inline void linear_vnni(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  switch (m_end - m_begin) {
    case 1:
      return few_rows<1, kWide>(problem, m_begin, begin, end);
    case 2:
      return few_rows<2, kWide>(problem, m_begin, begin, end);
    case 3:
      return few_rows<3, kWide>(problem, m_begin, begin, end);
    case 4:
      return few_rows<4, kWide>(problem, m_begin, begin, end);
    default:
      break;
  }
  if constexpr (!kWide) {  // 24 sums at most, as in many_rows
    if (m_end - m_begin == 5) return few_rows<5, false>(problem, m_begin, begin, end);
    if (m_end - m_begin == 6) return few_rows<6, false>(problem, m_begin, begin, end);
  }
  many_rows<kWide>(problem, m_begin, m_end, begin, end);
}
