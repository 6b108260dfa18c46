// The operators of training, in parallel. Sums are added in an order that does not depend on the number of threads.
#include <cmath>
#include <vector>

#include "cpu/api.h"
#include "cpu/parallel.h"

namespace olive {
namespace {

constexpr float kLeastScale = 1e-5f;  // olive/ops/lsq.py, LEAST_SCALE
constexpr int64_t kChunk = 16384;     // values of a long run that a thread takes at once
// Shorter runs lie side by side as the columns of a row: each run has its own end, which is slow, and its own call.
constexpr int64_t kShortRun = 64;
constexpr int64_t kMaxBlocks = 64;  // of rows with partial sums per column: bounds their memory

// The scales that count, one for each column of a row where runs are short.
std::vector<float> lsq_scales(const LsqArguments& arguments, int64_t repeats) {
  const int64_t columns = arguments.size * repeats;
  std::vector<float> used(static_cast<size_t>((columns + kLanes - 1) / kLanes * kLanes), 1.0f);
  for (int64_t i = 0; i < columns; ++i) {
    const float scale = arguments.scale[i / repeats];
    used[i] = scale < kLeastScale ? kLeastScale : scale;
  }
  return used;
}

bool has_short_runs(const LsqArguments& arguments) { return arguments.size > 1 && arguments.inner < kShortRun; }

// Long runs, cut into chunks: unit u is chunk u mod chunks of run u / chunks, whose scale is that modulo the scales.
struct Chunks {
  int64_t inner, per_run, units, turn;
  explicit Chunks(const LsqArguments& arguments)
      : inner(arguments.inner),
        per_run((inner + kChunk - 1) / kChunk),
        units(arguments.outer * arguments.size * per_run),
        turn(rows_per_turn(std::min(inner, kChunk))) {}
  int64_t at(int64_t unit) const { return unit / per_run * inner + unit % per_run * kChunk; }
  int64_t count(int64_t unit) const { return std::min(kChunk, inner - unit % per_run * kChunk); }
  int64_t scale(int64_t unit, int64_t scales) const { return unit / per_run % scales; }
};

}  // namespace

void statsq(Isa isa, const StatsQ& q) {
  const Kernels& kernels = kernels_for(isa);
  for_rows(q.weight.n, rows_per_turn(q.weight.k),
           [&](int64_t begin, int64_t end) { kernels.statsq_rows(q, begin, end); });
}

void lsq(Isa isa, const LsqArguments& arguments) {
  const Kernels& kernels = kernels_for(isa);
  if (arguments.outer * arguments.size * arguments.inner == 0) return;
  if (has_short_runs(arguments)) {
    const std::vector<float> scale = lsq_scales(arguments, arguments.inner);
    const int64_t columns = arguments.size * arguments.inner;
    for_rows(arguments.outer, rows_per_turn(columns), [&](int64_t begin, int64_t end) {
      kernels.lsq_rows(arguments.values, columns, scale.data(), begin, end);
    });
    return;
  }
  const std::vector<float> scale = lsq_scales(arguments, 1);
  const Chunks chunks(arguments);
  for_rows(chunks.units, chunks.turn, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.lsq_run(arguments.values, chunks.at(i), chunks.count(i), scale[chunks.scale(i, arguments.size)]);
    }
  });
}

void lsq_backward(Isa isa, const LsqArguments& arguments, float* grad_scale) {
  const Kernels& kernels = kernels_for(isa);
  const int64_t per_scale = arguments.outer * arguments.inner;
  std::vector<double> total(static_cast<size_t>(arguments.size), 0.0);
  if (arguments.size * per_scale != 0 && has_short_runs(arguments)) {
    const std::vector<float> scale = lsq_scales(arguments, arguments.inner);
    const int64_t columns = arguments.size * arguments.inner, padded = static_cast<int64_t>(scale.size());
    const int64_t rows = std::max((arguments.outer + kMaxBlocks - 1) / kMaxBlocks, rows_per_turn(columns));
    const int64_t blocks = (arguments.outer + rows - 1) / rows;
    std::vector<double> sums(static_cast<size_t>(blocks * padded), 0.0);
    for_rows(arguments.outer, rows, [&](int64_t begin, int64_t end) {
      kernels.lsq_rows_backward(arguments.values, columns, scale.data(), begin, end, &sums[begin / rows * padded]);
    });
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t i = 0; i < columns; ++i) total[i / arguments.inner] += sums[block * padded + i];
    }
  } else if (arguments.size * per_scale != 0) {
    const std::vector<float> scale = lsq_scales(arguments, 1);
    const Chunks chunks(arguments);
    std::vector<double> sums(static_cast<size_t>(chunks.units));
    for_rows(chunks.units, chunks.turn, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float used = scale[chunks.scale(i, arguments.size)];
        sums[i] = kernels.lsq_run_backward(arguments.values, chunks.at(i), chunks.count(i), used);
      }
    });
    for (int64_t i = 0; i < chunks.units; ++i) total[chunks.scale(i, arguments.size)] += sums[i];
  }
  const double shared = static_cast<double>(std::max<int64_t>(1, per_scale));
  const double norm = std::sqrt(static_cast<double>(arguments.values.qmax) * shared);
  for (int64_t i = 0; i < arguments.size; ++i) grad_scale[i] = static_cast<float>(total[i] / norm);
}

void oscillation(Isa isa, const Oscillation& q) {
  const Kernels& kernels = kernels_for(isa);
  for_rows(q.weight.n, rows_per_turn(q.weight.k),
           [&](int64_t begin, int64_t end) { kernels.oscillation_rows(q, begin, end); });
}

}  // namespace olive
