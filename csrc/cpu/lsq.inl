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
template <bool kPerColumn>
inline void lsq_values(const Lsq& q, int64_t at, int64_t count, const float* scale) {
  for_lanes(
      count, OLIVE_LANES(i, some) {
        FPart x[kParts];
        load_lanes(q.input, at + i, q.type, some, x);
        repeat<kParts>(OLIVE_EACH(p) {
          const FPart used = kPerColumn ? load<FPart>(scale + i + p * kPart) : splat_part(*scale);
          x[p] = lsq_round(q, x[p], used).codes * used;
        });
        store_lanes(q.out, at + i, q.type, some, x);
      });
}

// The share of the scale's gradient in x; x becomes its own gradient. 0 past the values that there are.
inline FPart lsq_gradients(const Lsq& q, FPart grad, FPart scale, FPart& x) {
  const LsqRounded found = lsq_round(q, x, scale);
  x = grad * (found.inside ? splat_part(1.0f) : FPart{});  // a product: NaN times 0 is NaN in the definition
  return grad * (found.inside ? found.codes - found.steps : found.codes);
}

void lsq_run(const Lsq& q, int64_t at, int64_t count, float scale) { lsq_values<false>(q, at, count, &scale); }

void lsq_rows(const Lsq& q, int64_t columns, const float* scale, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) lsq_values<true>(q, row * columns, columns, scale);
}

double lsq_run_backward(const Lsq& q, int64_t at, int64_t count, float scale) {
  DHalf sums[kHalves] = {};
  const FPart used = splat_part(scale);
  for_lanes(
      count, OLIVE_LANES(i, some) {
        FPart x[kParts], grad[kParts];
        load_lanes(q.input, at + i, q.type, some, x);
        load_lanes(q.grad, at + i, q.type, some, grad);
        repeat<kParts>(OLIVE_EACH(p) { add_part(sums + 2 * p, lsq_gradients(q, grad[p], used, x[p])); });
        store_lanes(q.out, at + i, q.type, some, x);
      });
  return fold_sums(sums);
}

void lsq_rows_backward(const Lsq& q, int64_t columns, const float* scale, int64_t begin, int64_t end, double* sums) {
  for (int64_t row = begin; row < end; ++row) {
    for_lanes(
        columns, OLIVE_LANES(i, some) {
          FPart x[kParts], grad[kParts];
          load_lanes(q.input, row * columns + i, q.type, some, x);
          load_lanes(q.grad, row * columns + i, q.type, some, grad);
          repeat<kParts>(OLIVE_EACH(p) {
            const int64_t at = i + p * kPart;
            DHalf of_columns[2];
            __builtin_memcpy(of_columns, sums + at, sizeof(of_columns));
            add_part(of_columns, lsq_gradients(q, grad[p], load<FPart>(scale + at), x[p]));
            __builtin_memcpy(sums + at, of_columns, sizeof(of_columns));
          });
          store_lanes(q.out, row * columns + i, q.type, some, x);
        });
  }
}
