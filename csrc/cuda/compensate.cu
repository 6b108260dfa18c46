// Rounds a run of columns with error compensation: a thread takes a row, a block of one warp 32 of them.
//
// The definition is olive/ops/compensate.py. Sums are fused here and not there, so the last bits differ, and with them
// now and then a code whose value lay on a threshold. Beside a value that is a level exactly, another neighbour is
// tried.
//
// Every pair waits for the one before it. Counted: a warp takes some 800 clocks for a pair's four candidates, and 5
// instructions for each column that it moves: 64 pairs of 128 columns in about 75,000 clocks, whatever N is up to the
// 16,896 rows that an H100 has schedulers for. Rows lie side by side in shared memory, so that a warp's accesses
// never meet in a bank; the factor is the same for all of them and comes from the first-level cache.
#include "core/encode.h"
#include "cuda/api.h"
#include "cuda/runtime.cuh"

namespace olive::cuda {
namespace {

constexpr int kRows = 32;
constexpr int kPitch = kRows + 1;  // rows are read along columns and along rows

struct PairFactor {
  float even, odd;  // 1 / U[i, i], 1 / U[i + 1, i + 1]
  float off;        // U[i, i + 1]
  float share;      // of the odd column's loss that the even one takes over, in units of the odd column
};

struct Scale {
  float value, inverse;
  bool plain;
};

// What a candidate makes of a pair.
struct Rounded {
  float even, odd;  // errors e
  int byte;
  __device__ float loss() const { return even * even + odd * odd; }
};

__device__ __forceinline__ Rounded better(const Rounded& one, const Rounded& other) {
  return other.loss() < one.loss() ? other : one;
}

// A level of the pair rule's tables: its index there, and its value with the sign of t.
struct Level {
  int index;
  float value;

  __device__ __forceinline__ Level(const EncodeTables& tables, LevelTable table, int at, float t)
      : index(at), value(copysignf(tables.level[table][at], t)) {}

  // The identifier is minus zero: zero has no sign.
  __device__ __forceinline__ int nibble() const { return index | (value < 0.0f ? 8 : 0); }
};

__device__ __forceinline__ int nearest_entry(const EncodeTables& tables, LevelTable table, float t) {
  return tables.nibble[table][kHalfZero + half_steps(fminf(t, kMost))];
}

__device__ __forceinline__ Level nearest_level(const EncodeTables& tables, LevelTable table, float t) {
  return {tables, table, nearest_entry(tables, table, fabsf(t)) & 7, t};
}

// The nearest on the other side of t, where there is one.
__device__ __forceinline__ Level level_beside(const EncodeTables& tables, const Level& nearest, float t) {
  const int index = nearest.index + (fabsf(t) > fabsf(nearest.value) ? 1 : -1);
  return {tables, kNormal, index < 0 ? 0 : index > 7 ? 7 : index, t};
}

__device__ __forceinline__ Rounded round_by_pair(const EncodeTables& tables, float x, float y, const Scale& scale,
                                                 const PairFactor& factor) {
  const auto even_error = [&](float level) { return (x - level * scale.value) * factor.even; };
  const auto odd_value = [&](float even) { return y - even * factor.off; };
  const auto odd_error = [&](float rest, float level) { return (rest - level * scale.value) * factor.odd; };

  const float t = x * scale.inverse;
  const auto normals = [&](const Level& level) -> Rounded {
    const float even = even_error(level.value), rest = odd_value(even);
    const Level other = nearest_level(tables, kNormal, rest * scale.inverse);
    return {even, odd_error(rest, other.value), level.nibble() | other.nibble() << 4};
  };
  const Level near = nearest_level(tables, kNormal, t);
  Rounded best = better(normals(near), normals(level_beside(tables, near, t)));

  const Level outlier = nearest_level(tables, kOutlier, (x - y * factor.share) * scale.inverse);
  const float kept = even_error(outlier.value);
  best = better(best, {kept, odd_error(odd_value(kept), 0.0f), outlier.nibble() | kIdentifier << 4});

  const float lost = even_error(0.0f), rest = odd_value(lost);
  const Level other = nearest_level(tables, kOutlier, rest * scale.inverse);
  return better(best, {lost, odd_error(rest, other.value), kIdentifier | other.nibble() << 4});
}

__device__ __forceinline__ Rounded round_plain(const EncodeTables& tables, float x, float y, const Scale& scale,
                                               const PairFactor& factor) {
  const auto nearest = [&](float value) { return nearest_entry(tables, kPlain, fmaxf(value * scale.inverse, kLeast)); };
  const int low = nearest(x);
  const float even = (x - tables.level[kPlain][low] * scale.value) * factor.even;
  const float rest = y - even * factor.off;
  const int high = nearest(rest);
  return {even, (rest - tables.level[kPlain][high] * scale.value) * factor.odd, low | high << 4};
}

// The factor of the pair of columns `even` and `even + 1`.
__device__ __forceinline__ PairFactor factor_of(const float* row, int64_t columns) {
  const float a = row[0], b = row[1], c = row[columns + 1];
  return {1.0f / a, 1.0f / c, b, a * b / (b * b + c * c)};
}

__device__ __forceinline__ Scale scale_of(const Compensation& run, int64_t at) {
  const int16_t stored = run.scale[at];
  const float value = scale_value(stored);
  return {value, 1.0f / value, scale_is_plain(stored)};
}

// One row, whose columns stand kPitch apart and are replaced by their errors.
__device__ __forceinline__ void compensate_row(const EncodeTables& tables, const Compensation& run, int64_t row,
                                               float* column) {
  const int columns = static_cast<int>(run.columns), pairs = columns / 2;
  const bool by_pair = run.scales_per_row > 1;
  Scale scale = scale_of(run, row * run.scales_per_row);
  float loss = 0.0f;
  for (int pair = 0; pair < pairs; ++pair) {
    if (by_pair && pair > 0) scale = scale_of(run, row * pairs + pair);
    const int even = 2 * pair;
    const float* factor = run.factor + static_cast<int64_t>(even) * columns + even;  // aligned to two: even columns
    const PairFactor pair_factor = factor_of(factor, columns);
    float* at = column + even * kPitch;
    const float x = at[0], y = at[kPitch];
    const Rounded found =
        scale.plain ? round_plain(tables, x, y, scale, pair_factor) : round_by_pair(tables, x, y, scale, pair_factor);
    loss += found.loss();
    at[0] = found.even, at[kPitch] = found.odd;
    run.codes[row * pairs + pair] = static_cast<uint8_t>(found.byte);
#pragma unroll 4
    for (int k = 2; k < columns - even; k += 2) {
      const float2 first = *reinterpret_cast<const float2*>(factor + k);
      const float2 second = *reinterpret_cast<const float2*>(factor + columns + k);
      float* later = at + k * kPitch;
      later[0] -= found.even * first.x + found.odd * second.x;
      later[kPitch] -= found.even * first.y + found.odd * second.y;
    }
  }
  run.loss[row] = loss;
}

__global__ void __launch_bounds__(kRows) ovp_compensate_kernel(Compensation run) {
  OLIVE_SHARED(memory);
  auto& tables = *reinterpret_cast<EncodeTables*>(memory);
  auto* column = reinterpret_cast<float*>(memory + sizeof(EncodeTables));  // [columns, kPitch]
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const int rows = static_cast<int>(run.rows - first < kRows ? run.rows - first : kRows);
  const int columns = static_cast<int>(run.columns);
  fill_encode_tables(&tables, run.codebook, lane, kRows);
  for (int row = 0; row < rows; ++row) {
    const float* from = run.values + (first + row) * columns;
    for (int k = lane; k < columns; k += kRows) column[k * kPitch + row] = from[k];
  }
  __syncthreads();
  if (lane < rows) compensate_row(tables, run, first + lane, column + lane);
  __syncthreads();
  for (int row = 0; row < rows; ++row) {
    float* to = run.errors + (first + row) * columns;
    for (int k = lane; k < columns; k += kRows) to[k] = column[k * kPitch + row];
  }
}

static_assert(sizeof(EncodeTables) % sizeof(float) == 0, "columns follow the tables");

constexpr int64_t kColumnBytes = kPitch * sizeof(float);

}  // namespace

int64_t most_compensated_columns(int shared_per_block) {
  return (shared_per_block - static_cast<int64_t>(sizeof(EncodeTables))) / kColumnBytes / 2 * 2;
}

void ovp_compensate(const Compensation& run, uintptr_t stream) {
  const auto shared = sizeof(EncodeTables) + static_cast<std::size_t>(run.columns * kColumnBytes);
  const auto blocks = static_cast<unsigned>((run.rows + kRows - 1) / kRows);
  launch("ovp_compensate", ovp_compensate_kernel, Launch{blocks, 1, kRows, shared, 1, stream}, run);
}

}  // namespace olive::cuda
