// LSQ: values to their levels, and gradients of values and scales, each in one pass. A run of values has one scale, or
// a row has one per column. With the bits of olive/ops/lsq.py; gradients of scales are summed in double.
//
// Include inside a namespace of the instruction set, after training_lanes.inl.

struct LsqRounded {
  FPart steps, codes;
  IPart inside;  // of the clamp
};

inline LsqRounded lsq_round(const Lsq& q, FPart x, FPart scale) {
  LsqRounded found;
  found.steps = x / scale;
  found.inside = (found.steps >= q.qmin) & (found.steps <= q.qmax);
  if (q.is_sign) {
    found.codes = found.steps >= 0.0f ? splat_part(1.0f) : splat_part(-1.0f);
  } else {
    found.codes = round_part(clamp_part(found.steps, q.qmin, q.qmax));
  }
  return found;
}

// scale: one, or with kPerColumn one per value, whole lanes of them.
template <Float kType, bool kPerColumn>
inline void lsq_values(const Lsq q, int64_t at, int64_t count, const float* scale) {
  for_lanes(
      count, OLIVE_LANES(i, some) {
        FPart x[kParts];
        load_lanes(q.input, at + i, kType, some, x);
        repeat<kParts>(OLIVE_EACH(p) {
          const FPart used = kPerColumn ? load<FPart>(scale + i + p * kPart) : splat_part(*scale);
          x[p] = lsq_round(q, x[p], used).codes * used;
        });
        store_lanes(q.out, at + i, kType, some, x);
      });
}

// The share of the scale's gradient in x; x becomes its own gradient. 0 past the values that there are.
inline FPart lsq_gradients(const Lsq& q, FPart grad, FPart scale, FPart& x) {
  const LsqRounded found = lsq_round(q, x, scale);
  x = grad * (found.inside ? splat_part(1.0f) : FPart{});  // a product: NaN times 0 is NaN in the definition
  return grad * (found.inside ? found.codes - found.steps : found.codes);
}

template <Float kType>
inline double lsq_run_gradients(const Lsq q, int64_t at, int64_t count, float scale) {
  DHalf sums[kHalves] = {};
  const FPart used = splat_part(scale);
  for_lanes(
      count, OLIVE_LANES(i, some) {
        FPart x[kParts], grad[kParts];
        load_lanes(q.input, at + i, kType, some, x);
        load_lanes(q.grad, at + i, kType, some, grad);
        repeat<kParts>(OLIVE_EACH(p) { add_part(sums + 2 * p, lsq_gradients(q, grad[p], used, x[p])); });
        store_lanes(q.out, at + i, kType, some, x);
      });
  return fold_sums(sums);
}

template <Float kType>
inline void lsq_row_gradients(const Lsq q, int64_t at, int64_t columns, const float* scale, double* sums) {
  for_lanes(
      columns, OLIVE_LANES(i, some) {
        FPart x[kParts], grad[kParts];
        load_lanes(q.input, at + i, kType, some, x);
        load_lanes(q.grad, at + i, kType, some, grad);
        DHalf of_columns[kHalves];
        repeat<kHalves>(OLIVE_EACH(half) { of_columns[half] = load<DHalf>(sums + i + half * kHalf); });
        repeat<kParts>(OLIVE_EACH(p) {
          add_part(of_columns + 2 * p, lsq_gradients(q, grad[p], load<FPart>(scale + i + p * kPart), x[p]));
        });
        repeat<kHalves>(OLIVE_EACH(half) { store(sums + i + half * kHalf, of_columns[half]); });
        store_lanes(q.out, at + i, kType, some, x);
      });
}

void lsq_run(const Lsq& q, int64_t at, int64_t count, float scale) {
  with_type(q.type, [&](auto type) { lsq_values<decltype(type)::value, false>(q, at, count, &scale); });
}

void lsq_rows(const Lsq& q, int64_t columns, const float* scale, int64_t begin, int64_t end) {
  with_type(q.type, [&](auto type) {
    for (int64_t row = begin; row < end; ++row) {
      lsq_values<decltype(type)::value, true>(q, row * columns, columns, scale);
    }
  });
}

double lsq_run_backward(const Lsq& q, int64_t at, int64_t count, float scale) {
  return with_type(q.type, [&](auto type) { return lsq_run_gradients<decltype(type)::value>(q, at, count, scale); });
}

void lsq_rows_backward(const Lsq& q, int64_t columns, const float* scale, int64_t begin, int64_t end, double* sums) {
  with_type(q.type, [&](auto type) {
    for (int64_t row = begin; row < end; ++row) {
      lsq_row_gradients<decltype(type)::value>(q, row * columns, columns, scale, sums);
    }
  });
}
