// uniform_linear: structures that its kernels share, and its entry point. ops/uniform.py is the definition.
//
// A code c of `width` bits stands for the level c - zero / 2, an odd or even multiple of one half. Kernels multiply
// unsigned codes with integer activations q, in vectors of 32 bytes of codes of one row of the weight, and take
// zero * sum(q) off exactly: 2 sum(q level) = 2 sum(q c) - zero sum(q).
#pragma once

#include "cpu/dispatch.h"

namespace olive {

constexpr int kUniformBytes = 32;                   // of codes in a vector
constexpr int kUniformLanes = 8;                    // sums of a vector, 32 bits each
constexpr int kUniformWords = 2;                    // sums of two words a value are kept apart
constexpr int kUniformRows = 2;                     // rows of the weight multiplied together
constexpr int kUniformAhead = 4096;                 // bytes between codes that are used and those that are asked for
constexpr int kUniformBlock = 128;                  // columns of an activation that share a fixed-point scale, at most
constexpr int kUniformGroup = 32;                   // group sizes are multiples of it: a lane has one scale
constexpr int64_t kUniformMaxK = int64_t{1} << 18;  // sums of 255 x 255 over a lane's eighth of K fit an int32

typedef int32_t UniformSums __attribute__((vector_size(4 * kUniformLanes)));
typedef float UniformFloats __attribute__((vector_size(4 * kUniformLanes)));

inline int uniform_columns(int width) { return kUniformBytes * 8 / width; }  // in a vector

// Activations as integers, by rows. Quantized ones have one digit, levels. Others are block fixed-point numbers of 15
// bits (float32: 23), x ~ q * scale, as in struct Activations: with codes of up to 4 bits two signed bytes (three) from
// the highest on, with 8 bits one 16-bit word (two). A row is [vectors][digits][fields][32] of these bytes or words:
// field f of vector v has its columns f, f + fields, ..., as the codes of a byte unpack. Columns past K are zero.
struct UniformInput {
  int64_t rows;      // M
  int width;         // of the weight's codes: 2, 4 or 8
  int zero;          // twice the code of level 0
  int digits;        // 1 to 3
  int64_t vectors;   // per row, whole spans
  int64_t span;      // vectors that share all scales
  int64_t stride;    // bytes of a row
  uint8_t* data;     // [M, stride]
  float* scale;      // [M, spans] of fixed-point numbers, else nullptr
  int32_t* offset;   // [M, spans, offsets(), 8] -zero * sum of q, by lane
  float* row_scale;  // [M] of levels; NaN where a value of the row is; else nullptr
  int fields() const { return 8 / width; }
  int columns() const { return uniform_columns(width); }
  int element() const { return width == 8 ? 2 : 1; }  // bytes of a digit
  int64_t digit_bytes() const { return int64_t{fields()} * kUniformBytes * element(); }
  int64_t vector_bytes() const { return digits * digit_bytes(); }
  int64_t spans() const { return vectors / span; }
  int offsets() const { return width == 8 ? digits : 1; }  // words are summed up digit by digit
};

// How an input becomes levels: clamp(round((x + offset) / scale), qmin, qmax).
struct UniformQuantizer {
  const float* scale;   // [scales], row m has scale[m % scales]
  int64_t scales;       // 1 or tokens
  const float* offset;  // [K], nullptr = none
  int qmin, qmax;       // -1 and 1: the sign
};

struct UniformSource {
  const void* data;  // [M, K]
  Float type;
  int64_t k;
  const UniformQuantizer* quantizer;  // nullptr = fixed point
};

struct UniformLinear {
  UniformInput x;
  bool unsigned_x;       // levels are unsigned bytes
  const uint8_t* codes;  // [N, row_bytes]; vectors may reach past a row, into the next ones
  int64_t row_bytes;
  const uint8_t* last_codes;  // [N - last, vectors * 32]: a copy of the rows whose vectors would reach past the end
  int64_t last;               // the first of them
  const float* scale;         // [N, groups]
  int64_t groups;
  int64_t group_size;  // columns
  int64_t n;
  const void* bias;  // [N], nullptr = no bias
  Float bias_type;
  void* out;  // [M, N]
  Float out_type;
  const uint8_t* row_codes(int64_t row) const {
    return row < last ? codes + row * row_bytes : last_codes + (row - last) * x.vectors * kUniformBytes;
  }
};

struct UniformArguments {
  const void* x;  // [M, K]
  Float x_type;
  int64_t m, n, k;
  int bits;
  bool mid_rise;
  int64_t group_size;    // -1 = one scale per row, else a multiple of 32
  const uint8_t* codes;  // [N, ceil(K width / 8)]
  const float* scale;    // [N, groups]
  const void* bias;      // [N], nullptr = no bias
  Float bias_type;
  void* out;                          // [M, N], x's type
  const UniformQuantizer* quantizer;  // nullptr = x as it is
};
void uniform_linear(Isa isa, const UniformArguments& arguments);

}  // namespace olive
