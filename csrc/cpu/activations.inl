// Activations as block fixed-point numbers, see struct Activations.
//
// Per row and block, with 2^e <= max|x| < 2^(e + 1): q = round(x * 2^(13 - e)), so |q| <= 2^14 (float32: 2^(21 - e),
// |q| <= 2^22), scale = 2^(e - 13). A power of two makes q exact wherever x has no more bits than q has left below
// the block's largest value: a bfloat16 down to 2^-6 of it, a float16 down to 2^-3. Everything else is off by at most
// half a unit, 2^-14 (float32: 2^-22) of the largest value.
// 15 bits, not 16: q = 256 * high + low needs both digits as signed bytes.
// Blocks below 2^-105 become zero (the scale would be subnormal); a NaN or Inf makes the block's scale NaN.
//
// Include inside a namespace of the instruction set.

constexpr int kMinExponent = 22;  // biased; see the last rule above

// Columns 0..15 to 0 2 4 6 1 3 5 7 | 8 10 12 14 9 11 13 15.
inline I16 even_first(I16 value) {
  return __builtin_shuffle(value, I16{0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15});
}

inline I16 round_to_int(F16 value) {  // |value| <= 2^22, ties to even
  const F16 magic = splat(12582912.0f);
  return as_int(value + magic) - as_int(magic);
}

struct FixedPoint {
  float multiple;  // q = round(x * multiple)
  float scale;     // x ~ q * scale
  bool bad;        // a value is NaN or Inf; multiple is 0
};

// `shift`: 13 or, for float32, 21.
inline FixedPoint fixed_point(const float* values, int count, int shift) {
  FPart most[kParts] = {};
  IPart bad = {};
  for (int i = 0; i < count; i += kLanes) {
    repeat<kParts>(OLIVE_EACH(part) {
      const FPart magnitude = absolute(load<FPart>(values + i + part * kPart));
      bad |= as_int(magnitude) >= 0x7F800000;
      most[part] = select(magnitude > most[part], magnitude, most[part]);
    });
  }
  const int exponent = static_cast<int>(float_to_bits(reduce_max(most)) >> 23);
  if (any(bad)) return {0.0f, __builtin_nanf(""), true};
  if (exponent < kMinExponent) return {0.0f, 0.0f, false};
  return {bits_to_float(static_cast<uint32_t>(254 + shift - exponent) << 23),
          bits_to_float(static_cast<uint32_t>(exponent - shift) << 23), false};
}

inline void convert_block(const Activations& to, const float* values, int64_t row, int64_t block) {
  const bool wide = to.digits == 3;
  const FixedPoint form = fixed_point(values, to.block, wide ? 21 : 13);
  const int64_t index = to.index(row, block);
  to.scale[index] = form.scale;
  I16 sum = {}, rest_sum = {};
  for (int i = 0; i < to.block; i += kLanes) {
    const int64_t at = to.at(row, block) + i;
    F16 scaled = load<F16>(values + i) * form.multiple;
    if (form.bad) scaled = F16{};  // NaN x 0 is NaN
    I16 q = even_first(round_to_int(scaled)), rest = {};
    if (wide) {
      const I16 high = (q + 128) >> 8;
      rest = q - (high << 8);
      q = high;
      rest_sum += rest;
    }
    sum += q;
    if (to.words != nullptr) {
      store(to.words + at, __builtin_convertvector(q, S16));
      if (wide) store(to.rest + at, __builtin_convertvector(rest, S16));
    } else {
      const I16 high = (q + 128) >> 8;
      store(to.high + at, __builtin_convertvector(high, B16));
      store(to.low + at, __builtin_convertvector(q - (high << 8), B16));
      if (wide) store(to.rest8 + at, __builtin_convertvector(rest, B16));
    }
  }
  int32_t total = 0, rest_total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i], rest_total += rest_sum[i];
  if (to.words != nullptr) return;
  to.offset[index] = -kOffset * total;
  if (wide) to.rest_offset[index] = -kOffset * rest_total;
}

void convert_rows(const Activations& to, const void* x, Float type, int64_t k, int64_t begin, int64_t end) {
  float values[kMaxBlock];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t block = 0; block < to.blocks(); ++block) {
      const int64_t first = block * to.block;
      int64_t count = row < to.rows ? k - first : 0;
      count = count < 0 ? 0 : count > to.block ? to.block : count;
      load_row(x, row * k + first, type, count, to.block, values);
      convert_block(to, values, row, block);
    }
  }
}
