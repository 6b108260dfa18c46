// What the kernels of training share: StatsQ, LSQ and the oscillations of codes. Definitions: olive/ops/statsq.py,
// lsq.py and oscillation.py.
#pragma once

#include <cstdint>

#include "core/floats.h"

namespace olive {

// A weight [n, k] in groups of `width` columns, the last of a row perhaps shorter.
struct RowGroups {
  const void* data;
  Float type;
  int64_t n, k;
  int64_t width;  // 1 .. k
  int64_t groups() const { return (k + width - 1) / width; }
};

// Results that are not asked for are nullptr.
struct StatsQ {
  RowGroups weight;
  int half;       // 2^(bits - 1)
  void* levels;   // [n, k], the weight's type
  int8_t* codes;  // [n, k]
  float* scale;   // [n, groups]
  float* margin;  // [n, k]
};

struct Lsq {
  const void* input;
  Float type;
  float qmin, qmax;
  bool is_sign;      // signed values of 1 bit: -1 and 1
  const void* grad;  // backward: of the input's type
  void* out;         // forward: values; backward: gradient of the input. The input's type
};

struct Oscillation {
  RowGroups weight;
  const float* step;  // [n, groups], or one for all
  bool one_step;
  float offset;
  float qmin, qmax;
  float momentum, keep;  // keep: 1 - momentum
  float boundary;
  int8_t* codes;  // [n, k], as the next three
  int8_t* direction;
  float* frequency;
  uint8_t* near;  // 0 or 1
};

}  // namespace olive
