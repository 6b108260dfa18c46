// The search for a scale, as half a warp does it: docs/format.md, section 8, to the last bit. Compile without
// contraction.
//
// Half a warp, 16 lanes, is as wide as the ordered sum: a pair goes to the lane that adds it, and sums fold by shuffles
// (additions commute, so every lane of the half ends with the same bits).
#pragma once

#include "core/encode.h"
#include "cuda/api.h"
#include "cuda/ptx.cuh"

namespace olive::cuda {

constexpr int kLanes = 16;
constexpr int64_t kChunk = 1024;  // columns summed in float32 before the sum goes on in float64
constexpr unsigned kEveryLane = 0xFFFFFFFFu;

__device__ __forceinline__ int lane_of_half() { return static_cast<int>(threadIdx.x % kLanes); }
__device__ __forceinline__ int half_of_block() { return static_cast<int>(threadIdx.x / kLanes); }

// The sum over the lanes of a half warp, in each of them.
__device__ __forceinline__ float fold(float sum) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kEveryLane, sum, distance);
  return sum;
}

// ---- candidates ---------------------------------------------------------------------------------------------

__device__ __forceinline__ int candidate_count(const Search& search, bool plain) {
  return plain ? 2 * search.plain_count : search.pair_count;
}

// The rounded scale of a rule's candidate.
__device__ __forceinline__ float candidate_scale(const Search& search, bool plain, float base, int candidate) {
  if (!plain) return round_scale(base * search.pair_grid[candidate]);
  const float scale = round_scale(base * search.plain_grid[candidate / 2]);
  return candidate % 2 == 0 ? scale : -scale;
}

// The least error so far; of equal ones the earlier. Neither NaN nor infinity gets past the first, a scale of 1.
struct Best {
  double error = INFINITY;
  int order = -1;
  int stored = 0x3F80;

  __device__ void offer(const Best& other) {
    if (other.error < error || (other.error == error && other.order < order)) *this = other;
  }
};

// The best of the lanes of a half warp, in each of them.
__device__ __forceinline__ Best best_of_half(Best best) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const Best other = {__shfl_xor_sync(kEveryLane, best.error, distance),
                        __shfl_xor_sync(kEveryLane, best.order, distance),
                        __shfl_xor_sync(kEveryLane, best.stored, distance)};
    best.offer(other);
  }
  return best;
}

// sum: of the pair errors, in squared units of the scale.
__device__ __forceinline__ Best attempt(const Search& search, bool plain, float scale, int candidate, double sum) {
  const double wide = scale;
  return {sum * (wide * wide), candidate + (plain ? search.pair_count : 0), pack_scale(scale, plain)};
}

// ---- values -------------------------------------------------------------------------------------------------

struct Pair {
  float even, odd;
};

__device__ __forceinline__ PairCode encode(const EncodeTables& tables, bool plain, bool paper_pairing,
                                           const Pair& value, float inverse, const Pair& importance) {
  return encode_pair(tables, plain, paper_pairing, value.even * inverse, value.odd * inverse, importance.even,
                     importance.odd);
}

struct Statistics {
  float largest = 0.0f;
  float energy = 0.0f;
  bool finite = true;

  __device__ void add(const Pair& value) {
    energy += value.even * value.even + value.odd * value.odd;
    largest = fmaxf(largest, fmaxf(fabsf(value.even), fabsf(value.odd)));
    finite = finite && fabsf(value.even) < INFINITY && fabsf(value.odd) < INFINITY;
  }
};

// The largest over the lanes of a half warp, in each of them.
__device__ __forceinline__ float fold_largest(float largest) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kEveryLane, largest, distance));
  }
  return largest;
}

struct Bases {
  float pair, plain;
};

__device__ __forceinline__ float three_sigma(double energy, double count) {
  return static_cast<float>(3.0 * sqrt(energy / count));
}

__device__ __forceinline__ Bases base_scales(const EncodeTables& tables, float largest, double energy, double count) {
  return {fminf(largest, three_sigma(energy, count)) / tables.level[kNormal][7],
          largest / fmaxf(tables.level[kPlain][15], 1.0f)};
}

// ---- groups of 32, 64 or 128 columns: one to half a warp, its values in registers ------------------------------

// The best of one rule's candidates, each lane's share of them: candidate c belongs to lane c % 16, which does all that
// is done once per candidate (a division, the rounding, float64).
template <bool kPlain, int kPairs>
__device__ __forceinline__ void search_group(const EncodeTables& tables, bool paper_pairing, const Search& search,
                                             const Pair (&values)[kPairs], const Pair (&importance)[kPairs], float base,
                                             Best& best) {
  const int count = candidate_count(search, kPlain), lane = lane_of_half();
  for (int first = 0; first < count; first += kLanes) {
    const int turns = count - first < kLanes ? count - first : kLanes;
    const bool is_candidate = lane < turns;
    const float scale = is_candidate ? candidate_scale(search, kPlain, base, first + lane) : 1.0f;
    const float inverse = 1.0f / scale;
    float own_sum = 0.0f;
    for (int i = 0; i < turns; ++i) {
      const float factor = __shfl_sync(kEveryLane, inverse, i, kLanes);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        sum += encode(tables, kPlain, paper_pairing, values[j], factor, importance[j]).error;
      }
      sum = fold(sum);
      if (i == lane) own_sum = sum;
    }
    if (is_candidate) best.offer(attempt(search, kPlain, scale, first + lane, own_sum));
  }
}

}  // namespace olive::cuda
