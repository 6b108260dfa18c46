// y = x W^T + bias with int8 levels of activations and weights, for many activation rows on Hopper: wgmma on int8 with
// the weight, decoded to registers, as the operand of 64 rows. The definition's bits: exact int32 sums over every run
// of columns under one scale of each, added first to last with one fused multiply-add each.
//
// A block is a producer, which has the copy engine bring 128 columns of activations to shared memory, and two
// warpgroups of consumers with 64 weight rows each. Codes and scales of weights go through shared memory too
// (CodeStream).
//
// With scales in between, the int32 sums of 64 activation rows are one of two sets: while one is multiplied, the other
// is made floats and added. That is two instructions an output and run (three with groups of activations); a run of
// 128 columns is 2 clocks of products per activation row and warpgroup, its scaling 1 clock of the multiprocessor's
// issue slots, its decoding 128 clocks of look-ups in all. docs/gpu_kernels.md counts what follows from that.
#include <type_traits>

#include "cuda/wgmma_tiles.cuh"

namespace olive::cuda {
namespace {

enum class Scaling {
  kOnce,      // one scale per row of either matrix: at the end
  kByWeight,  // groups of weights; a row of x has one scale, applied at the end
  kByBoth     // groups of activations
};

constexpr int kStageColumns = 128;  // of int8: rows of 128 bytes, two tiles of the weight
constexpr int kChunk = 64;          // activation rows whose int32 sums are one set of registers

struct Problem {
  PackedReader weight;
  const int8_t* codebook;
  const float* scale_x;  // [groups_x, scale_pitch]
  int64_t scale_pitch;
  int groups_x, group_shift_x;  // columns per group as a shift of 32 columns; 31 = one group
  int64_t m, n;
  const void* bias;
  Float bias_type;
  void* out;
  Float out_type;
  TileCounts tiles;
};

// kBlock: columns of a run, 32, 64 or 128.
template <Scaling kScalingV, int kBlockV, int kTokensV, int kStagesV>
struct Shape {
  static constexpr Scaling kScaling = kScalingV;
  using Sum = std::conditional_t<kScaling == Scaling::kOnce, int, float>;
  static constexpr int kBlock = kBlockV, kTokens = kTokensV, kStages = kStagesV;
  static constexpr int kBlocks = kStageColumns / kBlock;                 // runs of a stage
  static constexpr int kGroups = kBlock == 32 ? 2 : 1;                   // scales of a tile of the weight
  static constexpr int kWeightScales = kBlock == 128 ? 1 : 2 * kGroups;  // of a stage, per lane
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kStageBytes = kTokens * kStageColumns;
  static constexpr int kScaleBytes = kScaling == Scaling::kByBoth ? kBlocks * kTokens * 4 : 0;  // of activations
  // So many steps are on their way: that is how long a stage takes, and what fits.
  using Codes = CodeShape<1, 2, kWeightScales, kTokens == 256 ? 3 : 4>;
  static constexpr int kStagesAt = kTableBytes;
  static constexpr int kScalesAt = kStagesAt + kStages * kStageBytes;
  static constexpr int kCodesAt = kScalesAt + kStages * kScaleBytes;
  static constexpr int kOutAt = kCodesAt + Codes::kStages * Codes::kStageBytes;
  static constexpr int kBarriersAt = kOutAt + kConsumers * kOutBytes;
  static constexpr int kShared = kBarriersAt + 2 * kStages * 8;
  static_assert(kShared <= 227 * 1024, "what a block may have on Hopper");
  static_assert(kOutAt % 128 == 0, "staging is stored to in 16 bytes");
};

#if defined(OLIVE_HAS_WGMMA)

template <class S>
__device__ void produce(const Problem& problem, const TensorMap* x, unsigned char* shared, int tasks, int steps) {
  const uint32_t stages = shared_address(shared + S::kStagesAt), scales = shared_address(shared + S::kScalesAt);
  const uint32_t full = shared_address(shared + S::kBarriersAt), empty = full + 8 * S::kStages;
  Slot<S::kStages> slot;
  for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int token = Tile(problem.tiles, task).token_unit * S::kTokens;
    for (int step = 0; step < steps; ++step) {
      const uint32_t barrier = full + 8 * slot.stage;
      barrier_wait(empty + 8 * slot.stage, slot.parity ^ 1);  // the first round finds every stage free
      barrier_arrive_expect(barrier, S::kStageBytes + S::kScaleBytes);
      copy_box(stages + slot.stage * S::kStageBytes, x, barrier, step * kStageColumns, token);
      if constexpr (S::kScaling == Scaling::kByBoth) {
#pragma unroll
        for (int block = 0; block < S::kBlocks; ++block) {
          const int found = (step * kStageColumns + block * S::kBlock) / 32 >> problem.group_shift_x;
          const int group = found < problem.groups_x ? found : problem.groups_x - 1;  // past K: levels are zero
          copy_bulk(scales + slot.stage * S::kScaleBytes + block * S::kTokens * 4,
                    problem.scale_x + group * problem.scale_pitch + token, S::kTokens * 4, barrier);
        }
      }
      slot.next();
    }
  }
}

// A stage of the weight: four products along the columns.
template <class S>
struct Decoded {
  uint32_t a[4][4];
  uint32_t scales[S::kWeightScales];

  // step: what CodeStream::wait returned.
  __device__ __forceinline__ void decode(const unsigned char* table, const unsigned char* step, int lane) {
    using Stream = CodeStream<typename S::Codes>;
#pragma unroll
    for (int i = 0; i < S::kWeightScales; ++i) scales[i] = Stream::scales(step, 0, i, lane);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const uint4 words = Stream::codes(step, 0, tile);
      const TableRows first(scales[(4 * tile) * S::kWeightScales / 8], lane);
      const TableRows second(scales[(4 * tile + 2) * S::kWeightScales / 8], lane);
      decode_int8_fragment(a[2 * tile], table, first, words.x, words.y);
      decode_int8_fragment(a[2 * tile + 1], table, second, words.z, words.w);
    }
  }
};

// Adds the int32 sums of a run of columns and 64 activation rows. scale_x: of those rows, in shared memory.
template <class S>
__device__ __forceinline__ void add_scaled(float* total, const int (&part)[kChunk / 2], uint32_t scales,
                                           const float* scale_x, int lane) {
  const float low = low_scale(scales), high = high_scale(scales);
#pragma unroll
  for (int i = 0; i < kChunk / 8; ++i) {
    float factor[4] = {low, low, high, high};
    if constexpr (S::kScaling == Scaling::kByBoth) {
      const float* own = scale_x + 8 * i + 2 * (lane % 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) factor[e] = __fmul_rn(own[e % 2], factor[e]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      total[4 * i + e] = fmaf(static_cast<float>(part[4 * i + e]), factor[e], total[4 * i + e]);
    }
  }
}

// The products of a stage with scales in between: units of one run of columns and 64 activation rows, each multiplied
// while the one before is scaled.
template <class S>
__device__ __forceinline__ void multiply_scaled(float (&total)[S::kTokens / 2], const Decoded<S>& weight,
                                                uint64_t stage, const float* scale_x, int lane) {
  constexpr int kChunks = S::kTokens / kChunk, kUnits = S::kBlocks * kChunks, kProducts = S::kBlock / 32;
  int part[2][kChunk / 2];
  const auto scale = [&](int unit) {
    const int block = unit / kChunks, chunk = unit % kChunks;
    hold(part[unit % 2]);
    add_scaled<S>(total + chunk * (kChunk / 2), part[unit % 2], weight.scales[block * S::kWeightScales / S::kBlocks],
                  scale_x + block * S::kTokens + chunk * kChunk, lane);
  };
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const int block = unit / kChunks, chunk = unit % kChunks;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const int product = block * kProducts + i;
      wgmma_int8<kChunk>(part[unit % 2], weight.a[product], further(stage, chunk * kChunk * 128 + 32 * product), i > 0);
    }
    wgmma_commit();
    if (unit > 0) {
      wgmma_wait<1>();
      scale(unit - 1);
    }
  }
  wgmma_wait<0>();
  scale(kUnits - 1);
}

// Scales what is scaled once, adds the bias and writes one tile of 64 weight rows.
template <class S, int kBarrier>
__device__ __forceinline__ void write_tile(const Problem& problem, const typename S::Sum (&sum)[S::kTokens / 2],
                                           unsigned char* staging, int64_t first_row, int64_t first_token, int warp,
                                           int lane) {
  float bias[2] = {-0.0f, -0.0f};  // which changes no sum, not even -0
  if (problem.bias != nullptr) load_bias(bias, problem.bias, problem.bias_type, first_row, problem.n, warp, lane);
  float scale_w[2] = {};
  if constexpr (S::kScaling == Scaling::kOnce) {
    const int first = static_cast<int>(first_row / kTileRows);
    const uint32_t scales = *problem.weight.rows(first, 4, lane).below(problem.weight, warp).scales;
    scale_w[0] = low_scale(scales), scale_w[1] = high_scale(scales);
  }
  const float* scale_x = problem.scale_x + first_token + 2 * (lane % 4);
  float value[S::kTokens / 2];
#pragma unroll
  for (int c = 0; c < S::kTokens / 2; ++c) {
    if constexpr (S::kScaling == Scaling::kOnce) {
      value[c] = fmaf(static_cast<float>(sum[c]), scale_w[c / 2 % 2], 0.0f);
    } else {
      value[c] = sum[c];
    }
    if constexpr (S::kScaling != Scaling::kByBoth) value[c] = __fmul_rn(value[c], scale_x[c / 4 * 8 + c % 2]);
    value[c] = __fadd_rn(value[c], bias[c / 2 % 2]);
  }
  if (problem.out_type == Float::f32) {  // eight neighbours at a time fill sectors of 32 bytes
    const int64_t row = first_row + 16 * warp + lane / 4, token = first_token + 2 * (lane % 4);
    const bool is_low = row < problem.n, is_high = row + 8 < problem.n;
    float* to = static_cast<float*>(problem.out) + token * problem.n + row;
    int left = problem.m - token < S::kTokens ? static_cast<int>(problem.m - token) : S::kTokens;
#pragma unroll
    for (int c = 0; c < S::kTokens / 2; c += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (e < left && is_low) to[e * problem.n] = value[c + e];
        if (e < left && is_high) to[e * problem.n + 8] = value[c + e + 2];
      }
      to += 8 * problem.n;
      left -= 8;
    }
    return;
  }
  const bool is_bf16 = problem.out_type == Float::bf16;
  write_halves<S::kTokens, kBarrier>(
      problem.out, problem.m, problem.n, staging, first_row, first_token, warp, lane, [&](int c) { return value[c]; },
      [&](float low, float high) {
        return is_bf16 ? round_pair<__nv_bfloat16>(low, high) : round_pair<__half>(low, high);
      });
}

template <class S>
__device__ void consume(const Problem& problem, unsigned char* shared, int tasks, int steps, int warpgroup) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const uint32_t stages = shared_address(shared + S::kStagesAt), full = shared_address(shared + S::kBarriersAt);
  const uint32_t empty = full + 8 * S::kStages;
  const auto* scales = reinterpret_cast<const float*>(shared + S::kScalesAt);
  unsigned char* staging = shared + S::kOutAt + warpgroup * kOutBytes;

  CodeStream<typename S::Codes> stream(problem.weight, problem.tiles, steps, shared + S::kCodesAt, warpgroup, warp,
                                       lane);
  Slot<S::kStages> slot;
  for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
    typename S::Sum total[S::kTokens / 2] = {};
    for (int step = 0; step < steps; ++step) {
      // Decoding it while the step before is multiplied, as linear_wgmma_sm90.cu does, was slower by a tenth.
      Decoded<S> weight;
      weight.decode(shared, stream.wait(), lane);
      stream.next();
      barrier_wait(full + 8 * slot.stage, slot.parity);
      // From one lane, so that the compiler knows it for all and adds to it on the uniform datapath.
      const uint64_t stage = describe(__shfl_sync(0xFFFFFFFFu, stages + slot.stage * S::kStageBytes, 0));
      if constexpr (S::kScaling == Scaling::kOnce) {
        wgmma_fence();
#pragma unroll
        for (int product = 0; product < 4; ++product) {
          wgmma_int8<S::kTokens>(total, weight.a[product], further(stage, 32 * product), step > 0 || product > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        hold(total);
      } else {
        multiply_scaled<S>(total, weight, stage, scales + slot.stage * (S::kScaleBytes / 4), lane);
      }
      if (lane == 0) barrier_arrive(empty + 8 * slot.stage);
      slot.next();
    }
    const Tile tile(problem.tiles, task);
    const int64_t row = static_cast<int64_t>(tile.row_unit) * S::kRows + warpgroup * 64;
    const int64_t token = static_cast<int64_t>(tile.token_unit) * S::kTokens;
    if (warpgroup == 0) {
      write_tile<S, 1>(problem, total, staging, row, token, warp, lane);
    } else {
      write_tile<S, 2>(problem, total, staging, row, token, warp, lane);
    }
  }
}

#endif  // OLIVE_HAS_WGMMA

template <class S>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    ovp_linear_quantized_wgmma_kernel(const Problem problem, const __grid_constant__ TensorMap x) {
#if defined(OLIVE_HAS_WGMMA)
  OLIVE_SHARED(shared);
  const int tasks = problem.tiles.row_units * problem.tiles.token_units;
  const int steps = (problem.weight.column_tiles + 1) / 2;
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    prefetch_map(&x);
    const uint32_t full = shared_address(shared + S::kBarriersAt);
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(full + 8 * (S::kStages + i), 4 * kConsumers);  // a lane of every consuming warp
    }
    barrier_init_fence();
  }
  wait_for_launch_before();
  let_next_launch_start();
  fill_int8_table(shared, problem.codebook, threadIdx.x, kWgmmaThreads);
  __syncthreads();
  // 24 + 2 x 240 registers for four warps each: 64 512 of 65 536.
  if (warpgroup == kConsumers) {
    give_registers<24>();
    if (threadIdx.x == 128 * kConsumers) produce<S>(problem, &x, shared, tasks, steps);
  } else {
    take_registers<240>();
    consume<S>(problem, shared, tasks, steps, warpgroup);
  }
#else
  __trap();  // an output that nobody wrote would be worse
#endif
}

template <class S>
void launch_shape(Problem problem, const QuantizedLinearArguments& arguments, uintptr_t stream) {
  const Device device = current_device();
  problem.tiles.row_units = static_cast<int>((problem.n + S::kRows - 1) / S::kRows);
  problem.tiles.token_units = static_cast<int>((problem.m + S::kTokens - 1) / S::kTokens);
  const int64_t tasks = static_cast<int64_t>(problem.tiles.row_units) * problem.tiles.token_units;
  if (tasks > (1 << 30)) {
    throw std::invalid_argument("m, n: expected at most 2^30 tiles, got " + std::to_string(tasks));
  }
  const int64_t blocks = tasks < device.multiprocessors ? tasks : device.multiprocessors;
  const TensorMap x =
      map_matrix(arguments.x, Element::int8, problem.m, column_tiles(arguments.weight.k) * kTileColumns, S::kTokens);
  launch("ovp_linear_quantized_wgmma", ovp_linear_quantized_wgmma_kernel<S>,
         Launch{static_cast<unsigned>(blocks), 1, kWgmmaThreads, S::kShared, 1, stream, true}, problem, x);
}

template <Scaling kScaling, int kBlock>
void launch_tile(const Problem& problem, const QuantizedLinearArguments& arguments, const WgmmaTile& tile,
                 uintptr_t stream) {
  const auto is = [&](int rows, int tokens) { return tile.rows == rows && tile.tokens == tokens; };
  if (is(128, 64)) return launch_shape<Shape<kScaling, kBlock, 64, 8>>(problem, arguments, stream);
  if (is(128, 128)) return launch_shape<Shape<kScaling, kBlock, 128, 5>>(problem, arguments, stream);
  // 128 float32 sums and two sets of int32 sums a thread leave no room for the scales of activations, and the scaling
  // of runs of 32 takes longer than what the wide tile saves.
  if constexpr (kScaling != Scaling::kByBoth && kBlock > 32) {
    if (is(128, 256)) return launch_shape<Shape<kScaling, kBlock, 256, 3>>(problem, arguments, stream);
  }
  throw std::invalid_argument(
      "rows, tokens: expected 128, 64 or 128, 128, or 128, 256 without groups of activations and of 32 weights, got " +
      std::to_string(tile.rows) + ", " + std::to_string(tile.tokens));
}

template <Scaling kScaling>
void launch_block(const Problem& problem, const QuantizedLinearArguments& arguments, const WgmmaTile& tile,
                  uintptr_t stream) {
  const auto has = [&](int size) {
    return arguments.weight.group_size == size || arguments.activation_group_size == size;
  };
  if (has(32)) return launch_tile<kScaling, 32>(problem, arguments, tile, stream);
  if (has(64)) return launch_tile<kScaling, 64>(problem, arguments, tile, stream);
  launch_tile<kScaling, 128>(problem, arguments, tile, stream);
}

}  // namespace

void ovp_linear_quantized_wgmma(const QuantizedLinearArguments& arguments, const WgmmaTile& tile, uintptr_t stream) {
  if (current_device().capability != 90) {
    throw std::invalid_argument("device: expected compute capability 9.0 for wgmma, got another");
  }
  Problem problem = {};
  problem.weight = packed_reader(arguments.weight);
  problem.codebook = arguments.weight.codebook;
  problem.scale_x = arguments.scale_x, problem.scale_pitch = arguments.scale_pitch;
  problem.groups_x = static_cast<int>(group_count(arguments.weight.k, arguments.activation_group_size));
  problem.group_shift_x = half_tile_shift(arguments.activation_group_size);
  problem.m = arguments.m, problem.n = arguments.weight.n;
  problem.bias = arguments.bias, problem.bias_type = arguments.bias_type;
  problem.out = arguments.out, problem.out_type = arguments.out_type;
  if (arguments.activation_group_size > 0) return launch_block<Scaling::kByBoth>(problem, arguments, tile, stream);
  if (arguments.weight.group_size > 0) return launch_block<Scaling::kByWeight>(problem, arguments, tile, stream);
  launch_tile<Scaling::kOnce, 128>(problem, arguments, tile, stream);
}

}  // namespace olive::cuda
