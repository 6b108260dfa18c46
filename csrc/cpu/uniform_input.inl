// Activations of uniform_linear as integers, see struct UniformInput.
//
// Include inside a namespace of the instruction set, after activations.inl.

// The lowest bytes of 32 integers, in order.
inline void narrow_bytes(const int32_t* values, uint8_t* to) {
#if defined(__AVX2__)
  const __m256i low = _mm256_set1_epi32(255);
  __m256i part[4];
  repeat<4>(OLIVE_EACH(i) { part[i] = _mm256_and_si256(load<__m256i>(values + 8 * i), low); });
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
  store(to, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#else
  for (int i = 0; i < kUniformBytes; ++i) to[i] = static_cast<uint8_t>(values[i]);
#endif
}

// Every second of 64 bytes, from the first and from the second on.
inline void unzip_bytes(const uint8_t* bytes, uint8_t* even, uint8_t* odd) {
#if defined(__AVX2__)
  const __m256i first = load<__m256i>(bytes), second = load<__m256i>(bytes + 32), low = _mm256_set1_epi16(255);
  const __m256i evens = _mm256_packus_epi16(_mm256_and_si256(first, low), _mm256_and_si256(second, low));
  const __m256i odds = _mm256_packus_epi16(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8));
  store(even, _mm256_permute4x64_epi64(evens, 0xD8));
  store(odd, _mm256_permute4x64_epi64(odds, 0xD8));
#else
  for (int i = 0; i < kUniformBytes; ++i) even[i] = bytes[2 * i], odd[i] = bytes[2 * i + 1];
#endif
}

// One digit of a vector's columns, in the order of their codes.
inline void spread(int width, const int32_t* values, uint8_t* to) {
  constexpr int kBytes = kUniformBytes;
  if (width == 8) {
    for (int i = 0; i < kBytes; i += kLanes) {
      store(to + 2 * i, __builtin_convertvector(load<I16>(values + i), S16));
    }
    return;
  }
  uint8_t bytes[4 * kBytes], halves[4 * kBytes];
  for (int i = 0; i < 8 / width; ++i) narrow_bytes(values + i * kBytes, bytes + i * kBytes);
  if (width == 4) return unzip_bytes(bytes, to, to + kBytes);
  unzip_bytes(bytes, halves, halves + 2 * kBytes);
  unzip_bytes(bytes + 2 * kBytes, halves + kBytes, halves + 3 * kBytes);
  unzip_bytes(halves, to, to + 2 * kBytes);
  unzip_bytes(halves + 2 * kBytes, to + kBytes, to + 3 * kBytes);
}

// Take the lowest byte off, signed.
inline void split(const int32_t* values, int count, int32_t* high, int32_t* low) {
  for (int i = 0; i < count; i += kPart) {
    const IPart value = load<IPart>(values + i), above = (value + 128) >> 8;
    store(low + i, value - (above << 8));
    store(high + i, above);
  }
}

// offset -= zero * q in the lane that a column's product goes to: of bytes four neighbours share one, of words two.
inline void subtract_zeros(const UniformInput& to, const int32_t* q, int32_t* offset) {
  const int columns = to.columns(), per_lane = to.width == 8 ? 2 : columns / kUniformLanes;
  for (int first = 0; first < columns; first += kUniformLanes * per_lane) {
    for (int lane = 0; lane < kUniformLanes; ++lane) {
      int32_t sum = 0;
      for (int i = 0; i < per_lane; ++i) sum += q[first + lane * per_lane + i];
      offset[lane] -= to.zero * sum;
    }
  }
}

inline IPart round_part_to_int(FPart value) {  // as round_to_int
  const FPart magic = splat_part(12582912.0f);
  return as_int(value + magic) - as_int(magic);
}

inline void fixed_point_row(const UniformInput& to, const UniformSource& source, int64_t row) {
  alignas(64) float values[kUniformBlock];
  alignas(64) int32_t q[kUniformBlock], digit[3][kUniformBlock];
  const bool wide = source.type == Float::f32;
  const int columns = to.columns(), padded = static_cast<int>(to.span) * columns;
  uint8_t* data = to.data + row * to.stride;
  for (int64_t span = 0; span < to.spans(); ++span) {
    const int64_t first = span * padded, left = source.k - first;
    const int64_t count = left < 0 ? 0 : left < padded ? left : padded;
    load_row(source.data, row * source.k + first, source.type, count, padded, values);
    const FixedPoint form = fixed_point(values, padded, wide ? 21 : 13);
    to.scale[row * to.spans() + span] = form.scale;
    const FPart multiple = splat_part(form.multiple);
    for (int i = 0; i < padded; i += kPart) {
      const FPart scaled = form.bad ? FPart{} : load<FPart>(values + i) * multiple;  // NaN x 0 is NaN
      store(q + i, round_part_to_int(scaled));
    }
    // Digits from the highest on; the sums of one word a digit are kept apart, they would not fit together.
    if (to.width == 8 && !wide) {
      __builtin_memcpy(digit[0], q, sizeof(q));
    } else {
      split(q, padded, digit[0], digit[to.digits - 1]);
      if (to.digits == 3) split(digit[0], padded, digit[0], digit[1]);
    }
    int32_t* offset = to.offset + (row * to.spans() + span) * to.offsets() * kUniformLanes;
    __builtin_memset(offset, 0, sizeof(int32_t) * static_cast<size_t>(to.offsets() * kUniformLanes));
    for (int64_t v = 0; v < to.span; ++v) {
      uint8_t* vector = data + (span * to.span + v) * to.vector_bytes();
      for (int d = 0; d < to.digits; ++d) {
        spread(to.width, digit[d] + v * columns, vector + d * to.digit_bytes());
      }
      for (int d = 0; d < to.offsets(); ++d) {
        subtract_zeros(to, (to.offsets() == 1 ? q : digit[d]) + v * columns, offset + d * kUniformLanes);
      }
    }
  }
}

inline void level_row(const UniformInput& to, const UniformSource& source, int64_t row) {
  constexpr float kLeastScale = 1e-5f;
  const UniformQuantizer& how = *source.quantizer;
  const float given = how.scale[row % how.scales], scale = given < kLeastScale ? kLeastScale : given;
  const bool sign = how.qmin == -1 && how.qmax == 1;
  const FPart least = splat_part(static_cast<float>(how.qmin)), most = splat_part(static_cast<float>(how.qmax));
  alignas(64) float values[kUniformBlock];
  alignas(64) int32_t q[kUniformBlock];
  const int columns = to.columns();
  uint8_t* data = to.data + row * to.stride;
  IPart bad = {};
  for (int64_t v = 0; v < to.vectors; ++v) {
    const int64_t first = v * columns, left = source.k - first;
    const int count = static_cast<int>(left < 0 ? 0 : left < columns ? left : columns);
    load_row(source.data, row * source.k + first, source.type, count, columns, values);
    if (how.offset != nullptr) {
      for (int i = 0; i < count; ++i) values[i] += how.offset[first + i];
    }
    for (int i = 0; i < columns; i += kPart) {
      FPart steps = load<FPart>(values + i) / scale;
      bad |= steps != steps;
      if (sign) {
        steps = select(steps >= 0.0f, splat_part(1.0f), splat_part(-1.0f));
      } else {
        steps = select(steps > least, steps, least);  // NaN becomes the least level: the row's scale says so
        steps = select(steps < most, steps, most);
      }
      store(q + i, round_part_to_int(steps));
    }
    for (int i = count; i < columns; ++i) q[i] = 0;
    spread(to.width, q, data + v * to.vector_bytes());
    int32_t* offset = to.offset + (row * to.spans() + v / to.span) * kUniformLanes;
    if (v % to.span == 0) __builtin_memset(offset, 0, sizeof(int32_t) * kUniformLanes);
    subtract_zeros(to, q, offset);
  }
  to.row_scale[row] = any(bad) ? __builtin_nanf("") : scale;
}

void uniform_rows(const UniformInput& to, const UniformSource& source, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (source.quantizer == nullptr) {
      fixed_point_row(to, source, row);
    } else {
      level_row(to, source, row);
    }
  }
}
