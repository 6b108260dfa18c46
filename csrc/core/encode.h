// Encoding of one pair with a scale given, for host and device: docs/format.md, section 7, to the last bit where it is
// compiled without contraction.
//
// Levels are integers, so the thresholds between them are multiples of 1/2, and t > h / 2 holds for an integer h
// exactly where ceil(2 t) > h: a table indexed by ceil(2 t) holds the nearest level of every t, ties included. One
// look-up replaces 7 comparisons and selections, 15 in a plain group.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/ovp.h"

#if defined(OLIVE_EMULATED)
#include "emulator/ptx.h"
#endif

namespace olive {

enum LevelTable { kNormal = 0, kPlain = 1, kOutlier = 2 };  // the first two are the rules, by rule bit

constexpr float kLeast = -128.0f;  // below every plain level
constexpr float kMost = 255.5f;    // past every threshold
constexpr int kHalfZero = 256;     // where tables of half steps keep 0
constexpr int kHalfSteps = kHalfZero + 512;
static_assert(2 * kLeast == -kHalfZero && 2 * kMost == kHalfSteps - kHalfZero - 1, "tables hold every clamped t");

// Nibbles of magnitudes have bit 3 set, that of level 0 apart: they are those of a negative value, and whoever knows
// the sign masks it.
struct EncodeTables {
  uint8_t nibble[3][kHalfSteps];  // of the nearest level, by ceil(2 t) + kHalfZero; of |t| unless plain
  float level[3][16];             // by such a nibble
  float past;                     // a pair can only gain from an outlier if one of its |t| is above this
  bool has_plain;
};

// Fills entries `first`, `first + step` and so on of every table. codebook: int8 [32].
OLIVE_FN void fill_encode_tables(EncodeTables* tables, const int8_t* codebook, int first, int step) {
  const auto* normal = reinterpret_cast<const uint8_t*>(codebook);
  const auto* outlier = normal + 8;
  const auto* plain = codebook + 16;
  for (int entry = first; entry < kHalfSteps; entry += step) {
    const int half = entry - kHalfZero;
    int n = 0, o = 1, p = 0;
    for (int i = 0; i < 7; ++i) n += half > normal[i] + normal[i + 1];
    for (int i = 1; i < 7; ++i) o += half > outlier[i] + outlier[i + 1];
    for (int i = 0; i < 15; ++i) p += half > plain[i] + plain[i + 1];
    tables->nibble[kNormal][entry] = static_cast<uint8_t>(n == 0 ? 0 : n | 8);
    tables->nibble[kOutlier][entry] = static_cast<uint8_t>(o | 8);
    tables->nibble[kPlain][entry] = static_cast<uint8_t>(p);
  }
  for (int i = first; i < 16; i += step) {
    tables->level[kNormal][i] = normal[i % 8];
    tables->level[kOutlier][i] = outlier[i % 8];
    tables->level[kPlain][i] = plain[i];
  }
  if (first == 0) {
    tables->past = static_cast<float>(normal[7] + outlier[1]) * 0.5f;
    tables->has_plain = plain[0] != plain[15];
  }
}

// ceil(2 t) for t from kLeast to kMost.
OLIVE_FN int half_steps(float t) {
#if defined(__CUDA_ARCH__) || defined(OLIVE_EMULATED)
  // Neighbours of 1.5 x 2^22 are 1/2 apart: a sum rounded up to them counts in its last bits. (Conversions to integers
  // run at an eighth of the speed of additions.)
  return static_cast<int>(float_to_bits(__fadd_ru(t, 6291456.0f)) - 0x4AC00000u);
#else
  return static_cast<int>(std::ceil(2.0f * t));
#endif
}

struct PairCode {
  float error;  // squared, in units of the scale, weighed
  uint8_t byte;
};

// even, odd: values in units of the scale, t. even_weight, odd_weight: importance, 1 where all are alike.
OLIVE_FN PairCode encode_pair(const EncodeTables& tables, bool plain, bool paper_pairing, float even, float odd,
                              float even_weight, float odd_weight) {
  const auto nearest = [&](int table, float t) {
    return tables.nibble[table][kHalfZero + half_steps(fminf(t, kMost))];
  };
  const auto error = [&](float difference, float weight) { return difference * difference * weight; };
  const auto with_sign = [&](int nibble, float t) { return nibble & static_cast<int>(7u | float_to_bits(t) >> 28); };

  const float a = plain ? even : fabsf(even), b = plain ? odd : fabsf(odd);
  const int low = nearest(plain, plain ? fmaxf(even, kLeast) : a);
  const int high = nearest(plain, plain ? fmaxf(odd, kLeast) : b);
  const float* level = tables.level[plain];
  // Asked for twice and computed once by whoever wants the error, else only beside an outlier.
  const auto normal_error = [&] { return error(a - level[low], even_weight) + error(b - level[high], odd_weight); };
  const int low_nibble = plain ? low : with_sign(low, even), high_nibble = plain ? high : with_sign(high, odd);
  PairCode code = {normal_error(), static_cast<uint8_t>(low_nibble | high_nibble << 4)};

  const float past = plain ? INFINITY : tables.past;
  if (a > past || b > past) {
    const int low_out = nearest(kOutlier, a), high_out = nearest(kOutlier, b);
    const float* outlier = tables.level[kOutlier];
    const float normal = normal_error();
    const float outlier_victim = error(a - outlier[low_out], even_weight) + error(b, odd_weight);
    const float victim_outlier = error(a, even_weight) + error(b - outlier[high_out], odd_weight);
    bool even_is_outlier, odd_is_outlier;
    if (paper_pairing) {
      even_is_outlier = a > past && (!(b > past) || a >= b);
      odd_is_outlier = b > past && !even_is_outlier;
    } else {
      even_is_outlier = outlier_victim < normal && outlier_victim <= victim_outlier;
      odd_is_outlier = victim_outlier < normal && !even_is_outlier;
    }
    if (even_is_outlier) code = {outlier_victim, static_cast<uint8_t>(with_sign(low_out, even) | kIdentifier << 4)};
    if (odd_is_outlier) code = {victim_outlier, static_cast<uint8_t>(kIdentifier | with_sign(high_out, odd) << 4)};
  }
  return code;
}

}  // namespace olive
