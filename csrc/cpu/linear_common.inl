// What every kernel of ovp_linear and ovp_linear_quantized shares: y = sum over blocks of float(S) * (scale_x *
// scale_w), S an exact integer.
//
// Levels: |S| <= 128 * 127^2; where scales are one per row, `scale` is 1 and row_scale is applied in the end; where the
// weight too has one scale per row, S is the sum over all of K, kept in the lanes of the sum as an integer.
// Fixed point: S15 = sum w * q15 fits an int32 (|S15| <= 128 * 255 * 2^14). For float32 inputs S = 256 * S15 + R, R =
// sum w * rest, taken as fma(float(S15), 256, float(R)). Blocks are added first to last with one fused multiply-add
// each, so every instruction set gives the same bits.
//
// Include inside a namespace of the instruction set.

inline F16 block_scale_values(const int16_t* stored) {
  const I16 pattern = __builtin_convertvector(load<S16>(stored), I16);
  return as_float((pattern & 0xFFFE) << 16);
}

inline I16 block_plain_mask(const int16_t* stored) {  // -1 where the row's group is plain
  return -(__builtin_convertvector(load<S16>(stored), I16) & 1);
}

template <class F, class I>
inline F accumulate(const Activations& x, F total, I s15, I rest, float scale_x, F scale_w) {
  if (x.one_sum) return as_float(as_int(total) + s15);
  F sum = __builtin_convertvector(s15, F);
  if (x.digits == 3) sum = fused_multiply_add(sum, F{} + 256.0f, __builtin_convertvector(rest, F));
  return fused_multiply_add(sum, scale_w * scale_x, total);
}

// The same in registers where sixteen lanes are two; `rest` is read with 3 digits only.
inline void accumulate_parts(const Activations& x, F16* total, const I16* s15, const I16* rest, float scale_x,
                             const F16* scale_w) {
  repeat<kParts>(OLIVE_EACH(part) {
    float* to = reinterpret_cast<float*>(total) + part * kPart;
    const auto ints = [&](const I16* from) {
      return load<IPart>(reinterpret_cast<const int32_t*>(from) + part * kPart);
    };
    const FPart scale = load<FPart>(reinterpret_cast<const float*>(scale_w) + part * kPart);
    const IPart low = x.digits == 3 ? ints(rest) : IPart{};
    store(to, accumulate(x, load<FPart>(to), ints(s15), low, scale_x, scale));
  });
}

// Apply what is left of the scales, add the bias, round once, store the rows of the weight that exist.
inline void store_outputs(const Linear& problem, int64_t m, int64_t row_block, F16 total) {
  if (problem.x.one_sum) {
    const F16 sum = __builtin_convertvector(as_int(total), F16);
    total = fused_multiply_add(sum, block_scale_values(problem.block_scale(row_block, 0)), F16{});  // 0, never -0
  }
  if (problem.x.row_scale != nullptr) total = total * problem.x.row_scale[m];
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
