// y = x W^T + bias with W of integer codes: per span of columns under one scale, sums of 2 q level by lane are exact
// integers; they become float32, are multiplied by the scales and added, first span to last, with one fused
// multiply-add each; lanes are folded in the end. Levels with one scale per row of the weight have one span: their
// lanes are folded as integers. So every instruction set gives the same bits.
//
// Include inside a namespace of the instruction set, after one of uniform_dot_*.inl.

inline UniformFloats uniform_fused(UniformFloats a, UniformFloats b, UniformFloats c) {
#if defined(__FMA__)
  return reinterpret_cast<UniformFloats>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  UniformFloats result;
  for (int i = 0; i < kUniformLanes; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return result;
#endif
}

inline float uniform_fold(UniformFloats lanes) {
  for (int half = kUniformLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// 2 sum(q level) of a span, by lane, as floats. Two words are put together here: their sum does not fit an integer.
template <int kWidth, int kDigits>
inline UniformFloats doubled_levels(const UniformSums* sums, const int32_t* offset) {
  const UniformFloats first = __builtin_convertvector(sums[0] + load<UniformSums>(offset), UniformFloats);
  if constexpr (kWidth == 8 && kDigits == 2) {
    const UniformSums second = sums[1] + load<UniformSums>(offset + kUniformLanes);
    return uniform_fused(first, UniformFloats{} + 256.0f, __builtin_convertvector(second, UniformFloats));
  }
  return first;
}

// Where a span lies among the groups of the weight.
struct UniformPlace {
  int64_t group, column, next;  // next: first column of the next group

  explicit UniformPlace(const UniformLinear& problem) : group(0), column(0), next(problem.group_size) {}
  void advance(const UniformLinear& problem, int64_t columns) {
    for (column += columns; column >= next; next += problem.group_size) ++group;
  }
};

// Scales of a row of the weight for the lanes of a span: one, or of a span that is a single vector several.
inline UniformFloats span_scale(const UniformLinear& problem, int64_t row, const UniformPlace& place) {
  const float* scale = problem.scale + row * problem.groups;
  const int columns = problem.x.columns();
  if (place.column + columns <= place.next) return UniformFloats{} + scale[place.group];
  UniformFloats lanes;
  for (int i = 0; i < kUniformLanes; ++i) {
    const int64_t group = (place.column + i * columns / kUniformLanes) / problem.group_size;
    lanes[i] = scale[group < problem.groups ? group : problem.groups - 1];  // past K activations are 0
  }
  return lanes;
}

// Outputs of kInputs rows of activations with kRows rows of the weight, of which `rows` exist. kCount: vectors of a
// span, where that is a constant; 0 = it is not.
template <int kWidth, bool kUnsigned, int kDigits, int kInputs, int kRows, int kCount>
void uniform_tile(const UniformLinear& problem, int64_t m, int64_t row, int64_t rows) {
  const UniformInput& x = problem.x;
  const int64_t step = x.vector_bytes(), spans = x.spans();
  const uint8_t *codes[kRows], *inputs[kInputs];
  repeat<kRows>(OLIVE_EACH(r) { codes[r] = problem.row_codes(row + (r < rows ? r : 0)); });
  repeat<kInputs>(OLIVE_EACH(i) { inputs[i] = x.data + (m + i) * x.stride; });
  float values[kRows][kInputs];
  if (kCount == 0 && x.one_sum) {
    UniformSums sums[kRows][kInputs][kUniformWords];
    span_sums<kWidth, kUnsigned, kDigits, kInputs, kRows, 0>(codes, inputs, step, x.span, sums);
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kInputs; ++i) {
        const UniformSums lanes = sums[r][i][0] + load<UniformSums>(x.offset + (m + i) * kUniformLanes);
        int64_t sum = 0;
        for (int lane = 0; lane < kUniformLanes; ++lane) sum += lanes[lane];
        values[r][i] = static_cast<float>(sum);
      }
    }
  } else {
    UniformFloats total[kRows][kInputs];
    repeat<kRows * kInputs>(OLIVE_EACH(i) { total[i / kInputs][i % kInputs] = UniformFloats{}; });
    const int64_t count = kCount > 0 ? kCount : x.span;
    UniformPlace place(problem);
    for (int64_t span = 0; span < spans; ++span) {
      UniformSums sums[kRows][kInputs][kUniformWords];
      span_sums<kWidth, kUnsigned, kDigits, kInputs, kRows, kCount>(codes, inputs, step, count, sums);
      repeat<kRows>(OLIVE_EACH(r) {
        UniformFloats scale = UniformFloats{} + 1.0f;
        if (problem.groups > 1) scale = span_scale(problem, row + (r < rows ? r : 0), place);
        repeat<kInputs>(OLIVE_EACH(i) {
          const int64_t index = (m + i) * spans + span;
          const int32_t* offset = x.offset + index * x.offsets() * kUniformLanes;
          const float scale_x = kCount > 0 ? x.scale[index] : 1.0f;
          const UniformFloats sum = doubled_levels<kWidth, kDigits>(sums[r][i], offset);
          total[r][i] = uniform_fused(sum, scale * scale_x, total[r][i]);
        });
        codes[r] += count * kUniformBytes;
      });
      repeat<kInputs>(OLIVE_EACH(i) { inputs[i] += count * step; });
      place.advance(problem, count * x.columns());
    }
    repeat<kRows * kInputs>(
        OLIVE_EACH(i) { values[i / kInputs][i % kInputs] = uniform_fold(total[i / kInputs][i % kInputs]); });
  }
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kInputs; ++i) {
      float value = values[r][i] * 0.5f;
      if (problem.groups == 1) value *= problem.scale[row + r];
      if (x.row_scale != nullptr) value *= x.row_scale[m + i];
      if (problem.bias != nullptr) value += load_float(problem.bias, row + r, problem.bias_type);
      store_float(problem.out, (m + i) * problem.n + row + r, problem.out_type, value);
    }
  }
}

// One row of activations with four rows of the weight, or two with several digits; of more rows as many digits as
// sixteen registers hold with two.
template <int kWidth, bool kUnsigned, int kDigits, int kCount>
void uniform_tiles(const UniformLinear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  constexpr int kMost = kDigits == 1 ? 4 : 2, kFewRows = 2, kOneRows = kDigits == 1 ? kUniformRows : kFewRows;
  const bool one = m_end - m_begin == 1;
  const int64_t together = one ? kOneRows : kFewRows;
  for (int64_t row = begin; row < end; row += together) {
    const int64_t rows = end - row < together ? end - row : together;
    if (one) {
      uniform_tile<kWidth, kUnsigned, kDigits, 1, kOneRows, kCount>(problem, m_begin, row, rows);
      continue;
    }
    int64_t m = m_begin;
    for (; m + kMost <= m_end; m += kMost) {
      uniform_tile<kWidth, kUnsigned, kDigits, kMost, kFewRows, kCount>(problem, m, row, rows);
    }
    for (; m < m_end; ++m) uniform_tile<kWidth, kUnsigned, kDigits, 1, kFewRows, kCount>(problem, m, row, rows);
  }
}

template <int kWidth, int kDigits>
void uniform_fixed_point(const UniformLinear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  constexpr int kWhole = kUniformBlock * kWidth / (8 * kUniformBytes);
  if (problem.x.span == kWhole) {
    return uniform_tiles<kWidth, false, kDigits, kWhole>(problem, m_begin, m_end, begin, end);
  }
  uniform_tiles<kWidth, false, kDigits, 1>(problem, m_begin, m_end, begin, end);
}

template <int kWidth>
void uniform_width(const UniformLinear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  if (problem.x.scale == nullptr) {
    if (kWidth < 8 && problem.unsigned_x) {
      return uniform_tiles<kWidth, kWidth != 8, 1, 0>(problem, m_begin, m_end, begin, end);
    }
    return uniform_tiles<kWidth, false, 1, 0>(problem, m_begin, m_end, begin, end);
  }
  constexpr int kLeast = kWidth == 8 ? 1 : 2;  // digits of 15 bits
  if (problem.x.digits == kLeast) return uniform_fixed_point<kWidth, kLeast>(problem, m_begin, m_end, begin, end);
  uniform_fixed_point<kWidth, kLeast + 1>(problem, m_begin, m_end, begin, end);
}

void uniform_linear(const UniformLinear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  if (problem.x.width == 2) return uniform_width<2>(problem, m_begin, m_end, begin, end);
  if (problem.x.width == 4) return uniform_width<4>(problem, m_begin, m_end, begin, end);
  uniform_width<8>(problem, m_begin, m_end, begin, end);
}
