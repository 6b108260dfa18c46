// Plain C++ kernels: they run everywhere and are the oracle of the others.
#include "cpu/lanes.h"
#include "cpu/uniform.h"

namespace olive {
namespace portable {
namespace {

#include "cpu/encode.inl"

#include "cpu/encode8.inl"

#include "cpu/compensate.inl"

#include "cpu/decode.inl"

#include "cpu/decode8.inl"

#include "cpu/training_lanes.inl"

#include "cpu/statsq.inl"

#include "cpu/lsq.inl"

#include "cpu/oscillation.inl"

#include "cpu/activations.inl"

#include "cpu/quantize_activations.inl"

#include "cpu/uniform_input.inl"

#include "cpu/uniform_dot_portable.inl"

#include "cpu/uniform_linear.inl"

#include "cpu/linear_common.inl"

struct Decoder {
  explicit Decoder(const Codebook&) {}
  bool decode(const uint8_t*, const int16_t*, int, int16_t*) const { return false; }  // decode_block_words does it
};

constexpr int kWordRows = 1;

template <int kRows>
inline void multiply_words(const int16_t* words, const int16_t* x, int block, I16* sums) {
  static_assert(kRows == 1, "see kWordRows");
  *sums = I16{};
  for (int step = 0; step < block / 2; ++step) {
    for (int row = 0; row < kPackRows; ++row) {
      const int16_t* w = words + (step * kPackRows + row) * 2;
      (*sums)[row] += static_cast<int32_t>(w[0]) * x[2 * step] + static_cast<int32_t>(w[1]) * x[2 * step + 1];
    }
  }
}

#include "cpu/linear_words.inl"

}  // namespace

Kernels kernels() {
  Kernels set = {};
#include "cpu/common_kernels.inl"
  set.linear = linear_words;
  set.tile_rows = 1;
  return set;
}

}  // namespace portable
}  // namespace olive
