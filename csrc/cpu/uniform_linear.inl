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
template <int kWidth>
inline UniformFloats span_scale(const UniformLinear& problem, int64_t row, const UniformPlace& place) {
  constexpr int kColumns = 8 * kUniformBytes / kWidth;
  const float* scale = problem.scale + row * problem.groups;
  if (place.column + kColumns <= place.next) return UniformFloats{} + scale[place.group];
  UniformFloats lanes;
  for (int i = 0; i < kUniformLanes; ++i) {
    const int64_t group = (place.column + i * kColumns / kUniformLanes) / problem.group_size;
    lanes[i] = scale[group < problem.groups ? group : problem.groups - 1];  // past K activations are 0
  }
  return lanes;
}

// What uniform_tile computes: kDigits of activations; kCount vectors of a span where that is a constant, as it is with
// fixed point, else 0; kGrouped: whether the weight has several scales per row.
template <int kWidthOf, bool kUnsignedOf, int kDigitsOf, int kCountOf, bool kGroupedOf>
struct UniformKind {
  static constexpr int kWidth = kWidthOf, kDigits = kDigitsOf, kCount = kCountOf;
  static constexpr bool kUnsigned = kUnsignedOf, kGrouped = kGroupedOf, kFixedPoint = kCount > 0;
  static constexpr bool kOneSum = !kFixedPoint && !kGrouped;
};

// Outputs of kInputs rows of activations with kRows rows of the weight, of which `rows` exist.
template <class Kind, int kInputs, int kRows>
void uniform_tile(const UniformLinear& problem, int64_t m, int64_t row, int64_t rows) {
  const UniformInput& x = problem.x;
  const int64_t step = x.vector_bytes(), spans = x.spans(), count = Kind::kFixedPoint ? Kind::kCount : x.span;
  const int64_t offsets = Kind::kWidth == 8 ? Kind::kDigits * kUniformLanes : kUniformLanes;
  const uint8_t *codes[kRows], *inputs[kInputs];
  const int32_t* offset[kInputs];
  const float* scale_x[kInputs];
  repeat<kRows>(OLIVE_EACH(r) { codes[r] = problem.row_codes(row + (r < rows ? r : 0)); });
  repeat<kInputs>(OLIVE_EACH(i) {
    inputs[i] = x.data + (m + i) * x.stride;
    offset[i] = x.offset + (m + i) * spans * offsets;
    scale_x[i] = Kind::kFixedPoint ? x.scale + (m + i) * spans : nullptr;
  });
  UniformFloats total[kRows][kInputs];
  repeat<kRows * kInputs>(OLIVE_EACH(i) { total[i / kInputs][i % kInputs] = UniformFloats{}; });
  UniformPlace place(problem);
  for (int64_t span = 0; span < spans; ++span) {
    UniformSums sums[kRows][kInputs][kUniformWords] = {};
    span_sums<Kind::kWidth, Kind::kUnsigned, Kind::kDigits, kInputs, kRows, Kind::kCount>(codes, inputs, step, count,
                                                                                          sums);
    if constexpr (Kind::kOneSum) {
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kInputs; ++i) {
          const UniformSums lanes = sums[r][i][0] + load<UniformSums>(offset[i]);
          int64_t sum = 0;
          for (int lane = 0; lane < kUniformLanes; ++lane) sum += lanes[lane];
          total[r][i][0] = static_cast<float>(sum);
        }
      }
      break;  // it is the only one
    }
    repeat<kRows>(OLIVE_EACH(r) {
      UniformFloats scale = UniformFloats{} + 1.0f;
      if constexpr (Kind::kGrouped) scale = span_scale<Kind::kWidth>(problem, row + (r < rows ? r : 0), place);
      repeat<kInputs>(OLIVE_EACH(i) {
        const UniformFloats sum = doubled_levels<Kind::kWidth, Kind::kDigits>(sums[r][i], offset[i]);
        const UniformFloats factor = Kind::kFixedPoint ? scale * *scale_x[i] : scale;
        total[r][i] = uniform_fused(sum, factor, total[r][i]);
      });
      codes[r] += count * kUniformBytes;
    });
    repeat<kInputs>(OLIVE_EACH(i) {
      inputs[i] += count * step;
      offset[i] += offsets;
      if constexpr (Kind::kFixedPoint) ++scale_x[i];
    });
    if constexpr (Kind::kGrouped) place.advance(problem, count * (8 * kUniformBytes / Kind::kWidth));
  }
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kInputs; ++i) {
      float value = (Kind::kOneSum ? total[r][i][0] : uniform_fold(total[r][i])) * 0.5f;
      if (!Kind::kGrouped) value *= problem.scale[row + r];
      if (x.row_scale != nullptr) value *= x.row_scale[m + i];
      if (problem.bias != nullptr) value += load_float(problem.bias, row + r, problem.bias_type);
      store_float(problem.out, (m + i) * problem.n + row + r, problem.out_type, value);
    }
  }
}

// One row of activations with one row of the weight, so that codes are a single stream: four at a time took 1.4 to 1.8
// times as long, with cold weights. More rows as many digits at once as sixteen registers hold with two of the weight.
template <class Kind>
void uniform_tiles(const UniformLinear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  constexpr int kMost = Kind::kDigits == 1 ? 4 : 2;
  if (m_end - m_begin == 1) {
    for (int64_t row = begin; row < end; ++row) uniform_tile<Kind, 1, 1>(problem, m_begin, row, 1);
    return;
  }
  for (int64_t row = begin; row < end; row += kUniformRows) {
    const int64_t rows = end - row < kUniformRows ? end - row : kUniformRows;
    int64_t m = m_begin;
    for (; m + kMost <= m_end; m += kMost) uniform_tile<Kind, kMost, kUniformRows>(problem, m, row, rows);
    for (; m < m_end; ++m) uniform_tile<Kind, 1, kUniformRows>(problem, m, row, rows);
  }
}

template <int kWidth, int kDigits>
void uniform_fixed_point(const UniformLinear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  constexpr int kWhole = kUniformBlock * kWidth / (8 * kUniformBytes);
  if (problem.groups == 1) {
    return uniform_tiles<UniformKind<kWidth, false, kDigits, kWhole, false>>(problem, m_begin, m_end, begin, end);
  }
  if (problem.x.span == kWhole) {
    return uniform_tiles<UniformKind<kWidth, false, kDigits, kWhole, true>>(problem, m_begin, m_end, begin, end);
  }
  uniform_tiles<UniformKind<kWidth, false, kDigits, 1, true>>(problem, m_begin, m_end, begin, end);
}

template <int kWidth, bool kUnsigned>
void uniform_levels(const UniformLinear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  if (problem.groups == 1) {
    return uniform_tiles<UniformKind<kWidth, kUnsigned, 1, 0, false>>(problem, m_begin, m_end, begin, end);
  }
  uniform_tiles<UniformKind<kWidth, kUnsigned, 1, 0, true>>(problem, m_begin, m_end, begin, end);
}

template <int kWidth>
void uniform_width(const UniformLinear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  if (problem.x.scale == nullptr) {
    if (kWidth < 8 && problem.unsigned_x) {
      return uniform_levels<kWidth, kWidth != 8>(problem, m_begin, m_end, begin, end);
    }
    return uniform_levels<kWidth, false>(problem, m_begin, m_end, begin, end);
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
