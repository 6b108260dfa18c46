// Encoding of one pair of eight bits, for host and device: docs/format.md, section 9, to the last bit. Compile it
// without contraction.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/ovp.h"

#if defined(OLIVE_EMULATED)
#include "emulator/ptx.h"
#endif

namespace olive {

constexpr float kLargest8 = 127.0f;       // normal level
constexpr float kLeastOutlier8 = 144.0f;  // outlier level
constexpr float kMostOutlier8 = 32768.0f;
constexpr float kPastNormal8 = (kLargest8 + kLeastOutlier8) / 2;

// The nearest outlier level to a magnitude, ties to the lower: four significant bits.
OLIVE_FN float nearest_outlier8(float magnitude) {
  const float within = fminf(fmaxf(magnitude, kLeastOutlier8), kMostOutlier8);
  return bits_to_float((float_to_bits(within) + 0x7FFFFu) & ~0xFFFFFu);
}

struct PairLevels8 {
  float error;  // squared, in units of the scale
  float even, odd;
};

// even, odd: values in units of the scale.
OLIVE_FN PairLevels8 encode_pair8(bool paper_pairing, float even, float odd) {
  const auto error = [](float difference) { return difference * difference; };
  const float low = fminf(fmaxf(rintf(even), -kLargest8), kLargest8);
  const float high = fminf(fmaxf(rintf(odd), -kLargest8), kLargest8);
  PairLevels8 code = {error(even - low) + error(odd - high), low, high};

  // Up to halfway between the largest normal level and the least outlier, an outlier only loses.
  const float a = fabsf(even), b = fabsf(odd);
  if (a > kPastNormal8 || b > kPastNormal8) {
    const float low_out = nearest_outlier8(a), high_out = nearest_outlier8(b);
    const float outlier_victim = error(a - low_out) + error(b), victim_outlier = error(a) + error(b - high_out);
    bool even_is_outlier, odd_is_outlier;
    if (paper_pairing) {
      even_is_outlier = a > kPastNormal8 && (!(b > kPastNormal8) || a >= b);
      odd_is_outlier = b > kPastNormal8 && !even_is_outlier;
    } else {
      even_is_outlier = outlier_victim < code.error && outlier_victim <= victim_outlier;
      odd_is_outlier = victim_outlier < code.error && !even_is_outlier;
    }
    if (even_is_outlier) code = {outlier_victim, copysignf(low_out, even), 0.0f};
    if (odd_is_outlier) code = {victim_outlier, 0.0f, copysignf(high_out, odd)};
  }
  return code;
}

}  // namespace olive
