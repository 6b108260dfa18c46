// Launchers of the CUDA backend: raw device addresses, sizes and a stream. They start work and return; errors are
// exceptions. Nothing here knows Torch or Python.
#pragma once

#include <cstdint>
#include <string>

#include "core/floats.h"

namespace olive::cuda {

// A weight in the layout of core/fragments.h.
struct PackedWeight {
  int64_t n, k;
  int group_size;          // -1 per channel, 0 per tensor
  const uint8_t* codes;    // [4 ceil(N / 64), ceil(K / 64), 512], aligned to 16 bytes
  const int16_t* scale;    // [4 ceil(N / 64), G, 16], aligned to 4 bytes
  const int8_t* codebook;  // [32]
};

// A weight in the canonical layout of docs/format.md.
struct CanonicalWeight {
  int64_t n, k;
  int group_size;
  const uint8_t* codes;    // [N, ceil(K / 2)]
  const int16_t* scale;    // [N, G], [1, 1] per tensor
  const int8_t* codebook;  // [32]
};

struct LinearArguments {
  PackedWeight weight;
  const void* x;  // [M, K], bf16 or f16, K a multiple of 8, aligned to 16 bytes
  Float type;     // of x and out
  int64_t m;
  const void* bias;  // [N], nullptr = no bias
  Float bias_type;
  void* out;       // [M, N]
  float* partial;  // [split, M, N], used where split > 1 and blocks cannot form clusters (before sm_90); else nullptr
};

// How a launch cuts the problem; what fits where is decided in olive/ops/gpu_dispatch.py.
struct MmaTile {
  int tokens;  // 8, 16, 32 or 64 activation rows per block
  int split;   // 1, 2, 4 or 8 blocks share the columns of one tile
};
// What a tile for groups of 64 and more takes: olive/ops/gpu_dispatch.py has the same figures.
struct MmaShape {
  int tokens, rows;
  int warps_along_k;
  int blocks;  // resident per multiprocessor
  int shared;  // bytes
};
constexpr int kMmaShapes = 4;
const MmaShape* mma_shapes();
struct WgmmaTile {
  int rows;    // 128 or 256 weight rows per block
  int tokens;  // 64, 128 or 256 activation rows per block
};
void ovp_linear_mma(const LinearArguments& arguments, const MmaTile& tile, uintptr_t stream);
void ovp_linear_wgmma(const LinearArguments& arguments, const WgmmaTile& tile, uintptr_t stream);

// Levels of weights and activations as int8, up to 127.
struct QuantizedLinearArguments {
  PackedWeight weight;
  const int8_t* x;       // [M, 64 ceil(K / 64)] as quantize_activations writes them for products, aligned to 16 bytes
  const float* scale_x;  // [G, scale_pitch], aligned to 16 bytes; the pitch a multiple of 256
  int64_t scale_pitch;
  int activation_group_size;  // 32, 64, 128; -1 and 0: G = 1
  int64_t m;
  const void* bias;  // [N], nullptr = no bias
  Float bias_type;
  void* out;  // [M, N]
  Float out_type;
  void* partial;  // [split, M, N] of 4 bytes, as in LinearArguments
};
const MmaShape* quantized_mma_shapes();  // for groups of 64 and more
void ovp_linear_quantized_mma(const QuantizedLinearArguments& arguments, const MmaTile& tile, uintptr_t stream);
void ovp_linear_quantized_wgmma(const QuantizedLinearArguments& arguments, const WgmmaTile& tile, uintptr_t stream);

void ovp_pack(int64_t n, int64_t k, int group_size, const uint8_t* codes, const int16_t* scale, uint8_t* packed_codes,
              int16_t* packed_scale, uintptr_t stream);
void ovp_unpack(int64_t n, int64_t k, int group_size, const uint8_t* packed_codes, const int16_t* packed_scale,
                uint8_t* codes, int16_t* scale, uintptr_t stream);

// Either layout to scale x level [N, K].
void ovp_decode(const CanonicalWeight& weight, void* out, Float type, uintptr_t stream);
void ovp_decode_packed(const PackedWeight& weight, void* out, Float type, uintptr_t stream);

struct WeightSource {
  const void* data;  // [N, K]
  Float type;
  int64_t n, k;
  int group_size;
  const int8_t* codebook;  // [32]
  bool paper_pairing;
};

// Encodes with scales given. *not_finite (int32, zero before) becomes nonzero where a value is NaN or Inf; codes are
// then of no use.
void ovp_encode(const WeightSource& weight, const int16_t* scale, uint8_t* codes, int32_t* not_finite,
                uintptr_t stream);

struct Search {
  const float* pair_grid;  // device, [pair_count]
  int pair_count;
  const float* plain_grid;  // device, [plain_count]; not tried where the codebook has no plain levels
  int plain_count;
  const float* importance;  // device, [K], nullptr = all alike
  double* scratch;          // device, per tensor only: [N, 2 + pair_count + 2 plain_count], else nullptr
};

// Searches scales and encodes; *not_finite as above.
void ovp_quantize(const WeightSource& weight, const Search& search, uint8_t* codes, int16_t* scale, int32_t* not_finite,
                  uintptr_t stream);

// A run of columns to round with error compensation, row-major; olive/ops/compensate.py defines it.
struct Compensation {
  const float* values;     // [rows, columns], columns even
  const int16_t* scale;    // [rows, scales_per_row]
  int64_t scales_per_row;  // 1, or one per pair
  const float* factor;     // U [columns, columns], upper, aligned to 8 bytes
  const int8_t* codebook;  // [32]
  int64_t rows, columns;
  uint8_t* codes;  // [rows, columns / 2]
  float* errors;   // [rows, columns]
  float* loss;     // [rows]
};

void ovp_compensate(const Compensation& run, uintptr_t stream);
// What a run may have, for a block's shared memory in bytes.
int64_t most_compensated_columns(int shared_per_block);

enum class ActivationFormat : int { int8 = 0, ovp4 = 1, ovp8 = 2 };
enum class LevelType : int { f32 = 0, bf16 = 1, f16 = 2, int8 = 3 };

// Multiples that a search of activation scales tries; handed over by value, so that a call copies nothing.
constexpr int kMostMultiples = 8;
struct ActivationGrids {
  float pair[kMostMultiples];  // of the pair rule; for ovp8 of three sigma
  int pair_count;
  float plain[kMostMultiples];  // not tried where the codebook has no plain levels
  int plain_count;
};

struct ActivationSource {
  const void* data;  // [M, K], aligned to two values
  Float type;
  int64_t m, k;
  ActivationFormat format;
  int group_size;  // 32, 64, 128; -1 per row; 0: static_scale
  bool paper_pairing;
  const int8_t* codebook;       // [32] for ovp4, else nullptr
  const int16_t* static_scale;  // [1] for group_size 0, else nullptr
  ActivationGrids grids;
};

struct ActivationLevels {
  // For products: int8 [M, 64 ceil(K / 64)] in the order of core/fragments.h, zeros past K, and scales [G, pitch] of
  // which the first M are written. Else [M, K] of `type` and scales [M, G]. Levels are aligned to two of them.
  bool for_products;
  void* levels;
  LevelType type;
  float* scale;
  int64_t scale_pitch;
};

// Levels and scales of activations; a group (a row, where the scale is given) with NaN or Inf gets levels 0 and scale
// NaN. Levels must fit the type.
void quantize_activations(const ActivationSource& x, const ActivationLevels& to, uintptr_t stream);

// What launches are fitted to.
struct Device {
  int index;
  int multiprocessors;
  int capability;            // 10 major + minor, of the code that runs: that of its PTX, at most the GPU's
  bool clusters;             // whether blocks can add up through each other's shared memory
  int shared_per_block;      // bytes a block may ask for
  int shared_per_processor;  // bytes the blocks of a multiprocessor share
};
Device device(int index);

// Why a device cannot run this module's kernels, in words; empty if it can.
std::string unsupported(int device);

}  // namespace olive::cuda
