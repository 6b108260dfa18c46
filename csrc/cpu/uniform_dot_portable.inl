// Products of uniform_linear in plain C++; what span_sums does is said in uniform_dot_avx2.inl.

template <int kWidth, bool kUnsigned, int kDigits, int kInputs, int kRows, int kCount>
inline void span_sums(const uint8_t* const* codes, const uint8_t* const* x, int64_t step, int64_t count,
                      UniformSums (*sums)[kInputs][kUniformWords]) {
  constexpr int kFields = 8 / kWidth, kMask = (1 << kWidth) - 1, kElement = kWidth == 8 ? 2 : 1;
  for (int row = 0; row < kRows; ++row) {
    for (int input = 0; input < kInputs; ++input) {
      for (int digit = 0; digit < kDigits; ++digit) {
        UniformSums sum = {};
        for (int64_t v = 0; v < count; ++v) {
          const uint8_t* bytes = x[input] + v * step + digit * kFields * kUniformBytes * kElement;
          for (int i = 0; i < kFields * kUniformBytes; ++i) {
            const int byte = i % kUniformBytes, field = i / kUniformBytes;
            const int32_t code = (codes[row][v * kUniformBytes + byte] >> (kWidth * field)) & kMask;
            const int32_t q = kWidth == 8 ? static_cast<int32_t>(load<int16_t>(bytes + 2 * i))
                              : kUnsigned ? static_cast<int32_t>(bytes[i])
                                          : static_cast<int32_t>(static_cast<int8_t>(bytes[i]));
            sum[kWidth == 8 ? byte % 16 / 2 : byte / 4] += code * q;
          }
        }
        UniformSums& to = sums[row][input][kWidth == 8 ? digit : 0];
        to = kWidth == 8 || digit == 0 ? sum << 1 : (to << 8) + (sum << 1);
      }
    }
  }
}
