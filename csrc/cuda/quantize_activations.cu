// Activations [M, K] to integer levels and float32 scales, as olive/ops/reference_quantized.py defines it, to the last
// bit: int8 from the largest magnitude, ovp4 and ovp8 by a search over a few scales, or a scale that is given.
//
// Compile with -fmad=false: products and sums are rounded one by one.
//
// One launch, and one read from memory. int8: a block has a row in registers; a row of more than 16384 values is read
// again. ovp4, ovp8: half a warp goes along 1024 columns (that is how long the definition sums in float32) once for
// three candidates, and finds them in the first-level cache from the second time on; where rows are few, several half
// warps have the same columns and share the candidates. In groups half a warp has a group in registers.
//
// Counted: int8 takes 10 instructions a value (load, largest, product, clamp, rounding by an addition, store), so
// memory is the limit: 3 bytes a value in bfloat16. ovp4 tries 11 scales at about 15 instructions a value: on an H200
// 4096 values take a multiprocessor 5500 clocks, 1024 rows of them 25 microseconds.
#include <algorithm>

#include "core/encode8.h"
#include "core/fragments.h"
#include "cuda/api.h"
#include "cuda/columns.cuh"
#include "cuda/runtime.cuh"
#include "cuda/scale_search.cuh"

namespace olive::cuda {
namespace {

using Format = ActivationFormat;

constexpr int kGroupThreads = 128;

// A value pair in levels.
struct alignas(8) FloatPair {
  float even, odd;
};

constexpr int kRowThreads = 512;
constexpr int kRowHalves = kRowThreads / kLanes;  // at most, of a block
constexpr int kRowPairs = 16;                     // of a row that a lane holds, for int8
constexpr int kAtOnce = 3;                        // candidates per walk along a row: 5 + 6 are four walks

// ---- loads and stores ---------------------------------------------------------------------------------------

// Values first + 2 (lane + 16 j) and their neighbours; zeros past K.
template <int kPairs>
__device__ __forceinline__ void load_pairs(Pair (&values)[kPairs], const ActivationSource& x, int64_t row,
                                           int64_t first) {
  const int64_t start = row * x.k, lane_first = first + 2 * lane_of_half();
  const auto load_each = [&](auto load) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int64_t column = lane_first + 2 * kLanes * j;
      values[j] = {0.0f, 0.0f};
      if (column < x.k) load(values[j], column);
    }
  };
  if (x.k % 2 != 0) {  // rows are not aligned to pairs
    load_each([&](Pair& to, int64_t column) {
      to.even = load_float(x.data, start + column, x.type);
      if (column + 1 < x.k) to.odd = load_float(x.data, start + column + 1, x.type);
    });
  } else if (x.type == Float::f32) {
    load_each([&](Pair& to, int64_t column) {
      const FloatPair pair = static_cast<const FloatPair*>(x.data)[(start + column) / 2];
      to = {pair.even, pair.odd};
    });
  } else if (x.type == Float::bf16) {
    load_each([&](Pair& to, int64_t column) {
      word_to_floats<Float::bf16>(static_cast<const uint32_t*>(x.data)[(start + column) / 2], &to.even, &to.odd);
    });
  } else {
    load_each([&](Pair& to, int64_t column) {
      word_to_floats<Float::f16>(static_cast<const uint32_t*>(x.data)[(start + column) / 2], &to.even, &to.odd);
    });
  }
}

// The level as an int8: an addition leaves integers in the last bits.
__device__ __forceinline__ uint32_t int8_bits(float level) { return float_to_bits(level + 12582912.0f) & 0xFFu; }

__device__ __forceinline__ uint16_t int8_pair(const Pair& levels) {
  return static_cast<uint16_t>(int8_bits(levels.even) | int8_bits(levels.odd) << 8);
}

// Stores the levels of the pairs that load_pairs loads.
template <int kPairs>
__device__ __forceinline__ void store_pairs(const ActivationLevels& to, int64_t k, int64_t row, int64_t first,
                                            const Pair (&levels)[kPairs]) {
  const int64_t start = row * k, lane_first = first + 2 * lane_of_half();
  const auto store_each = [&](int64_t width, auto store) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int64_t column = lane_first + 2 * kLanes * j;
      if (column < width) store(column, levels[j]);
    }
  };
  if (to.for_products) {
    const int64_t width = column_tiles(k) * kTileColumns;
    auto* bytes = static_cast<unsigned char*>(to.levels) + row * width + level_byte(lane_of_half() % 8);
    store_each(width, [&](int64_t column, const Pair& pair) {
      *reinterpret_cast<uint16_t*>(bytes + column / 16 * 16) = int8_pair(pair);
    });
  } else if (k % 2 != 0) {
    store_each(k, [&](int64_t column, const Pair& pair) {
      for (int i = 0; i < 2 && column + i < k; ++i) {
        const float value = i == 0 ? pair.even : pair.odd;
        if (to.type == LevelType::int8) {
          static_cast<unsigned char*>(to.levels)[start + column + i] = static_cast<unsigned char>(int8_bits(value));
        } else {
          store_float(to.levels, start + column + i, static_cast<Float>(to.type), value);
        }
      }
    });
  } else if (to.type == LevelType::int8) {
    store_each(k, [&](int64_t column, const Pair& pair) {
      static_cast<uint16_t*>(to.levels)[(start + column) / 2] = int8_pair(pair);
    });
  } else if (to.type == LevelType::f32) {
    store_each(k, [&](int64_t column, const Pair& pair) {
      static_cast<FloatPair*>(to.levels)[(start + column) / 2] = {pair.even, pair.odd};
    });
  } else if (to.type == LevelType::bf16) {
    store_each(k, [&](int64_t column, const Pair& pair) {
      static_cast<uint32_t*>(to.levels)[(start + column) / 2] = floats_to_word<Float::bf16>(pair.even, pair.odd);
    });
  } else {
    store_each(k, [&](int64_t column, const Pair& pair) {
      static_cast<uint32_t*>(to.levels)[(start + column) / 2] = floats_to_word<Float::f16>(pair.even, pair.odd);
    });
  }
}

__device__ __forceinline__ void store_scale(const ActivationLevels& to, int64_t groups, int64_t row, int64_t group,
                                            float scale) {
  to.scale[to.for_products ? group * to.scale_pitch + row : row * groups + group] = scale;
}

// ---- levels -------------------------------------------------------------------------------------------------

__device__ __forceinline__ float int8_scale(float largest) { return largest < kTiny ? 1.0f : largest / 127.0f; }

__device__ __forceinline__ float int8_level(float t) { return fminf(fmaxf(rintf(t), -127.0f), 127.0f); }

// The levels of a byte of codes.
__device__ __forceinline__ Pair ovp4_levels(const EncodeTables& tables, bool plain, int byte) {
  const int low = byte & 15, high = byte >> 4;
  if (plain) return {tables.level[kPlain][low], tables.level[kPlain][high]};
  const auto level = [&](int nibble, int partner) {
    const float magnitude = tables.level[partner == kIdentifier ? kOutlier : kNormal][nibble];
    return nibble == kIdentifier ? 0.0f : nibble & 8 ? -magnitude : magnitude;
  };
  return {level(low, high), level(high, low)};
}

// What a search tries, in shared memory.
struct SharedGrids {
  float pair[kMostMultiples], plain[kMostMultiples];

  __device__ void fill(const ActivationGrids& grids) {
    if (threadIdx.x < kMostMultiples) {
      pair[threadIdx.x] = grids.pair[threadIdx.x];
      plain[threadIdx.x] = grids.plain[threadIdx.x];
    }
  }
  __device__ Search search(const ActivationGrids& grids) const {
    return {pair, grids.pair_count, plain, grids.plain_count, nullptr, nullptr};
  }
};

// The rounded scale of a candidate of eight bits.
__device__ __forceinline__ float ovp8_scale(float multiple, float largest, float sigmas) {
  return round_scale(fminf(largest, multiple * sigmas) / kLargest8);
}

// The level pair of values with a stored scale; int8 has no stored scale of its own when it is dynamic.
template <Format kFormat>
__device__ __forceinline__ Pair levels_of(const EncodeTables& tables, bool paper_pairing, bool plain, const Pair& value,
                                          float inverse) {
  const float even = value.even * inverse, odd = value.odd * inverse;
  if constexpr (kFormat == Format::int8) {
    return {int8_level(even), int8_level(odd)};
  } else if constexpr (kFormat == Format::ovp4) {
    return ovp4_levels(tables, plain, encode_pair(tables, plain, paper_pairing, even, odd, 1.0f, 1.0f).byte);
  } else {
    const PairLevels8 code = encode_pair8(paper_pairing, even, odd);
    return {code.even + 0.0f, code.odd + 0.0f};  // zeros without a sign
  }
}

// A scale and its rule.
struct Chosen {
  float scale;
  bool plain;
};

__device__ __forceinline__ Chosen chosen(int16_t stored) { return {scale_value(stored), scale_is_plain(stored)}; }

// ---- a scale per group: half a warp each ----------------------------------------------------------------------

struct GroupShared {
  EncodeTables tables;
  SharedGrids grids;
};

template <Format kFormat, int kPairs>  // per lane
__global__ void __launch_bounds__(kGroupThreads)
    quantize_groups_kernel(const ActivationSource x, const ActivationLevels to) {
  wait_for_launch_before();
  let_next_launch_start();
  OLIVE_SHARED(memory);
  auto& shared = *reinterpret_cast<GroupShared*>(memory);
  if constexpr (kFormat == Format::ovp4) {
    fill_encode_tables(&shared.tables, x.codebook, static_cast<int>(threadIdx.x), kGroupThreads);
  }
  if constexpr (kFormat != Format::int8) {
    shared.grids.fill(x.grids);
    __syncthreads();
  }
  const Search search = shared.grids.search(x.grids);

  constexpr int64_t kWidth = 2 * kLanes * kPairs;
  const int64_t groups = group_count(x.k, kWidth);
  // Levels for products are padded to whole tiles, for which groups of 32 may be one too few.
  const int64_t units = to.for_products ? group_count(column_tiles(x.k) * kTileColumns, kWidth) : groups;
  const int64_t all = x.m * units, step = static_cast<int64_t>(gridDim.x) * (kGroupThreads / kLanes);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * (kGroupThreads / kLanes); first < all; first += step) {
    const int64_t index = first + half_of_block();
    const bool is_unit = index < all;  // the other half of the warp needs this one's shuffles
    const int64_t row = is_unit ? index / units : 0, group = is_unit ? index - row * units : units;
    const int64_t column = group * kWidth;
    Pair values[kPairs];
    load_pairs(values, x, row, column);
    Statistics statistics;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) statistics.add(values[j]);
    float largest = fold_largest(statistics.finite ? statistics.largest : INFINITY);
    const bool finite = largest < INFINITY;
    if (!finite) {
      largest = 0.0f;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) values[j] = {0.0f, 0.0f};
    }
    Chosen best = {1.0f, false};
    if constexpr (kFormat == Format::int8) {
      best.scale = int8_scale(largest);
    } else {
      const double energy = fold(finite ? statistics.energy : 0.0f);
      const int64_t left = x.k - column;
      const double count = static_cast<double>(left < 1 ? 1 : left < kWidth ? left : kWidth);
      if constexpr (kFormat == Format::ovp4) {
        Pair alike[kPairs];
#pragma unroll
        for (int j = 0; j < kPairs; ++j) alike[j] = {1.0f, 1.0f};
        const Bases bases = base_scales(shared.tables, largest, energy, count);
        Best found;
        search_group<false>(shared.tables, x.paper_pairing, search, values, alike, bases.pair, found);
        if (shared.tables.has_plain) {
          search_group<true>(shared.tables, x.paper_pairing, search, values, alike, bases.plain, found);
        }
        found = best_of_half(found);
        if (largest >= kTiny) best = chosen(static_cast<int16_t>(found.stored));
      } else {
        const float sigmas = three_sigma(energy, count);
        double least = INFINITY;
        for (int i = 0; i < x.grids.pair_count; ++i) {
          const float scale = ovp8_scale(search.pair_grid[i], largest, sigmas), inverse = 1.0f / scale;
          float sum = 0.0f;
#pragma unroll
          for (int j = 0; j < kPairs; ++j) {
            sum += encode_pair8(x.paper_pairing, values[j].even * inverse, values[j].odd * inverse).error;
          }
          const double wide = scale, error = static_cast<double>(fold(sum)) * (wide * wide);
          if (error < least && largest >= kTiny) {
            least = error;
            best.scale = scale;
          }
        }
      }
    }
    if (!is_unit) continue;
    const float inverse = 1.0f / best.scale;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      values[j] = levels_of<kFormat>(shared.tables, x.paper_pairing, best.plain, values[j], inverse);
    }
    store_pairs(to, x.k, row, column, values);
    if (lane_of_half() == 0 && group < groups) store_scale(to, groups, row, group, finite ? best.scale : NAN);
  }
}

// ---- a scale per row, or one for all: a block per row ------------------------------------------------------------

// How a block cuts its row: into chunks for `lines` half warps beside each other, `split` times.
struct RowCut {
  int lines, split;
  int chunks;
};

// The largest of the lines' values, for all threads. `largest` is one of two buffers by turns: the next row's values
// come while somebody still reads these.
__device__ __forceinline__ float largest_of_lines(float own, float* largest, const RowCut& cut) {
  const int lane = lane_of_half();
  own = fold_largest(own);
  if (lane == 0 && half_of_block() < cut.lines) largest[half_of_block()] = own;
  __syncthreads();
  own = 0.0f;
  for (int i = lane; i < cut.lines; i += kLanes) own = fmaxf(own, largest[i]);
  return fold_largest(own);
}

__global__ void __launch_bounds__(kRowThreads, 1)
    quantize_rows_int8_kernel(const ActivationSource x, const ActivationLevels to, const RowCut cut) {
  wait_for_launch_before();
  let_next_launch_start();
  constexpr int64_t kWidth = 2 * kLanes * kRowPairs;
  OLIVE_SHARED(memory);
  auto& shared = *reinterpret_cast<float (*)[2][kRowHalves]>(memory);
  const int line = half_of_block();
  const bool fits = cut.chunks <= cut.lines;  // into registers
  int side = 0;
  for (int64_t row = blockIdx.x; row < x.m; row += gridDim.x, side ^= 1) {
    Pair values[kRowPairs];
    Statistics statistics;
    for (int chunk = line; chunk < cut.chunks; chunk += cut.lines) {
      load_pairs(values, x, row, chunk * kWidth);
#pragma unroll
      for (int j = 0; j < kRowPairs; ++j) statistics.add(values[j]);
    }
    const float largest = largest_of_lines(statistics.finite ? statistics.largest : INFINITY, shared[side], cut);
    const bool finite = largest < INFINITY;
    const float scale = x.static_scale != nullptr ? scale_value(*x.static_scale) : finite ? int8_scale(largest) : 1.0f;
    const float inverse = 1.0f / scale;
    for (int chunk = line; chunk < cut.chunks; chunk += cut.lines) {
      if (!fits) load_pairs(values, x, row, chunk * kWidth);
#pragma unroll
      for (int j = 0; j < kRowPairs; ++j) {
        values[j] = finite ? Pair{int8_level(values[j].even * inverse), int8_level(values[j].odd * inverse)} : Pair{};
      }
      store_pairs(to, x.k, row, chunk * kWidth, values);
    }
    if (threadIdx.x == 0) store_scale(to, 1, row, 0, finite ? scale : NAN);
  }
}

struct RowShared {
  EncodeTables tables;
  SharedGrids grids;
  float largest[2][kRowHalves];
};

// Adds the errors that this lane's pairs of a chunk make with the candidates' inverse scales.
template <Format kFormat, bool kPlain>
__device__ __forceinline__ void add_errors(float (&sums)[kAtOnce], const EncodeTables& tables,
                                           const ActivationSource& x, int64_t row, int64_t first,
                                           const float (&inverse)[kAtOnce]) {
  for (int64_t column = first; column < first + kChunk && column < x.k; column += 2 * kLanes) {
    Pair value[1];
    load_pairs(value, x, row, column);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float even = value[0].even * inverse[i], odd = value[0].odd * inverse[i];
      if constexpr (kFormat == Format::ovp8) {
        sums[i] += encode_pair8(x.paper_pairing, even, odd).error;
      } else {
        sums[i] += encode_pair(tables, kPlain, x.paper_pairing, even, odd, 1.0f, 1.0f).error;
      }
    }
  }
}

template <Format kFormat>
__global__ void __launch_bounds__(kRowThreads, 2)
    quantize_rows_ovp_kernel(const ActivationSource x, const ActivationLevels to, const RowCut cut) {
  wait_for_launch_before();
  let_next_launch_start();
  OLIVE_SHARED(memory);
  auto& shared = *reinterpret_cast<RowShared*>(memory);
  auto* energies = reinterpret_cast<float*>(memory + sizeof(RowShared));  // [chunks]
  float* sums = energies + cut.chunks;                                    // [candidates, chunks]
  const EncodeTables& tables = shared.tables;
  if constexpr (kFormat == Format::ovp4) {
    fill_encode_tables(&shared.tables, x.codebook, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  }
  shared.grids.fill(x.grids);
  __syncthreads();
  const Search search = shared.grids.search(x.grids);
  const bool is_static = x.static_scale != nullptr, has_plain = kFormat == Format::ovp4 && tables.has_plain;
  const int lane = lane_of_half(), line = half_of_block() % cut.lines, subset = half_of_block() / cut.lines;
  const int turns = (cut.chunks + cut.lines - 1) / cut.lines;  // of all half warps: those of a warp shuffle together
  const int pair_count = search.pair_count, count = pair_count + (has_plain ? 2 * search.plain_count : 0);

  int side = 0;
  for (int64_t row = blockIdx.x; row < x.m; row += gridDim.x, side ^= 1) {
    Statistics statistics;
    for (int turn = 0; turn < turns; ++turn) {
      constexpr int kLoads = 8;  // under way at once
      const int chunk = line + turn * cut.lines;
      const int64_t first = chunk * kChunk;
      statistics.energy = 0.0f;
      for (int64_t column = first; column < first + kChunk && column < x.k; column += 2 * kLanes * kLoads) {
        Pair values[kLoads];
        load_pairs(values, x, row, column);
#pragma unroll
        for (int j = 0; j < kLoads; ++j) statistics.add(values[j]);
      }
      const float energy = fold(statistics.energy);
      if (lane == 0 && subset == 0 && chunk < cut.chunks) energies[chunk] = energy;
    }
    const float largest =
        largest_of_lines(statistics.finite ? statistics.largest : INFINITY, shared.largest[side], cut);
    const bool finite = largest < INFINITY;

    float scale = 1.0f;
    bool plain = false;
    if (is_static) {
      scale = scale_value(*x.static_scale);
      plain = has_plain && scale_is_plain(*x.static_scale);
    } else {
      double energy = 0.0;
      for (int chunk = 0; chunk < cut.chunks; ++chunk) energy += energies[chunk];
      const bool searches = finite && largest >= kTiny;
      const float sigmas = three_sigma(energy, static_cast<double>(x.k));
      Bases bases = {};
      if constexpr (kFormat == Format::ovp4) bases = base_scales(tables, largest, energy, static_cast<double>(x.k));
      const auto scale_of = [&](int candidate) {
        if constexpr (kFormat == Format::ovp8) {
          return ovp8_scale(search.pair_grid[candidate], largest, sigmas);
        } else {
          const bool is_plain = candidate >= pair_count;
          return candidate_scale(search, is_plain, is_plain ? bases.plain : bases.pair,
                                 is_plain ? candidate - pair_count : candidate);
        }
      };
      const int pair_walks = (pair_count + kAtOnce - 1) / kAtOnce;
      const int walks = pair_walks + (count - pair_count + kAtOnce - 1) / kAtOnce;
      for (int walk = subset; searches && walk < walks; walk += cut.split) {
        const bool is_plain = walk >= pair_walks;
        const int begin = is_plain ? pair_count + (walk - pair_walks) * kAtOnce : walk * kAtOnce;
        const int end = is_plain ? count : pair_count;
        float inverse[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) inverse[i] = begin + i < end ? 1.0f / scale_of(begin + i) : 1.0f;
        for (int turn = 0; turn < turns; ++turn) {
          const int chunk = line + turn * cut.lines;
          float errors[kAtOnce] = {};
          if (kFormat == Format::ovp4 && is_plain) {
            add_errors<kFormat, true>(errors, tables, x, row, chunk * kChunk, inverse);
          } else {
            add_errors<kFormat, false>(errors, tables, x, row, chunk * kChunk, inverse);
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const float error = fold(errors[i]);
            if (lane == 0 && begin + i < end && chunk < cut.chunks) sums[(begin + i) * cut.chunks + chunk] = error;
          }
        }
      }
      __syncthreads();
      if (searches) {
        Best best;
        for (int candidate = lane; candidate < count; candidate += kLanes) {
          double total = 0.0;
          for (int chunk = 0; chunk < cut.chunks; ++chunk) total += sums[candidate * cut.chunks + chunk];
          const bool is_plain = candidate >= pair_count;
          best.offer(
              attempt(search, is_plain, scale_of(candidate), is_plain ? candidate - pair_count : candidate, total));
        }
        const auto stored = static_cast<int16_t>(best_of_half(best).stored);
        scale = scale_value(stored);
        plain = scale_is_plain(stored);
      }
    }

    const float inverse = 1.0f / scale;
    const int64_t end = to.for_products ? column_tiles(x.k) * kTileColumns : x.k;
    for (int chunk = line; chunk < cut.chunks; chunk += cut.lines) {
      const int64_t first = chunk * kChunk;
      // The subsets share the stores.
      for (int64_t column = first + 2 * kLanes * subset; column < first + kChunk && column < end;
           column += 2 * kLanes * cut.split) {
        Pair value[1];
        load_pairs(value, x, row, column);
        value[0] = finite ? levels_of<kFormat>(tables, x.paper_pairing, plain, value[0], inverse) : Pair{};
        store_pairs(to, x.k, row, column, value);
      }
    }
    if (threadIdx.x == 0) store_scale(to, 1, row, 0, finite ? scale : NAN);
  }
}

// ---- launchers ----------------------------------------------------------------------------------------------

unsigned at_most(int64_t blocks, int64_t limit) { return static_cast<unsigned>(std::min(blocks, limit)); }

template <Format kFormat, int kPairs>
void quantize_groups(const ActivationSource& x, const ActivationLevels& to, uintptr_t stream) {
  constexpr int64_t kWidth = 2 * kLanes * kPairs, kPerBlock = kGroupThreads / kLanes;
  const int64_t columns = to.for_products ? column_tiles(x.k) * kTileColumns : x.k;
  const int64_t blocks = (x.m * group_count(columns, kWidth) + kPerBlock - 1) / kPerBlock;
  const unsigned grid = at_most(blocks, 16 * current_device().multiprocessors);
  launch("quantize_activations groups", quantize_groups_kernel<kFormat, kPairs>,
         Launch{grid, 1, kGroupThreads, sizeof(GroupShared), 1, stream, true}, x, to);
}

template <Format kFormat>
void quantize_rows(const ActivationSource& x, const ActivationLevels& to, uintptr_t stream) {
  constexpr bool kIsInt8 = kFormat == Format::int8;
  constexpr int64_t kWidth = kIsInt8 ? 2 * kLanes * kRowPairs : kChunk;
  const Device device = current_device();
  const bool searches = !kIsInt8 && x.static_scale == nullptr;
  const int64_t chunks = (x.k + kWidth - 1) / kWidth;
  RowCut cut = {};
  cut.chunks = static_cast<int>(chunks);
  cut.lines = static_cast<int>(std::min<int64_t>((chunks + 1) / 2 * 2, kRowHalves));  // whole warps
  // Few rows leave multiprocessors idle: then a block's half warps share the candidates and the stores.
  constexpr int kMostSubsets = 4;
  cut.split = searches && x.m < 2 * device.multiprocessors ? std::min(kRowHalves / cut.lines, kMostSubsets) : 1;
  const int candidates = x.grids.pair_count + 2 * x.grids.plain_count;
  const std::size_t sums = static_cast<std::size_t>(chunks) * (1 + candidates) * sizeof(float);
  const std::size_t shared = kIsInt8 ? sizeof(float[2][kRowHalves]) : sizeof(RowShared) + sums;
  if (shared > static_cast<std::size_t>(device.shared_per_block)) {
    throw std::invalid_argument("k: expected rows whose sums fit a block's shared memory, got K " +
                                std::to_string(x.k) + "; use groups");
  }
  const Launch shape = {at_most(x.m, static_cast<int64_t>(device.multiprocessors) * 16),
                        1,
                        static_cast<unsigned>(kLanes * cut.lines * cut.split),
                        shared,
                        1,
                        stream,
                        true};
  if constexpr (kIsInt8) {
    launch("quantize_activations rows", quantize_rows_int8_kernel, shape, x, to, cut);
  } else {
    launch("quantize_activations rows", quantize_rows_ovp_kernel<kFormat>, shape, x, to, cut);
  }
}

template <Format kFormat>
void quantize(const ActivationSource& x, const ActivationLevels& to, uintptr_t stream) {
  switch (x.group_size) {
    case 32:
      return quantize_groups<kFormat, 1>(x, to, stream);
    case 64:
      return quantize_groups<kFormat, 2>(x, to, stream);
    case 128:
      return quantize_groups<kFormat, 4>(x, to, stream);
    default:
      return quantize_rows<kFormat>(x, to, stream);
  }
}

}  // namespace

void quantize_activations(const ActivationSource& x, const ActivationLevels& to, uintptr_t stream) {
  switch (x.format) {
    case Format::int8:
      return quantize<Format::int8>(x, to, stream);
    case Format::ovp4:
      return quantize<Format::ovp4>(x, to, stream);
    case Format::ovp8:
      return quantize<Format::ovp8>(x, to, stream);
  }
}

}  // namespace olive::cuda
