// Products of uniform_linear with VNNI: as uniform_dot_avx2.inl, but vpdpbusd and vpdpwssd add four bytes' and two
// words' products to 32-bit sums at once.

template <int kWidth, bool kUnsigned, int kDigits, int kInputs, int kRows, int kCount>
__attribute__((always_inline)) inline void span_sums(const uint8_t* const* codes, const uint8_t* const* x, int64_t step,
                                                     int64_t count, UniformSums (*sums)[kInputs][kUniformWords]) {
  constexpr int kFields = 8 / kWidth, kPlanes = kInputs * kDigits, kChunks = kWidth == 8 ? 2 : kFields;
  const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << kWidth) - 1));
  __m256i total[kRows][kPlanes];
  repeat<kRows * kPlanes>(OLIVE_EACH(i) { total[i / kPlanes][i % kPlanes] = _mm256_setzero_si256(); });
  for (int64_t v = 0; v < count; ++v) {
    if constexpr (kInputs == 1) {
      repeat<kRows>(OLIVE_EACH(row) { prefetch(codes[row] + v * kUniformBytes + kUniformAhead); });
    }
    repeat<kChunks>(OLIVE_EACH(chunk) {
      __m256i factor[kRows];
      repeat<kRows>(OLIVE_EACH(row) {
        const uint8_t* bytes = codes[row] + v * kUniformBytes;
        if constexpr (kWidth == 8) {
          factor[row] = _mm256_cvtepu8_epi16(load<__m128i>(bytes + 16 * chunk));
        } else {
          factor[row] = _mm256_and_si256(_mm256_srli_epi16(load<__m256i>(bytes), kWidth * chunk), mask);
        }
      });
      repeat<kPlanes>(OLIVE_EACH(plane) {
        const __m256i q =
            load<__m256i>(x[plane / kDigits] + v * step + (plane % kDigits * kChunks + chunk) * kUniformBytes);
        repeat<kRows>(OLIVE_EACH(row) {
          __m256i& to = total[row][plane];
          if constexpr (kWidth == 8) {
            to = _mm256_dpwssd_epi32(to, factor[row], q);
          } else {
            to = kUnsigned ? _mm256_dpbusd_epi32(to, q, factor[row]) : _mm256_dpbusd_epi32(to, factor[row], q);
          }
        });
      });
    });
  }
  repeat<kRows * kInputs>(OLIVE_EACH(i) {
    constexpr int kRow = i / kInputs, kInput = i % kInputs;
    repeat<kDigits>(OLIVE_EACH(digit) {
      UniformSums twice;
      store(&twice, _mm256_slli_epi32(total[kRow][kInput * kDigits + digit], 1));
      UniformSums& to = sums[kRow][kInput][kWidth == 8 ? static_cast<int>(digit) : 0];
      to = kWidth == 8 || digit == 0 ? twice : (to << 8) + twice;
    });
  });
}
