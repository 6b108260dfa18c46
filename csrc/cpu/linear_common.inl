// What every ovp_linear kernel shares: y = sum over blocks of float(S) * (scale_x * scale_w), S an exact integer.
//
// S15 = sum w * q15 fits an int32 (|S15| <= 128 * 255 * 2^14). For float32 inputs S = 256 * S15 + R, R = sum w * rest,
// taken as fma(float(S15), 256, float(R)). Blocks are added first to last with one fused multiply-add each, so every
// instruction set gives the same bits.
//
// Include inside a namespace of the instruction set.

inline F16 block_scale_values(const int16_t* stored) {
  const I16 pattern = __builtin_convertvector(load<S16>(stored), I16);
  return as_float((pattern & 0xFFFE) << 16);
}

inline I16 block_plain_mask(const int16_t* stored) {  // -1 where the row's group is plain
  return -(__builtin_convertvector(load<S16>(stored), I16) & 1);
}

inline F16 accumulate(F16 total, I16 s15, I16 rest, bool wide, float scale_x, F16 scale_w) {
  F16 sum = __builtin_convertvector(s15, F16);
  if (wide) sum = fused_multiply_add(sum, splat(256.0f), __builtin_convertvector(rest, F16));
  return fused_multiply_add(sum, scale_w * scale_x, total);
}

// Add the bias, round once, store the rows of the weight that exist.
inline void store_outputs(const Linear& problem, int64_t m, int64_t row_block, F16 total) {
  const int64_t first = row_block * kPackRows;
  const int64_t count = problem.n - first < kPackRows ? problem.n - first : kPackRows;
  if (count == kPackRows) {
    if (problem.bias != nullptr) total += load_floats(problem.bias, first, problem.bias_type);
    store_floats(problem.out, m * problem.n + first, problem.out_type, total);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float bias = problem.bias == nullptr ? 0.0f : load_float(problem.bias, first + i, problem.bias_type);
    const float value = problem.bias == nullptr ? total[i] : total[i] + bias;
    store_float(problem.out, m * problem.n + first + i, problem.out_type, value);
  }
}
