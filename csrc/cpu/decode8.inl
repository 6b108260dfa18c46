// Decode eight-bit outlier-victim pairs, and multiply with them: codes uint8 [N, 2 ceil(K / 2)], row-major.
//
// Levels are exact in float32, products of a level and an activation that is itself exact in bfloat16 likewise. Column
// k goes to lane k mod 16; a lane adds the columns of a group in order, then the group's sum times its scale to its
// total, with one fused multiply-add each; lanes are folded in the end. So every instruction set gives the same bits.
//
// Include inside a namespace of the instruction set.

// Signed bytes as integers, one per lane of a part.
inline IPart widen_bytes(const uint8_t* bytes) {
#if defined(__AVX512F__)
  return reinterpret_cast<IPart>(_mm512_cvtepi8_epi32(load<__m128i>(bytes)));
#elif defined(__AVX2__)
  return reinterpret_cast<IPart>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load<int64_t>(bytes))));
#else
  IPart wide;
  for (int i = 0; i < kPart; ++i) wide[i] = static_cast<int8_t>(bytes[i]);
  return wide;
#endif
}

// Levels of kPart bytes. A byte beside 0x80 is an outlier: (8 + mantissa) << (exponent + 4), which is the float whose
// pattern has these seven bits under an exponent of 7.
inline FPart decode_part8(const uint8_t* codes) {
  const IPart code = widen_bytes(codes);
#if defined(__AVX512F__)
  const IPart partner = __builtin_shuffle(code, IPart{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
#else
  const IPart partner = __builtin_shuffle(code, IPart{1, 0, 3, 2, 5, 4, 7, 6});
#endif
  const IPart out = partner == -128;
  FPart level = __builtin_convertvector(code & ~(code == -128), FPart);
  if (any(out)) {
    IPart magnitude = code & 0x7F;
    const IPart none = magnitude == 0;  // 00 and 80 are no outliers
    magnitude = magnitude > 0x40 ? IPart{} + 0x40 : magnitude;
    const IPart pattern = ((magnitude << 20) + ((127 + 7) << 23)) | (code & static_cast<int32_t>(0x80000000u));
    level = select(out, as_float(pattern & ~none), level);
  }
  return level;
}

// Sixteen levels from sixteen bytes.
inline void decode_lanes8(const uint8_t* codes, float* levels) {
  repeat<kParts>(OLIVE_EACH(part) { store(levels + part * kPart, decode_part8(codes + part * kPart)); });
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
        float levels[kLanes];
        decode_lanes8(bytes, levels);
        const F16 decoded = load<F16>(levels) * value;
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

// Where a group's sums and a row's totals are kept, and the scales of the group: lanes of kRows8 rows.
struct Group8 {
  bool begins, ends;  // whether the columns at hand are the group's first and last
  float scale[kRows8];
};

// One group, or part of one, of kRows8 decoded rows times one activation row.
inline void multiply8(const float* levels, const float* x, int64_t columns, const Group8& group, F16* sums,
                      F16* total) {
  FPart parts[kRows8][kParts] = {};
  if (!group.begins) __builtin_memcpy(parts, sums, sizeof(parts));
  for (int64_t i = 0; i < columns; i += kLanes) {
    repeat<kParts>(OLIVE_EACH(part) {
      const FPart lanes = load<FPart>(x + i + part * kPart);
      repeat<kRows8>(OLIVE_EACH(row) {
        const FPart level = load<FPart>(levels + row * kColumns8 + i + part * kPart);
        parts[row][part] = fused_multiply_add(level, lanes, parts[row][part]);
      });
    });
  }
  if (!group.ends) {
    __builtin_memcpy(sums, parts, sizeof(parts));
    return;
  }
  repeat<kRows8>(OLIVE_EACH(row) {
    const FPart scale = splat_part(group.scale[row]);
    auto* to = reinterpret_cast<float*>(total + row);
    repeat<kParts>(OLIVE_EACH(part) {
      store(to + part * kPart, fused_multiply_add(parts[row][part], scale, load<FPart>(to + part * kPart)));
    });
  });
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
      Group8 part = {};
      for (int r = 0; r < rows; ++r) {
        const int64_t index = problem.group_size == 0 ? 0 : (row + r) * groups + group;
        part.scale[r] = scale_value(problem.scale[index]);
      }
      for (int64_t start = first; start < last; start += kColumns8) {
        const int64_t stop = start + kColumns8 < last ? start + kColumns8 : last;
        const int64_t padded = round_up(stop - start, kLanes);
        for (int r = 0; r < kRows8; ++r) {
          const uint8_t* codes = problem.codes + (row + (r < rows ? r : 0)) * row_bytes;
          for (int64_t column = start; column < stop; column += kLanes) {
            if (column + kLanes <= row_bytes) {
              decode_lanes8(codes + column, levels + r * kColumns8 + (column - start));
            } else {
              uint8_t bytes[kLanes] = {};
              __builtin_memcpy(bytes, codes + column, static_cast<size_t>(row_bytes - column));
              decode_lanes8(bytes, levels + r * kColumns8 + (column - start));
            }
          }
        }
        part.begins = start == first, part.ends = stop == last;
        for (int64_t m = m_begin; m < m_end; ++m) {
          multiply8(levels, problem.x + m * problem.x_stride + start, padded, part, sums[m - m_begin],
                    total[m - m_begin]);
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
