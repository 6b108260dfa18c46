// Sixteen values at a time as parts, for the kernels of training: loads and stores, codes, sums in double.
//
// Include inside a namespace of the instruction set, after decode8.inl.

#define OLIVE_LANES(i, count) [&](int64_t i, int count) __attribute__((always_inline))

// body(first, count) for each sixteen of `count` values; the last call may have fewer.
template <class Body>
__attribute__((always_inline)) inline void for_lanes(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, kLanes);
  if (i < count) body(i, static_cast<int>(count - i));
}

// body(a constant of the type): a loop that knows it has no branches, and keeps the rest in registers.
template <class Body>
inline auto with_type(Float type, Body&& body) {
  if (type == Float::f32) return body(std::integral_constant<Float, Float::f32>{});
  if (type == Float::bf16) return body(std::integral_constant<Float, Float::bf16>{});
  return body(std::integral_constant<Float, Float::f16>{});
}

inline FPart load_part(const void* data, int64_t index, Float type) {
#if defined(__AVX512F__)
  return load_floats(data, index, type);
#else
  if (type == Float::f32) return load<FPart>(static_cast<const float*>(data) + index);
#if defined(__AVX2__)
  const __m128i halves = load<__m128i>(static_cast<const uint16_t*>(data) + index);
  if (type == Float::bf16) return reinterpret_cast<FPart>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  return reinterpret_cast<FPart>(_mm256_cvtph_ps(halves));
#else
  FPart value;
  for (int i = 0; i < kPart; ++i) value[i] = load_float(data, index + i, type);
  return value;
#endif
#endif
}

inline void store_part(void* data, int64_t index, Float type, FPart value) {
#if defined(__AVX512F__)
  store_floats(data, index, type, value);
#else
  if (type == Float::f32) return store(static_cast<float*>(data) + index, value);
#if defined(__AVX2__)
  uint16_t* halves = static_cast<uint16_t*>(data) + index;
  if (type == Float::f16) {
    return store(halves, _mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
  }
  const IPart bits = as_int(value);
  const IPart rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  const __m256i result = reinterpret_cast<__m256i>(value != value ? bits | 0x400000 : rounded);
  const __m256i words = _mm256_srli_epi32(result, 16);
  store(halves, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
  for (int i = 0; i < kPart; ++i) store_float(data, index + i, type, value[i]);
#endif
#endif
}

// Zeros past `count`.
__attribute__((always_inline)) inline void load_lanes(const void* data, int64_t index, Float type, int count,
                                                      FPart* parts) {
  if (count == kLanes) {
    repeat<kParts>(OLIVE_EACH(p) { parts[p] = load_part(data, index + p * kPart, type); });
    return;
  }
  float values[kLanes] = {};
  for (int i = 0; i < count; ++i) values[i] = load_float(data, index + i, type);
  repeat<kParts>(OLIVE_EACH(p) { parts[p] = load<FPart>(values + p * kPart); });
}

__attribute__((always_inline)) inline void store_lanes(void* data, int64_t index, Float type, int count,
                                                       const FPart* parts) {
  if (count == kLanes) {
    repeat<kParts>(OLIVE_EACH(p) { store_part(data, index + p * kPart, type, parts[p]); });
    return;
  }
  float values[kLanes];
  repeat<kParts>(OLIVE_EACH(p) { store(values + p * kPart, parts[p]); });
  for (int i = 0; i < count; ++i) store_float(data, index + i, type, values[i]);
}

inline void narrow_part(IPart value, int8_t* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i lanes = reinterpret_cast<__m256i>(value);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
#elif defined(__AVX512F__)
  store(to, __builtin_convertvector(value, B16));
#else
  for (int i = 0; i < kPart; ++i) to[i] = static_cast<int8_t>(value[i]);
#endif
}

__attribute__((always_inline)) inline void store_bytes(int8_t* to, int count, const IPart* parts) {
  if (count == kLanes) {
    repeat<kParts>(OLIVE_EACH(p) { narrow_part(parts[p], to + p * kPart); });
    return;
  }
  int8_t bytes[kLanes];
  repeat<kParts>(OLIVE_EACH(p) { narrow_part(parts[p], bytes + p * kPart); });
  __builtin_memcpy(to, bytes, static_cast<size_t>(count));
}

__attribute__((always_inline)) inline void load_bytes(const int8_t* from, int count, IPart* parts) {
  uint8_t bytes[kLanes] = {};
  const uint8_t* all = reinterpret_cast<const uint8_t*>(from);
  if (count != kLanes) {
    __builtin_memcpy(bytes, from, static_cast<size_t>(count));
    all = bytes;
  }
  repeat<kParts>(OLIVE_EACH(p) { parts[p] = widen_bytes(all + p * kPart); });
}

// NaN stays NaN, and -0 is not below 0.
inline FPart clamp_part(FPart value, float low, float high) {
  value = value < low ? splat_part(low) : value;
  return value > high ? splat_part(high) : value;
}

// To the nearest whole number, ties to even, with the value's sign; |value| <= 2^22, or NaN.
inline FPart round_part(FPart value) {
  const FPart magic = splat_part(12582912.0f);
  const FPart whole = (value + magic) - magic;
  return as_float(as_int(whole) | (as_int(value) & static_cast<int32_t>(0x80000000u)));
}

// clamp(floor(position), qmin, qmax); NaN counts as 0.
inline IPart code_part(FPart position, float qmin, float qmax) {
  const FPart value = clamp_part(position == position ? position : FPart{}, qmin, qmax);
  const IPart towards_zero = __builtin_convertvector(value, IPart);
  return towards_zero + (__builtin_convertvector(towards_zero, FPart) > value);  // true is -1
}

// Steps to the nearest threshold, a whole number from qmin + 1 to qmax.
inline FPart threshold_distance_part(FPart position, float qmin, float qmax) {
  return absolute(position - round_part(clamp_part(position, qmin + 1.0f, qmax)));
}

// Sixteen sums in double, value i mod 16 in lane i on every instruction set.
typedef float FHalf __attribute__((vector_size(sizeof(FPart) / 2)));
typedef double DHalf __attribute__((vector_size(sizeof(FPart))));
constexpr int kHalf = kPart / 2;
constexpr int kHalves = kLanes / kHalf;

__attribute__((always_inline)) inline void add_part(DHalf* sums, FPart value) {
  FHalf halves[2];
  __builtin_memcpy(halves, &value, sizeof(halves));
#if defined(__AVX2__) && !defined(__AVX512F__)  // gcc 12 converts two at a time and puts them together
  sums[0] += reinterpret_cast<DHalf>(_mm256_cvtps_pd(reinterpret_cast<__m128>(halves[0])));
  sums[1] += reinterpret_cast<DHalf>(_mm256_cvtps_pd(reinterpret_cast<__m128>(halves[1])));
#else
  sums[0] += __builtin_convertvector(halves[0], DHalf);
  sums[1] += __builtin_convertvector(halves[1], DHalf);
#endif
}

inline double fold_sums(const DHalf* sums) {
  double lanes[kLanes];
  __builtin_memcpy(lanes, sums, sizeof(lanes));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
