// Decode eight-bit outlier-victim pairs, and multiply with them: codes uint8 [N, 2 ceil(K / 2)], row-major.
//
// Levels are exact in float32, products of a level and an activation that is itself exact in bfloat16 likewise. Column
// k goes to lane k mod 16; a lane adds the columns of a group in order, then the group's sum times its scale to its
// total, with one fused multiply-add each; lanes are folded in the end. So every instruction set gives the same bits.
//
// Include inside a namespace of the instruction set.

// Sixteen levels from sixteen bytes. A byte beside 0x80 is an outlier: (8 + mantissa) << (exponent + 4), which is the
// float whose pattern has these seven bits under an exponent of 7.
inline F16 decode_lanes8(const uint8_t* codes) {
  const B16 bytes = load<B16>(codes);
  const B16 partner = __builtin_shuffle(bytes, B16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
  const B16 identifier = B16{} + static_cast<int8_t>(0x80);
  const I16 code = __builtin_convertvector(bytes, I16);  // sign extended
  const I16 out = __builtin_convertvector(partner == identifier, I16);
  const I16 victim = __builtin_convertvector(bytes == identifier, I16);
  F16 level = __builtin_convertvector(code & ~victim, F16);
  if (any(out)) {
    I16 magnitude = code & 0x7F;
    const I16 none = magnitude == 0;  // 00 and 80 are no outliers
    magnitude = magnitude > 0x40 ? I16{} + 0x40 : magnitude;
    const I16 pattern = ((magnitude << 20) + ((127 + 7) << 23)) | (code & static_cast<int32_t>(0x80000000u));
    level = select(out, as_float(pattern & ~none), level);
  }
  return level;
}

void decode8_rows(const uint8_t* codes, const int16_t* scale, int64_t k, int group_size, int64_t begin, int64_t end,
                  void* out, Float type) {
  const int64_t width = group_size <= 0 ? k : group_size, groups = (k + width - 1) / width;
  const int64_t row_bytes = (k + 1) / 2 * 2;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const float value = scale_value(scale[group_size == 0 ? 0 : row * groups + group]);
      const int64_t first = group * width, last = first + width < k ? first + width : k;
      for (int64_t column = first; column < last; column += kLanes) {
        uint8_t bytes[kLanes] = {};
        const int64_t in_row = row_bytes - column < kLanes ? row_bytes - column : kLanes;
        __builtin_memcpy(bytes, codes + row * row_bytes + column, static_cast<size_t>(in_row));
        const F16 decoded = decode_lanes8(bytes) * value;
        if (column + kLanes <= last) {
          store_floats(out, row * k + column, type, decoded);
        } else {
          for (int64_t i = column; i < last; ++i) store_float(out, row * k + i, type, decoded[i - column]);
        }
      }
    }
  }
}

void float_rows(const void* x, Float type, int64_t k, int64_t stride, int64_t begin, int64_t end, float* to) {
  for (int64_t row = begin; row < end; ++row) load_row(x, row * k, type, k, stride, to + row * stride);
}

constexpr int kRows8 = 4;       // rows of the weight decoded together
constexpr int kColumns8 = 512;  // columns likewise: 8 KiB of floats

// One group, or part of one, of kRows8 decoded rows times one activation row.
inline void multiply8(const float* levels, const float* x, int64_t columns, F16* sums) {
  F16 a = sums[0], b = sums[1], c = sums[2], d = sums[3];
  for (int64_t i = 0; i < columns; i += kLanes) {
    const F16 lanes = load<F16>(x + i);
    a = fused_multiply_add(load<F16>(levels + i), lanes, a);
    b = fused_multiply_add(load<F16>(levels + kColumns8 + i), lanes, b);
    c = fused_multiply_add(load<F16>(levels + 2 * kColumns8 + i), lanes, c);
    d = fused_multiply_add(load<F16>(levels + 3 * kColumns8 + i), lanes, d);
  }
  sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
}

void linear8(const Linear8& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  alignas(64) float levels[kRows8 * kColumns8];
  F16 sums[kTileRows][kRows8], total[kTileRows][kRows8];
  const int64_t width = problem.group_size <= 0 ? problem.k : problem.group_size;
  const int64_t groups = (problem.k + width - 1) / width, row_bytes = (problem.k + 1) / 2 * 2;
  for (int64_t row = begin; row < end; row += kRows8) {
    const int rows = end - row < kRows8 ? static_cast<int>(end - row) : kRows8;
    const auto used = static_cast<size_t>(m_end - m_begin) * sizeof(total[0]);
    __builtin_memset(total, 0, used);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * width, last = first + width < problem.k ? first + width : problem.k;
      __builtin_memset(sums, 0, used);
      for (int64_t start = first; start < last; start += kColumns8) {
        const int64_t stop = start + kColumns8 < last ? start + kColumns8 : last;
        const int64_t padded = round_up(stop - start, kLanes);
        for (int r = 0; r < kRows8; ++r) {
          const uint8_t* codes = problem.codes + (row + (r < rows ? r : 0)) * row_bytes;
          for (int64_t column = start; column < stop; column += kLanes) {
            if (column + kLanes <= row_bytes) {
              store(levels + r * kColumns8 + (column - start), decode_lanes8(codes + column));
            } else {
              uint8_t bytes[kLanes] = {};
              __builtin_memcpy(bytes, codes + column, static_cast<size_t>(row_bytes - column));
              store(levels + r * kColumns8 + (column - start), decode_lanes8(bytes));
            }
          }
        }
        for (int64_t m = m_begin; m < m_end; ++m) {
          multiply8(levels, problem.x + m * problem.x_stride + start, padded, sums[m - m_begin]);
        }
      }
      for (int r = 0; r < rows; ++r) {
        const int64_t index = problem.group_size == 0 ? 0 : (row + r) * groups + group;
        const F16 scale = splat(scale_value(problem.scale[index]));
        for (int64_t m = m_begin; m < m_end; ++m) {
          F16& to = total[m - m_begin][r];
          to = fused_multiply_add(sums[m - m_begin][r], scale, to);
        }
      }
    }
    for (int64_t m = m_begin; m < m_end; ++m) {
      for (int r = 0; r < rows; ++r) {
        float value = fold(total[m - m_begin][r]);
        if (problem.bias != nullptr) value += load_float(problem.bias, row + r, problem.bias_type);
        store_float(problem.out, m * problem.n + row + r, problem.out_type, value);
      }
    }
  }
}
