// Multi-threaded entry points of the CPU backend: raw pointers and sizes. OpenMP threads are Torch's own.
#pragma once

#include "cpu/dispatch.h"

namespace olive {

struct QuantizeResult {
  bool finite;  // false: a value is NaN or Inf, nothing useful was written
};

QuantizeResult ovp_quantize(Isa isa, const Weight& weight, const Codebook& book, const Search& search, uint8_t* codes,
                            int16_t* scale);

void ovp_encode(Isa isa, const Weight& weight, const Codebook& book, bool paper_pairing, const int16_t* scale,
                uint8_t* codes);

void ovp_decode(Isa isa, const uint8_t* codes, const int16_t* scale, const Codebook& book, int64_t n, int64_t k,
                int group_size, void* out, Float type);

void ovp_compensate(Isa isa, const Compensation& run);

// Canonical [N, ceil(K / 2)] to packed [ceil(N / 16), K' / 8, 64], and back; scales alike.
struct PackShape {
  int64_t n, k;
  int group_size;
  int block() const { return group_size <= 0 ? kMaxBlock : group_size; }
  int64_t row_blocks() const { return (n + kPackRows - 1) / kPackRows; }
  int64_t vectors() const { return (k + block() - 1) / block() * (block() / kPackColumns); }
  int64_t groups() const { return group_size <= 0 ? 1 : (k + group_size - 1) / group_size; }
};
void ovp_pack(const PackShape& shape, const uint8_t* codes, const int16_t* scale, uint8_t* packed_codes,
              int16_t* packed_scale);
void ovp_unpack(const PackShape& shape, const uint8_t* packed_codes, const int16_t* packed_scale, uint8_t* codes,
                int16_t* scale);

struct LinearArguments {
  const void* x;  // [M, K]
  Float x_type;
  int64_t m;
  PackShape shape;
  const uint8_t* codes;  // packed
  const int16_t* scale;  // packed
  Codebook book;
  const void* bias;  // [N], nullptr = no bias
  Float bias_type;
  void* out;                            // [M, N], x's type
  const ActivationFormat* activations;  // ovp_linear_quantized; nullptr = x as it is
};
void ovp_linear(Isa isa, const LinearArguments& arguments);

void quantize_activations(Isa isa, const ActivationSource& source, const LevelTarget& target);

// Weights of eight bits: codes uint8 [N, 2 ceil(K / 2)], canonical.
QuantizeResult ovp8_quantize(Isa isa, const Weight& weight, const Search& search, uint8_t* codes, int16_t* scale);

void ovp8_decode(Isa isa, const uint8_t* codes, const int16_t* scale, int64_t n, int64_t k, int group_size, void* out,
                 Float type);

struct Linear8Arguments {
  const void* x;  // [M, K]
  Float x_type;
  int64_t m, n, k;
  int group_size;
  const uint8_t* codes;
  const int16_t* scale;
  const void* bias;  // [N], nullptr = no bias
  Float bias_type;
  void* out;  // [M, N], x's type
};
void ovp8_linear(Isa isa, const Linear8Arguments& arguments);

void statsq(Isa isa, const StatsQ& q);

// Values [outer, size, inner] with `size` scales along the middle.
struct LsqArguments {
  Lsq values;
  int64_t outer, size, inner;
  const float* scale;  // [size]
};
void lsq(Isa isa, const LsqArguments& arguments);

// grad_scale: [size]. The same bits with any number of threads.
void lsq_backward(Isa isa, const LsqArguments& arguments, float* grad_scale);

void oscillation(Isa isa, const Oscillation& q);

}  // namespace olive
