// What each instruction set provides, and the structures the kernels share. Nothing here knows Torch or Python.
#pragma once

#include <cstdint>

#include "core/floats.h"
#include "core/ovp.h"
#include "cpu/training.h"

namespace olive {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_vnni = 3, amx = 4 };
constexpr int kIsaCount = 5;

// Activation rows per call of a kernel: their float32 sums (96 x 32) and their share of the digits stay in cache, and
// decoding a block of weights is a few per cent of multiplying it.
constexpr int kTileRows = 96;
constexpr int kPackRows = 16;    // rows interleaved in a packed block
constexpr int kPackColumns = 8;  // columns in one 32-bit lane of it
constexpr int kVectorBytes = 64;
constexpr int kLanes = 16;    // of the vectors in lanes.h
constexpr int kOffset = 128;  // byte kernels hold a weight as the unsigned byte level + 128

// One weight [N, K] and its activations [M, K], packed for the kernels.
//
// Activations are integers. Quantized ones are int8 levels: one digit. Others are block fixed-point numbers: per row
// and block of columns, x ~ q * scale with the scale a power of two. bfloat16 and float16 take q of 15 bits,
// |q| <= 2^14: two digits; float32 takes 23 bits, q = 256 * q15 + rest: three. q15 is held as one 16-bit word, or as
// two signed bytes, q15 = 256 * high + low; `rest` likewise as a word or a byte; a level as a word, or as `low`. In
// every run of 8 columns the even ones come first: 0 2 4 6 1 3 5 7, as the nibbles of a packed vector decode. Digits
// are laid out [blocks, padded, block]: rows that are multiplied together are neighbours. (Rows K bytes apart would
// share the sets of the first-level cache whenever K is a multiple of 4096.)
struct Activations {
  int64_t rows;          // M
  int64_t padded;        // rows allocated: M, or a multiple of 16 for tiles
  int64_t columns;       // K padded to whole blocks
  int block;             // columns per block: 32, 64 or 128
  int digits;            // 1: levels, 2: 15 bits, 3: 23 bits
  bool one_sum;          // levels with one scale per row, and one scale per row of the weight: sums go over all of K
  int16_t* words;        // word kernels: q15 or level
  int16_t* rest;         // word kernels, 3 digits
  int8_t* high;          // byte kernels, 2 and 3 digits
  int8_t* low;           // byte kernels
  int8_t* rest8;         // byte kernels, 3 digits
  float* scale;          // [blocks, padded]; 1 where there is a row_scale
  float* row_scale;      // [padded] levels with one scale per row: applied in the end; else nullptr
  int32_t* offset;       // [blocks, padded] byte kernels: -128 * sum of q15, which takes off what weights + 128 add
  int32_t* rest_offset;  // [blocks, padded] likewise of rest; 3 digits
  int64_t blocks() const { return columns / block; }
  int64_t index(int64_t row, int64_t of_block) const { return of_block * padded + row; }
  int64_t at(int64_t row, int64_t of_block) const { return index(row, of_block) * block; }
};

struct Linear {
  Activations x;
  const uint8_t* codes;  // packed [ceil(N / 16), K' / 8, 64]
  const int16_t* scale;  // packed [ceil(N / 16), groups, 16]
  int64_t groups;        // scales per row
  int64_t group_blocks;  // blocks that share a scale; ignored where groups is 1
  int64_t n;             // N
  Codebook book;
  const void* bias;  // [N], nullptr = no bias
  Float bias_type;
  void* out;  // [M, N]
  Float out_type;
  int64_t row_blocks() const { return (n + kPackRows - 1) / kPackRows; }
  const int16_t* block_scale(int64_t row_block, int64_t block) const {
    return scale + (row_block * groups + (groups == 1 ? 0 : block / group_blocks)) * kPackRows;
  }
};

// Candidates of a scale search, see ops/reference.py for the definition.
struct Search {
  const float* pair_grid;
  int pair_count;
  const float* plain_grid;
  int plain_count;
  bool paper_pairing;
  const float* importance;  // [K], nullptr = all alike
};

struct Weight {
  const void* data;  // [N, K]
  Float type;
  int64_t n, k;
  int group_size;  // -1 per channel, 0 per tensor
  int64_t groups() const { return group_size <= 0 ? 1 : (k + group_size - 1) / group_size; }
  int64_t pairs() const { return (k + 1) / 2; }
};

// How activations become levels, see ops/reference_quantized.py for the definition.
enum class Levels : int { int8 = 0, ovp4 = 1, ovp8 = 2 };

struct ActivationFormat {
  Levels levels;
  int group_size;               // -1 per token, else columns per group; static scales: 0
  const int16_t* static_scale;  // nullptr = dynamic
  Codebook book;                // ovp4
  Search search;                // ovp4: grids of both rules; ovp8: pair_grid
};

// A row-major activation [M, K] to quantize.
struct ActivationSource {
  const void* data;
  Float type;
  int64_t rows, k;
  ActivationFormat format;
  int64_t width() const { return format.group_size <= 0 ? k : format.group_size; }
  int64_t groups() const { return (k + width() - 1) / width(); }
};

// Canonical levels and scales: what the operator quantize_activations returns.
struct LevelTarget {
  void* levels;  // [M, K]
  int type;      // a Float, or kInt8
  float* scale;  // [M, groups]
};
constexpr int kInt8 = 3;

// A weight of eight bits, canonical: a byte per value, pairs of two bytes.
struct Linear8 {
  const float* x;        // [M, x_stride], zeros past K
  int64_t m, x_stride;   // x_stride: K rounded up to whole lanes
  const uint8_t* codes;  // [N, 2 ceil(K / 2)]
  const int16_t* scale;  // [N or 1, groups]
  int64_t n, k;
  int group_size;
  const void* bias;  // [N], nullptr = no bias
  Float bias_type;
  void* out;  // [M, N]
  Float out_type;
};

// A run of columns to round with error compensation, row-major; see ops/compensate.py for the definition.
struct Compensation {
  const float* values;     // [rows, columns], columns even
  const int16_t* scale;    // [rows, scales_per_row]
  int64_t scales_per_row;  // 1, or one per pair
  const float* factor;     // U [columns, columns], upper
  int64_t rows, columns;
  Codebook book;
  uint8_t* codes;  // [rows, columns / 2]
  float* errors;   // [rows, columns]
  float* loss;     // [rows]
};

// Weights of integer codes on a uniform grid: cpu/uniform.h.
struct UniformInput;
struct UniformLinear;
struct UniformSource;

struct Kernels {
  // Convert rows [begin, end) of x [M, K]; rows past M become zero.
  void (*convert_rows)(const Activations& to, const void* x, Float type, int64_t k, int64_t begin, int64_t end);
  // Outputs [m_begin, m_end) x rows of the weight in row blocks [begin, end).
  void (*linear)(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end);
  // Quantize rows [begin, end) of an activation into the order of `linear`; rows past M become zero.
  void (*quantize_rows)(const Activations& to, const ActivationSource&, int64_t begin, int64_t end);
  // The same into the canonical order.
  void (*level_rows)(const LevelTarget& to, const ActivationSource&, int64_t begin, int64_t end);
  bool bytes;            // activations as bytes, else as words
  int level_bytes_rows;  // up to so many rows levels are bytes, whatever `bytes` says
  int tile_rows;         // activation rows are padded to a multiple of this where there are more than four
  // Search scales for rows [begin, end) and encode them; false = a value is not finite. Not for per-tensor scales.
  bool (*search_rows)(const Weight&, const Codebook&, const Search&, int64_t begin, int64_t end, uint8_t* codes,
                      int16_t* scale);
  // Largest magnitude and sum of squares of one row; false = a value is not finite.
  bool (*row_statistics)(const Weight&, int64_t row, float* largest, double* energy);
  // errors[candidate] of one row for the given base scales (per-tensor search).
  void (*row_errors)(const Weight&, const Codebook&, const Search&, int64_t row, float pair_base, float plain_base,
                     double* errors);
  // Encode rows [begin, end) with scales given; importance as in Search.
  void (*encode_rows)(const Weight&, const Codebook&, bool paper_pairing, const float* importance, const int16_t* scale,
                      int64_t begin, int64_t end, uint8_t* codes);
  // Decode rows [begin, end) of canonical codes to [N, K].
  void (*decode_rows)(const uint8_t* codes, const int16_t* scale, const Codebook&, int64_t k, int group_size,
                      int64_t begin, int64_t end, void* out, Float type);
  // Round rows [begin, end).
  void (*compensate_rows)(const Compensation&, int64_t begin, int64_t end);
  // Eight bits, likewise. search8_rows: not for per-tensor scales; row8_errors: errors[candidate] for `scales`.
  bool (*search8_rows)(const Weight&, const Search&, int64_t begin, int64_t end, uint8_t* codes, int16_t* scale);
  void (*row8_errors)(const Weight&, bool paper_pairing, int64_t row, const float* scales, int count, double* errors);
  void (*encode8_rows)(const Weight&, bool paper_pairing, const int16_t* scale, int64_t begin, int64_t end,
                       uint8_t* codes);
  void (*decode8_rows)(const uint8_t* codes, const int16_t* scale, int64_t k, int group_size, int64_t begin,
                       int64_t end, void* out, Float type);
  // Rows [begin, end) of x [M, K] to float32 [M, stride], zeros past K.
  void (*float_rows)(const void* x, Float type, int64_t k, int64_t stride, int64_t begin, int64_t end, float* to);
  // Outputs [m_begin, m_end) x rows of the weight [begin, end).
  void (*linear8)(const Linear8&, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end);
  // Rows [begin, end) of a weight in training.
  void (*statsq_rows)(const StatsQ&, int64_t begin, int64_t end);
  void (*oscillation_rows)(const Oscillation&, int64_t begin, int64_t end);
  // `count` values from `at` with one scale; backward: their sum for its gradient.
  void (*lsq_run)(const Lsq&, int64_t at, int64_t count, float scale);
  double (*lsq_run_backward)(const Lsq&, int64_t at, int64_t count, float scale);
  // Rows [begin, end) with a scale per column, whole lanes of them; backward: adds to the columns' sums, likewise.
  void (*lsq_rows)(const Lsq&, int64_t columns, const float* scale, int64_t begin, int64_t end);
  void (*lsq_rows_backward)(const Lsq&, int64_t columns, const float* scale, int64_t begin, int64_t end, double* sums);
  // Convert or quantize rows [begin, end) of an activation for `uniform_linear`.
  void (*uniform_rows)(const UniformInput& to, const UniformSource&, int64_t begin, int64_t end);
  // Outputs [m_begin, m_end) x rows of the weight [begin, end).
  void (*uniform_linear)(const UniformLinear&, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end);
};

// Defined once per instruction set, in namespaces of the same name; on x86 only, but for the first.
namespace portable {
Kernels kernels();
}
namespace avx2 {
Kernels kernels();
}
namespace avx512 {
Kernels kernels();
}
namespace avx512_vnni {
Kernels kernels();
}
namespace amx {
Kernels kernels();
}

}  // namespace olive
