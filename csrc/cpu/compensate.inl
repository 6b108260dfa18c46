// Round a run of columns with error compensation: every lane is a row of the weight, and goes its own way.
//
// The definition is olive/ops/compensate.py. Sums are fused here and not there, so the last bits differ, and with them
// now and then a code whose value lay on a threshold.
//
// Include inside a namespace of the instruction set, after encode.inl.

struct PairFactor {
  float even, odd;  // 1 / U[i, i], 1 / U[i + 1, i + 1]
  float off;        // U[i, i + 1]
  float share;      // of the odd column's loss that the even one takes over, in units of the odd column
};

// What a candidate makes of a pair: errors e and table indices, signs apart.
struct Rounded {
  FPart even, odd;
  IPart low, high;  // nibbles
};

inline FPart lane_square(FPart a, FPart b) { return a * a + b * b; }

inline IPart signed_nibble(IPart index, FPart value) {  // minus zero is the identifier: zero has no sign
  return index | ((value < 0.0f) & (index > 0) & 8);
}

// The normal levels at or below |t| and above it; both the largest one past the end.
struct Neighbours {
  FPart below, above;
  IPart index_below, index_above;
};

inline Neighbours neighbours(FPart magnitude, const Tables& tables) {
  Neighbours found = {tables.normal[0], tables.normal[1], IPart{}, IPart{} + 1};
  OLIVE_LEVEL_UNROLL
  for (int i = 1; i < 8; ++i) {
    const IPart reached = magnitude >= tables.normal[i];
    const int next = i < 7 ? i + 1 : 7;
    found.below = select(reached, tables.normal[i], found.below);
    found.above = select(reached, tables.normal[next], found.above);
    found.index_below = reached ? IPart{} + i : found.index_below;
    found.index_above = reached ? IPart{} + next : found.index_above;
  }
  return found;
}

inline FPart with_sign(FPart magnitude, FPart of) { return select(of < 0.0f, -magnitude, magnitude); }

inline Rounded keep_better(const Rounded& one, const Rounded& other) {
  const IPart better = lane_square(other.even, other.odd) < lane_square(one.even, one.odd);
  return {select(better, other.even, one.even), select(better, other.odd, one.odd), better ? other.low : one.low,
          better ? other.high : one.high};
}

inline Rounded round_by_pair(FPart x, FPart y, FPart scale, FPart inverse, const PairFactor& f, const Tables& tables) {
  const IPart victim = IPart{} + kIdentifier;
  const FPart t = x * inverse;
  const Neighbours near = neighbours(absolute(t), tables);
  const auto normal_normal = [&](FPart level, IPart index) {
    const FPart even = (x - with_sign(level, t) * scale) * f.even, rest = y - even * f.off, u = rest * inverse;
    const FPart other = with_sign(nearest<8>(absolute(u), tables.normal, tables.normal_mid), u);
    const IPart other_index = nearest_index<8>(absolute(u), tables.normal_mid);
    return Rounded{even, (rest - other * scale) * f.odd, signed_nibble(index, t), signed_nibble(other_index, u)};
  };
  Rounded best = normal_normal(near.below, near.index_below);
  best = keep_better(best, normal_normal(near.above, near.index_above));
  const auto outlier = [&](FPart u, FPart* level, IPart* nibble) {
    *level = with_sign(nearest<7>(absolute(u), tables.outlier, tables.outlier_mid), u);
    *nibble = signed_nibble(nearest_index<7>(absolute(u), tables.outlier_mid) + 1, u);
  };
  FPart level;
  IPart nibble;
  outlier((x - y * f.share) * inverse, &level, &nibble);
  const FPart even = (x - level * scale) * f.even;
  best = keep_better(best, {even, (y - even * f.off) * f.odd, nibble, victim});
  const FPart lost = x * f.even, rest = y - lost * f.off;
  outlier(rest * inverse, &level, &nibble);
  return keep_better(best, {lost, (rest - level * scale) * f.odd, victim, nibble});
}

inline Rounded round_plain(FPart x, FPart y, FPart scale, FPart inverse, const PairFactor& f, const Tables& tables) {
  const FPart t = x * inverse;
  const FPart even = (x - nearest<16>(t, tables.plain, tables.plain_mid) * scale) * f.even;
  const FPart rest = y - even * f.off, u = rest * inverse;
  const FPart odd = (rest - nearest<16>(u, tables.plain, tables.plain_mid) * scale) * f.odd;
  return {even, odd, nearest_index<16>(t, tables.plain_mid), nearest_index<16>(u, tables.plain_mid)};
}

void compensate_rows(const Compensation& run, int64_t begin, int64_t end) {
  const int64_t columns = run.columns, pairs = columns / 2;
  const Tables tables = make_tables(run.book);
  FPart* values = static_cast<FPart*>(__builtin_malloc(static_cast<size_t>(columns) * sizeof(FPart) + sizeof(FPart)));
  FPart* column = reinterpret_cast<FPart*>(  // aligned
      (reinterpret_cast<uintptr_t>(values) + sizeof(FPart) - 1) / sizeof(FPart) * sizeof(FPart));
  for (int64_t first = begin; first < end; first += kPart) {
    const int rows = end - first < kPart ? static_cast<int>(end - first) : kPart;
    for (int64_t k = 0; k < columns; ++k) {
      FPart value = {};
      for (int lane = 0; lane < rows; ++lane) value[lane] = run.values[(first + lane) * columns + k];
      column[k] = value;
    }
    FPart loss = {}, scale = splat_part(1.0f), inverse = scale;
    IPart plain = {};
    for (int64_t pair = 0; pair < pairs; ++pair) {
      if (pair == 0 || run.scales_per_row > 1) {
        for (int lane = 0; lane < rows; ++lane) {
          const int16_t stored = run.scale[(first + lane) * run.scales_per_row + (run.scales_per_row > 1 ? pair : 0)];
          scale[lane] = scale_value(stored);
          plain[lane] = scale_is_plain(stored) ? -1 : 0;
        }
        inverse = 1.0f / scale;
      }
      const int64_t even = 2 * pair, odd = even + 1;
      const float a = run.factor[even * columns + even], b = run.factor[even * columns + odd];
      const float c = run.factor[odd * columns + odd];
      const PairFactor factor = {1.0f / a, 1.0f / c, b, a * b / (b * b + c * c)};
      const FPart x = column[even], y = column[odd];
      Rounded found;
      const bool any_plain = any(plain);
      if (any_plain) found = round_plain(x, y, scale, inverse, factor, tables);
      if (!any_plain || any(~plain)) {
        const Rounded paired = round_by_pair(x, y, scale, inverse, factor, tables);
        if (any_plain) {
          found = {select(plain, found.even, paired.even), select(plain, found.odd, paired.odd),
                   plain ? found.low : paired.low, plain ? found.high : paired.high};
        } else {
          found = paired;
        }
      }
      loss += lane_square(found.even, found.odd);
      const IPart bytes = found.low | (found.high << 4);
      for (int lane = 0; lane < rows; ++lane) {
        run.codes[(first + lane) * pairs + pair] = static_cast<uint8_t>(bytes[lane]);
        run.errors[(first + lane) * columns + even] = found.even[lane];
        run.errors[(first + lane) * columns + odd] = found.odd[lane];
      }
      const float* first_row = run.factor + even * columns;
      const float* second_row = run.factor + odd * columns;
      const FPart minus_even = -found.even, minus_odd = -found.odd;
      for (int64_t k = odd + 1; k < columns; ++k) {
        const FPart moved = fused_multiply_add(minus_even, splat_part(first_row[k]), column[k]);
        column[k] = fused_multiply_add(minus_odd, splat_part(second_row[k]), moved);
      }
    }
    for (int lane = 0; lane < rows; ++lane) run.loss[first + lane] = loss[lane];
  }
  __builtin_free(values);
}
