// Products of uniform_linear with AVX2: sums[row][input][0] = 2 sum(q c) by lane, for `count` vectors of codes[row] and
// of x[input], which are `step` bytes apart; kCount: the same where it is a constant, else 0. Codes of 8 bits with two
// words have a sum for each. Additions wrap: what does not fit on the way does once zeros are taken off.
//
// Codes of 2 and 4 bits: vpmaddubsw takes an unsigned and a signed factor, so the smaller side may be either
// (kUnsigned: the activations). Sums of its pairs stay in 16 bits for a few vectors and are widened then; digits meet
// there, because vpmaddwd multiplies by their weights. 8 bits: words, vpmaddwd.

// Ask for codes that lie ahead in the stream: the hardware prefetcher stops at page borders. With several rows of
// activations multiplying takes longer than memory does.
template <int kInputs>
inline void prefetch_codes(const uint8_t* codes) {
  if constexpr (kInputs == 1) _mm_prefetch(reinterpret_cast<const char*>(codes + kUniformAhead), _MM_HINT_T0);
}

// Sums of 2 bits and one digit keep codes where they lie in the byte as far as that saves shifts: fields 1 and 3 are
// four times their value then, and have sums of their own.
template <int kWidth, int kDigits>
constexpr int kQuadruple = kWidth == 2 && kDigits == 1 ? 1 : 0;

template <int kWidth, bool kUnsigned, int kDigits>
constexpr int safe_steps() {
  const int most = 2 * (kUnsigned ? 255 : 128) * ((1 << kWidth) - 1);  // of a pair of products
  return 32767 / (kQuadruple<kWidth, kDigits> ? 2 * 4 * most : 8 / kWidth * most);
}

template <int kWidth, bool kUnsigned, int kDigits, int kInputs, int kRows, int kCount>
__attribute__((always_inline)) inline void byte_sums(const uint8_t* const* codes, const uint8_t* const* x, int64_t step,
                                                     int64_t count, UniformSums (*sums)[kInputs][kUniformWords]) {
  constexpr int kFields = 8 / kWidth, kSteps = safe_steps<kWidth, kUnsigned, kDigits>();
  constexpr int kApart = kQuadruple<kWidth, kDigits>, kPlanes = kInputs * kDigits;
  const __m256i mask = _mm256_set1_epi8((1 << kWidth) - 1);
  __m256i total[kRows][kInputs], pairs[kApart + 1][kRows][kPlanes];

  const auto add = [&](int64_t v, auto is_first) __attribute__((always_inline)) {
    __m256i bytes[kRows];
    repeat<kRows>(OLIVE_EACH(row) {
      bytes[row] = load<__m256i>(codes[row] + v * kUniformBytes);
      prefetch_codes<kInputs>(codes[row] + v * kUniformBytes);
    });
    repeat<kFields>(OLIVE_EACH(field) {
      constexpr bool kHigh = kApart && field % 2 == 1;
      constexpr int kShift = kApart ? (field == 2 ? 4 : 0) : (field > 0 ? kWidth : 0);
      __m256i factor[kRows];
      repeat<kRows>(OLIVE_EACH(row) {
        if constexpr (kShift > 0) bytes[row] = _mm256_srli_epi16(bytes[row], kShift);
        factor[row] = _mm256_and_si256(bytes[row], kHigh ? _mm256_slli_epi16(mask, 2) : mask);
      });
      repeat<kPlanes>(OLIVE_EACH(plane) {
        const __m256i q =
            load<__m256i>(x[plane / kDigits] + v * step + (plane % kDigits * kFields + field) * kUniformBytes);
        repeat<kRows>(OLIVE_EACH(row) {
          const __m256i products =
              kUnsigned ? _mm256_maddubs_epi16(q, factor[row]) : _mm256_maddubs_epi16(factor[row], q);
          __m256i& to = pairs[kHigh][row][plane];
          constexpr bool kFirst = field <= kApart;
          to = is_first && kFirst ? products : _mm256_add_epi16(to, products);
        });
      });
    });
  };
  // Digit d of three counts 2^(8 (2 - d)); each twice, as sums do.
  const auto widen = [&]() __attribute__((always_inline)) {
    repeat<kRows * kInputs>(OLIVE_EACH(i) {
      constexpr int kRow = i / kInputs, kInput = i % kInputs;
      repeat<kDigits>(OLIVE_EACH(digit) {
        constexpr int kPower = kDigits - 1 - digit;
        __m256i of = pairs[0][kRow][kInput * kDigits + digit];
        if constexpr (kApart)
          of = _mm256_add_epi16(of, _mm256_srai_epi16(pairs[kApart][kRow][kInput * kDigits + digit], 2));
        of = _mm256_madd_epi16(of, _mm256_set1_epi16(kPower == 0 ? 2 : 512));
        if constexpr (kPower == 2) of = _mm256_slli_epi32(of, 8);
        total[kRow][kInput] = _mm256_add_epi32(total[kRow][kInput], of);
      });
    });
  };
  const Index<1> first;
  const Index<0> next;
  repeat<kRows * kInputs>(OLIVE_EACH(i) { total[i / kInputs][i % kInputs] = _mm256_setzero_si256(); });
  if constexpr (kCount > 0) {
    static_assert(kCount <= kSteps, "16 bits hold them");
    repeat<kCount>(OLIVE_EACH(v) {
      if constexpr (v == 0)
        add(v, first);
      else
        add(v, next);
    });
    widen();
  } else {
    int64_t v = 0;
    while (v < count) {
      const int64_t stop = v + kSteps < count ? v + kSteps : count;
      add(v, first);
      for (++v; v < stop; ++v) add(v, next);
      widen();
    }
  }
  repeat<kRows * kInputs>(
      OLIVE_EACH(i) { store(&sums[i / kInputs][i % kInputs][0], total[i / kInputs][i % kInputs]); });
}

template <int kDigits, int kInputs, int kRows>
__attribute__((always_inline)) inline void word_sums(const uint8_t* const* codes, const uint8_t* const* x, int64_t step,
                                                     int64_t count, UniformSums (*sums)[kInputs][kUniformWords]) {
  constexpr int kPlanes = kInputs * kDigits;
  __m256i total[kRows][kPlanes];
  repeat<kRows * kPlanes>(OLIVE_EACH(i) { total[i / kPlanes][i % kPlanes] = _mm256_setzero_si256(); });
  for (int64_t v = 0; v < count; ++v) {
    repeat<kRows>(OLIVE_EACH(row) { prefetch_codes<kInputs>(codes[row] + v * kUniformBytes); });
    repeat<2>(OLIVE_EACH(half) {
      __m256i words[kPlanes];
      repeat<kPlanes>(OLIVE_EACH(plane) {
        words[plane] = load<__m256i>(x[plane / kDigits] + v * step + (plane % kDigits * 2 + half) * kUniformBytes);
      });
      repeat<kRows>(OLIVE_EACH(row) {
        const __m256i code = _mm256_cvtepu8_epi16(load<__m128i>(codes[row] + v * kUniformBytes + 16 * half));
        repeat<kPlanes>(OLIVE_EACH(plane) {
          total[row][plane] = _mm256_add_epi32(total[row][plane], _mm256_madd_epi16(code, words[plane]));
        });
      });
    });
  }
  repeat<kRows * kPlanes>(OLIVE_EACH(i) {
    constexpr int kRow = i / kPlanes, kPlane = i % kPlanes;
    store(&sums[kRow][kPlane / kDigits][kPlane % kDigits], _mm256_slli_epi32(total[kRow][kPlane], 1));
  });
}

template <int kWidth, bool kUnsigned, int kDigits, int kInputs, int kRows, int kCount>
__attribute__((always_inline)) inline void span_sums(const uint8_t* const* codes, const uint8_t* const* x, int64_t step,
                                                     int64_t count, UniformSums (*sums)[kInputs][kUniformWords]) {
  if constexpr (kWidth == 8) {
    word_sums<kDigits, kInputs, kRows>(codes, x, step, count, sums);
  } else {
    byte_sums<kWidth, kUnsigned, kDigits, kInputs, kRows, kCount>(codes, x, step, count, sums);
  }
}
