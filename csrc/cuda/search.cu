// Searches a scale and a rule per group and encodes: docs/format.md, sections 7 and 8, to the last bit.
//
// Compile with -fmad=false: the format's products and sums are rounded one by one.
//
// Arithmetic sets the pace: each value is encoded once per candidate, 113 times by default (51 + 62). A value and
// candidate take 14 instructions in groups of 128 (counted in the code for sm_90: product, clamps, half steps, two
// look-ups, difference, two products, sums and their folding), and about 15 more where the warp meets an outlier. At
// 128 lane instructions and 32 lane look-ups per clock a multiprocessor does 7 to 9 of them: 7e9 weights take 0.4 to
// 0.6 s on 132 multiprocessors at 1.75 GHz. Comparing with 7 or 15 thresholds instead, at half rate, would take 1.2 s.
#include "core/encode.h"
#include "core/fragments.h"
#include "cuda/api.h"
#include "cuda/runtime.cuh"
#include "cuda/scale_search.cuh"

namespace olive::cuda {
namespace {

// ---- values -------------------------------------------------------------------------------------------------

__device__ __forceinline__ Pair load_values(const WeightSource& weight, int64_t row, int64_t column) {
  const int64_t index = row * weight.k + column;
  return {column < weight.k ? load_float(weight.data, index, weight.type) : 0.0f,
          column + 1 < weight.k ? load_float(weight.data, index + 1, weight.type) : 0.0f};
}

__device__ __forceinline__ Pair load_importance(const float* importance, int64_t k, int64_t column) {
  if (importance == nullptr) return {1.0f, 1.0f};
  return {column < k ? importance[column] : 0.0f, column + 1 < k ? importance[column + 1] : 0.0f};
}

// ---- groups of 32, 64 or 128 columns -----------------------------------------------------------------------------

constexpr int kGroupThreads = 128;

template <int kPairs>  // per lane
__global__ void __launch_bounds__(kGroupThreads) search_groups_kernel(WeightSource weight, Search search,
                                                                      uint8_t* __restrict__ codes,  // [N, ceil(K / 2)]
                                                                      int16_t* __restrict__ scale,  // [N, G]
                                                                      int32_t* not_finite) {        // [1]
  OLIVE_SHARED(memory);
  auto& tables = *reinterpret_cast<EncodeTables*>(memory);
  fill_encode_tables(&tables, weight.codebook, static_cast<int>(threadIdx.x), kGroupThreads);
  __syncthreads();

  constexpr int64_t kWidth = 2 * kLanes * kPairs;
  const int lane = lane_of_half();
  const int64_t groups = group_count(weight.k, kWidth);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kGroupThreads / kLanes) + half_of_block();
  const bool is_group = index < weight.n * groups;  // the other half of the warp needs this one's shuffles
  const int64_t row = index / groups, first = is_group ? index % groups * kWidth : weight.k;
  Pair values[kPairs], importance[kPairs];
  Statistics statistics;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int64_t column = first + 2 * (lane + kLanes * j);
    values[j] = load_values(weight, row, column);
    importance[j] = load_importance(search.importance, weight.k, column);
    statistics.add(values[j]);
  }
  const float largest = fold_largest(statistics.largest);
  const double energy = fold(statistics.energy);
  const int64_t count = weight.k - first < kWidth ? weight.k - first : kWidth;
  const Bases bases = base_scales(tables, largest, energy, static_cast<double>(count));
  if (!statistics.finite) atomicOr(not_finite, 1);

  Best best;
  search_group<false>(tables, weight.paper_pairing, search, values, importance, bases.pair, best);
  if (tables.has_plain) {
    search_group<true>(tables, weight.paper_pairing, search, values, importance, bases.plain, best);
  }
  best = best_of_half(best);
  if (!is_group) return;
  const auto stored = static_cast<int16_t>(largest < kTiny ? Best().stored : best.stored);
  const float inverse = 1.0f / scale_value(stored);
  if (lane == 0) scale[index] = stored;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int64_t column = first + 2 * (lane + kLanes * j);
    if (column >= weight.k) continue;
    codes[row * ((weight.k + 1) / 2) + column / 2] =
        encode(tables, scale_is_plain(stored), weight.paper_pairing, values[j], inverse, importance[j]).byte;
  }
}

// ---- rows: a block to each, its half warps share the candidates -------------------------------------------------

constexpr int kRowThreads = 256;
constexpr int kHalves = kRowThreads / kLanes;
constexpr int kAtOnce = 4;  // candidates per walk along the row: loads and conversions are shared

struct RowShared {
  EncodeTables tables;
  Best best[kHalves];
};

// Calls visit(column) for this lane's pairs of columns first .. first + 1023 of K, in order.
template <class Visit>
__device__ __forceinline__ void for_lane_pairs(int64_t k, int64_t first, Visit visit) {
  const int64_t end = first + kChunk < k ? first + kChunk : k;
  for (int64_t column = first + 2 * lane_of_half(); column < end; column += 2 * kLanes) visit(column);
}

struct RowStatistics {
  float largest;
  double energy;
  bool finite;  // this lane's values
};

// By half a warp, for each of its lanes.
__device__ RowStatistics row_statistics(const WeightSource& weight, int64_t row) {
  Statistics statistics;
  double energy = 0.0;
  for (int64_t first = 0; first < weight.k; first += kChunk) {
    statistics.energy = 0.0f;
    for_lane_pairs(weight.k, first, [&](int64_t column) { statistics.add(load_values(weight, row, column)); });
    energy += fold(statistics.energy);
  }
  return {fold_largest(statistics.largest), energy, statistics.finite};
}

// Calls tell(candidate, scale, sum of the row's pair errors) for every candidate of a rule, from all lanes of the half
// warp that had it.
template <bool kPlain, class Tell>
__device__ __forceinline__ void search_row(const EncodeTables& tables, const WeightSource& weight, const Search& search,
                                           int64_t row, float base, Tell tell) {
  const int count = candidate_count(search, kPlain);
  // The two halves of a warp go round together: they shuffle.
  for (int first = half_of_block() / 2 * 2 * kAtOnce; first < count; first += kHalves * kAtOnce) {
    const int own = first + half_of_block() % 2 * kAtOnce;
    float scale[kAtOnce], inverse[kAtOnce];
    double total[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      scale[i] = own + i < count ? candidate_scale(search, kPlain, base, own + i) : 1.0f;
      inverse[i] = 1.0f / scale[i];
      total[i] = 0.0;
    }
    for (int64_t start = 0; start < weight.k; start += kChunk) {
      float sum[kAtOnce] = {};
      for_lane_pairs(weight.k, start, [&](int64_t column) {
        const Pair values = load_values(weight, row, column);
        const Pair importance = load_importance(search.importance, weight.k, column);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          sum[i] += encode(tables, kPlain, weight.paper_pairing, values, inverse[i], importance).error;
        }
      });
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) total[i] += fold(sum[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (own + i < count) tell(own + i, scale[i], total[i]);
    }
  }
}

// By the whole block.
__device__ __forceinline__ void encode_row(const EncodeTables& tables, const WeightSource& weight,
                                           const float* importance, int64_t row, int16_t stored, uint8_t* codes) {
  const float inverse = 1.0f / scale_value(stored);
  for (int64_t column = 2 * threadIdx.x; column < weight.k; column += 2 * kRowThreads) {
    codes[row * ((weight.k + 1) / 2) + column / 2] =
        encode(tables, scale_is_plain(stored), weight.paper_pairing, load_values(weight, row, column), inverse,
               load_importance(importance, weight.k, column))
            .byte;
  }
}

// The best of the block's half warps, for all threads.
__device__ __forceinline__ Best best_of_block(RowShared& shared, const Best& best) {
  if (lane_of_half() == 0) shared.best[half_of_block()] = best;
  __syncthreads();
  Best least;
  for (int i = 0; i < kHalves; ++i) least.offer(shared.best[i]);
  return least;
}

__global__ void __launch_bounds__(kRowThreads) search_rows_kernel(WeightSource weight, Search search,
                                                                  uint8_t* __restrict__ codes,  // [N, ceil(K / 2)]
                                                                  int16_t* __restrict__ scale,  // [N, 1]
                                                                  int32_t* not_finite) {        // [1]
  OLIVE_SHARED(memory);
  auto& shared = *reinterpret_cast<RowShared*>(memory);
  const EncodeTables& tables = shared.tables;
  fill_encode_tables(&shared.tables, weight.codebook, static_cast<int>(threadIdx.x), kRowThreads);
  __syncthreads();

  const int64_t row = blockIdx.x;
  const RowStatistics statistics = row_statistics(weight, row);  // each half warp for itself: a fraction of a candidate
  if (!statistics.finite) atomicOr(not_finite, 1);
  const Bases bases = base_scales(tables, statistics.largest, statistics.energy, static_cast<double>(weight.k));
  Best best;
  if (statistics.largest >= kTiny) {
    search_row<false>(tables, weight, search, row, bases.pair, [&](int candidate, float tried, double sum) {
      best.offer(attempt(search, false, tried, candidate, sum));
    });
    if (tables.has_plain) {
      search_row<true>(tables, weight, search, row, bases.plain, [&](int candidate, float tried, double sum) {
        best.offer(attempt(search, true, tried, candidate, sum));
      });
    }
  }
  const auto stored = static_cast<int16_t>(best_of_block(shared, best).stored);
  if (threadIdx.x == 0) scale[row] = stored;
  encode_row(tables, weight, search.importance, row, stored, codes);
}

// ---- one scale for all: rows leave their sums in scratch, which are then added first row to last ------------------
//
// scratch [N, 2 + candidates]: largest magnitude, energy, sums of pair errors. Row 0's first two become the tensor's.

__device__ __forceinline__ int64_t scratch_width(const Search& search) {
  return 2 + candidate_count(search, false) + candidate_count(search, true);
}

__device__ __forceinline__ double sum_of_rows(const Search& search, int64_t n, int64_t at) {
  double total = 0.0;
#pragma unroll 8
  for (int64_t row = 0; row < n; ++row) total += search.scratch[row * scratch_width(search) + at];
  return total;
}

__device__ __forceinline__ Bases tensor_bases(const EncodeTables& tables, const WeightSource& weight,
                                              const Search& search) {
  return base_scales(tables, static_cast<float>(search.scratch[0]), search.scratch[1],
                     static_cast<double>(weight.n) * static_cast<double>(weight.k));
}

// Half a warp per row.
__global__ void __launch_bounds__(kRowThreads)
    tensor_statistics_kernel(WeightSource weight, Search search, int32_t* not_finite) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kHalves + half_of_block();
  const int64_t last = weight.n - 1;
  const RowStatistics statistics = row_statistics(weight, row < last ? row : last);  // both halves shuffle
  if (!statistics.finite) atomicOr(not_finite, 1);
  if (row > last || lane_of_half() != 0) return;
  search.scratch[row * scratch_width(search)] = statistics.largest;
  search.scratch[row * scratch_width(search) + 1] = statistics.energy;
}

// One thread.
__global__ void combine_statistics_kernel(WeightSource weight, Search search) {
  const double energy = sum_of_rows(search, weight.n, 1);
  double largest = 0.0;
#pragma unroll 8
  for (int64_t row = 0; row < weight.n; ++row) {
    largest = fmax(largest, search.scratch[row * scratch_width(search)]);
  }
  search.scratch[0] = largest;
  search.scratch[1] = energy;
}

// A block per row.
__global__ void __launch_bounds__(kRowThreads, 4) tensor_errors_kernel(WeightSource weight, Search search) {
  OLIVE_SHARED(memory);
  auto& tables = *reinterpret_cast<EncodeTables*>(memory);
  fill_encode_tables(&tables, weight.codebook, static_cast<int>(threadIdx.x), kRowThreads);
  __syncthreads();

  const int64_t row = blockIdx.x;
  const Bases bases = tensor_bases(tables, weight, search);
  double* errors = search.scratch + row * scratch_width(search) + 2;
  const auto tell = [&](int candidate, double sum) {
    if (lane_of_half() == 0) errors[candidate] = sum;
  };
  search_row<false>(tables, weight, search, row, bases.pair,
                    [&](int candidate, float, double sum) { tell(candidate, sum); });
  if (tables.has_plain) {
    search_row<true>(tables, weight, search, row, bases.plain,
                     [&](int candidate, float, double sum) { tell(search.pair_count + candidate, sum); });
  }
}

// One block, a thread per candidate.
__global__ void __launch_bounds__(kRowThreads) pick_scale_kernel(WeightSource weight, Search search,
                                                                 int16_t* __restrict__ scale) {  // [1, 1]
  OLIVE_SHARED(memory);
  auto& shared = *reinterpret_cast<RowShared*>(memory);
  fill_encode_tables(&shared.tables, weight.codebook, static_cast<int>(threadIdx.x), kRowThreads);
  __syncthreads();

  const Bases bases = tensor_bases(shared.tables, weight, search);
  const int pair_count = candidate_count(search, false);
  const int count = pair_count + (shared.tables.has_plain ? candidate_count(search, true) : 0);
  Best best;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kRowThreads) {
    const bool plain = i >= pair_count;
    const int candidate = plain ? i - pair_count : i;
    const float tried = candidate_scale(search, plain, plain ? bases.plain : bases.pair, candidate);
    best.offer(attempt(search, plain, tried, candidate, sum_of_rows(search, weight.n, 2 + i)));
  }
  best = best_of_half(best);
  best = best_of_block(shared, best);
  if (threadIdx.x == 0) {
    scale[0] = static_cast<int16_t>(search.scratch[0] < kTiny ? Best().stored : best.stored);
  }
}

// A block per row.
__global__ void __launch_bounds__(kRowThreads)
    encode_rows_kernel(WeightSource weight,
                       const float* __restrict__ importance,  // [K], nullptr = all alike
                       const int16_t* __restrict__ scale,     // [1, 1]
                       uint8_t* __restrict__ codes) {         // [N, ceil(K / 2)]
  OLIVE_SHARED(memory);
  auto& tables = *reinterpret_cast<EncodeTables*>(memory);
  fill_encode_tables(&tables, weight.codebook, static_cast<int>(threadIdx.x), kRowThreads);
  __syncthreads();
  encode_row(tables, weight, importance, blockIdx.x, scale[0], codes);
}

// ---- launchers ----------------------------------------------------------------------------------------------

unsigned blocks_of(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <int kPairs>
void quantize_groups(const WeightSource& weight, const Search& search, uint8_t* codes, int16_t* scale,
                     int32_t* not_finite, uintptr_t stream) {
  const int64_t groups = weight.n * group_count(weight.k, weight.group_size);
  const Launch shape = {blocks_of(groups, kGroupThreads / kLanes), 1, kGroupThreads, sizeof(EncodeTables), 1, stream};
  launch("ovp_quantize", search_groups_kernel<kPairs>, shape, weight, search, codes, scale, not_finite);
}

void quantize_tensor(const WeightSource& weight, const Search& search, uint8_t* codes, int16_t* scale,
                     int32_t* not_finite, uintptr_t stream) {
  const unsigned rows = blocks_of(weight.n, 1);
  const auto shape = [&](unsigned blocks, unsigned threads, std::size_t shared) {
    return Launch{blocks, 1, threads, shared, 1, stream};
  };
  launch("ovp_quantize statistics", tensor_statistics_kernel, shape(blocks_of(weight.n, kHalves), kRowThreads, 0),
         weight, search, not_finite);
  launch("ovp_quantize combine", combine_statistics_kernel, shape(1, 1, 0), weight, search);
  launch("ovp_quantize errors", tensor_errors_kernel, shape(rows, kRowThreads, sizeof(EncodeTables)), weight, search);
  launch("ovp_quantize pick", pick_scale_kernel, shape(1, kRowThreads, sizeof(RowShared)), weight, search, scale);
  launch("ovp_quantize encode", encode_rows_kernel, shape(rows, kRowThreads, sizeof(EncodeTables)), weight,
         search.importance, scale, codes);
}

}  // namespace

void ovp_quantize(const WeightSource& weight, const Search& search, uint8_t* codes, int16_t* scale, int32_t* not_finite,
                  uintptr_t stream) {
  switch (weight.group_size) {
    case 32:
      return quantize_groups<1>(weight, search, codes, scale, not_finite, stream);
    case 64:
      return quantize_groups<2>(weight, search, codes, scale, not_finite, stream);
    case 128:
      return quantize_groups<4>(weight, search, codes, scale, not_finite, stream);
    case 0:
      return quantize_tensor(weight, search, codes, scale, not_finite, stream);
    case -1:
      return launch("ovp_quantize rows", search_rows_kernel,
                    Launch{blocks_of(weight.n, 1), 1, kRowThreads, sizeof(RowShared), 1, stream}, weight, search, codes,
                    scale, not_finite);
    default:
      throw std::invalid_argument("group_size: expected -1, 0, 32, 64 or 128, got " +
                                  std::to_string(weight.group_size));
  }
}

}  // namespace olive::cuda
