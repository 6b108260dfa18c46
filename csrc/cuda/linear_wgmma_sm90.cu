// y = x W^T + bias for many activation rows on Hopper: wgmma with the weight, decoded to registers, as the operand
// of 64 rows (y^T = W x^T), so that decoded weights are never written anywhere.
//
// A block is a producer warp, which has the copy engine bring activations [kTokens, 64] to shared memory, and two
// warpgroups of consumers with 64 kRowTiles weight rows each, which decode their own codes, brought by CodeStream,
// while their products of the step before are on the tensor cores: 64 columns cost a warpgroup kTokens x 2 clocks of
// products and about 150 to 200 of decoding. Blocks are persistent.
//
// The scale is multiplied into the fragment, which rounds each weight to the activations' type once: the bits of
// decoding to that type. Sums are float32.
//
// Per step of 64 columns a block of 128 x 256 reads 36 KiB from L2 in 1024 clocks of products, one of 256 x 128 24 KiB.
#include <stdexcept>
#include <string>

#include "cuda/wgmma_tiles.cuh"

namespace olive::cuda {
namespace {

struct Problem {
  PackedReader weight;
  const int8_t* codebook;
  int64_t m, n, k;
  const void* bias;
  Float bias_type;
  void* out;
  TileCounts tiles;
};

// kGroups: groups of weights in 64 columns, 2 for groups of 32, else 1. kRowTiles: of 64 rows, per warpgroup.
template <int kGroupsV, int kRowTilesV, int kTokensV, int kStagesV, int kCodeStages>
struct Shape {
  static constexpr int kGroups = kGroupsV;
  static constexpr int kRowTiles = kRowTilesV, kTokens = kTokensV, kStages = kStagesV;
  using Codes = CodeShape<kRowTiles, 1, kGroups, kCodeStages>;
  static constexpr int kRows = 64 * kRowTiles * kConsumers;
  static constexpr int kStageBytes = kTokens * kTileColumns * 2;
  static constexpr int kStagesAt = kTableBytes;
  static constexpr int kOutAt = kStagesAt + kStages * kStageBytes;
  static constexpr int kCodesAt = kOutAt + kConsumers * kOutBytes;
  static constexpr int kBarriersAt = kCodesAt + kCodeStages * Codes::kStageBytes;
  static constexpr int kShared = kBarriersAt + 2 * kStages * 8;
  static_assert(kShared <= 227 * 1024, "what a block may have on Hopper");
};

#if defined(OLIVE_HAS_WGMMA)

template <class T>
constexpr float kUnit = 1.0f;
// Half-precision levels are kept as level / 128 and scales as scale x 128: a scale below 6e-5 would be subnormal.
template <>
constexpr float kUnit<__half> = 1.0f / 128;

// Scales of a lane's two rows in the activations' type, twice each.
template <class T>
struct FoldedScales;

template <>
struct FoldedScales<__nv_bfloat16> {
  uint32_t low, high;
  __device__ explicit FoldedScales(uint32_t stored)
      : low((stored & 0xFFFEu) * 0x10001u), high((stored >> 16 & 0xFFFEu) * 0x10001u) {}
  __device__ void apply(uint32_t (&a)[4]) const {
    a[0] = multiply_pair<__nv_bfloat16>(a[0], low);
    a[1] = multiply_pair<__nv_bfloat16>(a[1], high);
    a[2] = multiply_pair<__nv_bfloat16>(a[2], low);
    a[3] = multiply_pair<__nv_bfloat16>(a[3], high);
  }
};

template <>
struct FoldedScales<__half> {
  float low, high;  // scale x 128
  uint32_t low_pair, high_pair;
  bool exact;  // whether the whole warp's scales are normal numbers in half precision
  __device__ explicit FoldedScales(uint32_t stored)
      : low(low_scale(stored) * 128.0f),
        high(high_scale(stored) * 128.0f),
        low_pair(round_pair<__half>(low, low)),
        high_pair(round_pair<__half>(high, high)),
        exact(!__any_sync(0xFFFFFFFFu, is_strange(stored) || is_strange(stored >> 16))) {}
  // Outside 2^-21 .. 2^9, where scale x 128 is not a normal half; zero rows past N are not strange.
  static __device__ bool is_strange(uint32_t stored) {
    const uint32_t exponent = stored >> 7 & 0xFF;
    return (stored & 0xFFFEu) != 0 && (exponent < 127 - 21 || exponent >= 127 + 9);
  }
  static __device__ uint32_t multiply_wide(uint32_t pair, float scale) {
    return round_pair<__half>(f16_to_float(static_cast<uint16_t>(pair)) * scale,
                              f16_to_float(static_cast<uint16_t>(pair >> 16)) * scale);
  }
  __device__ void apply(uint32_t (&a)[4]) const {
    if (exact) {
      a[0] = multiply_pair<__half>(a[0], low_pair);
      a[1] = multiply_pair<__half>(a[1], high_pair);
      a[2] = multiply_pair<__half>(a[2], low_pair);
      a[3] = multiply_pair<__half>(a[3], high_pair);
    } else {
      a[0] = multiply_wide(a[0], low);
      a[1] = multiply_wide(a[1], high);
      a[2] = multiply_wide(a[2], low);
      a[3] = multiply_wide(a[3], high);
    }
  }
};

// A lane's four products of a step, for each row tile.
template <class S>
using Fragments = uint32_t[S::kRowTiles][4][4];

// step: what CodeStream::wait returned.
template <class T, class S>
__device__ __forceinline__ void decode_scaled(Fragments<S>& a, const unsigned char* table, const unsigned char* step,
                                              int lane) {
  using Stream = CodeStream<typename S::Codes>;
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r) {
    const uint4 codes = Stream::codes(step, r, 0);
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      const uint32_t scales = Stream::scales(step, r, group, lane);
      const TableRows rows(scales, lane);
      const FoldedScales<T> folded(scales);
#pragma unroll
      for (int i = 0; i < 4 / S::kGroups; ++i) {
        const int product = group * (4 / S::kGroups) + i;
        decode_fragment(a[r][product], table, rows, words[product]);
        folded.apply(a[r][product]);
      }
    }
  }
}

template <class T, class S>
__device__ void produce(const Problem& problem, const TensorMap* x, unsigned char* shared, int tasks) {
  const uint32_t stages = shared_address(shared + S::kStagesAt), full = shared_address(shared + S::kBarriersAt);
  const uint32_t empty = full + 8 * S::kStages;
  Slot<S::kStages> slot;
  for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
    const Tile tile(problem.tiles, task);
    for (int step = 0; step < problem.weight.column_tiles; ++step) {
      barrier_wait(empty + 8 * slot.stage, slot.parity ^ 1);  // the first round finds every stage free
      barrier_arrive_expect(full + 8 * slot.stage, S::kStageBytes);
      copy_box(stages + slot.stage * S::kStageBytes, x, full + 8 * slot.stage, step * kTileColumns,
               tile.token_unit * S::kTokens);
      slot.next();
    }
  }
}

// Adds the bias and writes one tile of 64 weight rows.
template <class T, class S, int kBarrier>
__device__ __forceinline__ void write_tile(const Problem& problem, const float (&sum)[S::kTokens / 2],
                                           unsigned char* staging, int64_t first_row, int64_t first_token, int warp,
                                           int lane) {
  float bias[2];
  load_bias(bias, problem.bias, problem.bias_type, first_row, problem.n, warp, lane);
  write_halves<S::kTokens, kBarrier>(
      problem.out, problem.m, problem.n, staging, first_row, first_token, warp, lane,
      [&](int c) { return sum[c] + bias[c / 2 % 2]; }, [](float low, float high) { return round_pair<T>(low, high); });
}

template <class T, class S>
__device__ void consume(const Problem& problem, unsigned char* shared, int tasks, int warpgroup) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const uint32_t stages = shared_address(shared + S::kStagesAt), full = shared_address(shared + S::kBarriersAt);
  const uint32_t empty = full + 8 * S::kStages;
  unsigned char* staging = shared + S::kOutAt + warpgroup * kOutBytes;
  const int steps = problem.weight.column_tiles;

  CodeStream<typename S::Codes> stream(problem.weight, problem.tiles, steps, shared + S::kCodesAt, warpgroup, warp,
                                       lane);
  const auto decode = [&](Fragments<S>& a) {
    decode_scaled<T, S>(a, shared, stream.wait(), lane);
    stream.next();
  };
  Slot<S::kStages> slot;
  for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
    float sum[S::kRowTiles][S::kTokens / 2];
    // While a step is multiplied the next one is decoded.
    const auto multiply = [&](int step, Fragments<S>& a, Fragments<S>& following) {
      barrier_wait(full + 8 * slot.stage, slot.parity);
      wgmma_fence();
#pragma unroll
      for (int product = 0; product < 4; ++product) {
        const uint64_t b = describe(stages + slot.stage * S::kStageBytes + 32 * product);
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r) {
          wgmma<T, S::kTokens>(sum[r], a[r][product], b, step > 0 || product > 0);
        }
      }
      wgmma_commit();
      if (step + 1 < steps) decode(following);
      wgmma_wait<0>();
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) hold(sum[r]);
      if (lane == 0) barrier_arrive(empty + 8 * slot.stage);
      slot.next();
    };
    Fragments<S> even, odd;
    decode(even);
    for (int step = 0; step < steps; step += 2) {
      multiply(step, even, odd);
      if (step + 1 < steps) multiply(step + 1, odd, even);
    }
    const Tile tile(problem.tiles, task);
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r) {
      const int64_t row = static_cast<int64_t>(tile.row_unit) * S::kRows + (warpgroup * S::kRowTiles + r) * 64;
      const int64_t token = static_cast<int64_t>(tile.token_unit) * S::kTokens;
      if (warpgroup == 0) {
        write_tile<T, S, 1>(problem, sum[r], staging, row, token, warp, lane);
      } else {
        write_tile<T, S, 2>(problem, sum[r], staging, row, token, warp, lane);
      }
    }
  }
}

#endif  // OLIVE_HAS_WGMMA

template <class T, class S>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    ovp_linear_wgmma_kernel(const Problem problem, const __grid_constant__ TensorMap x) {
#if defined(OLIVE_HAS_WGMMA)
  OLIVE_SHARED(shared);
  const int tasks = problem.tiles.row_units * problem.tiles.token_units;
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
  fill_table<T>(shared, problem.codebook, threadIdx.x, kWgmmaThreads, kUnit<T>);
  __syncthreads();
  // 24 + 2 x 240 registers for four warps each: 64 512 of 65 536.
  if (warpgroup == kConsumers) {
    give_registers<24>();
    if (threadIdx.x == 128 * kConsumers) produce<T, S>(problem, &x, shared, tasks);
  } else {
    take_registers<240>();
    consume<T, S>(problem, shared, tasks, warpgroup);
  }
#else
  __trap();  // an output that nobody wrote would be worse
#endif
}

template <class T, class S>
void launch_shape(Problem problem, const LinearArguments& arguments, uintptr_t stream) {
  const Device device = current_device();
  problem.tiles.row_units = static_cast<int>((problem.n + S::kRows - 1) / S::kRows);
  problem.tiles.token_units = static_cast<int>((problem.m + S::kTokens - 1) / S::kTokens);
  const int64_t tasks = static_cast<int64_t>(problem.tiles.row_units) * problem.tiles.token_units;
  if (tasks > (1 << 30)) {
    throw std::invalid_argument("m, n: expected at most 2^30 tiles, got " + std::to_string(tasks));
  }
  const int64_t blocks = tasks < device.multiprocessors ? tasks : device.multiprocessors;
  const TensorMap x = map_matrix(arguments.x, Bits<T>::kType == Float::bf16 ? Element::bf16 : Element::f16, problem.m,
                                 problem.k, S::kTokens);
  launch("ovp_linear_wgmma", ovp_linear_wgmma_kernel<T, S>,
         Launch{static_cast<unsigned>(blocks), 1, kWgmmaThreads, S::kShared, 1, stream, true}, problem, x);
}

template <class T, int kGroups>
void launch_tile(const Problem& problem, const LinearArguments& arguments, const WgmmaTile& tile, uintptr_t stream) {
  const auto is = [&](int rows, int tokens) { return tile.rows == rows && tile.tokens == tokens; };
  if (is(128, 64)) return launch_shape<T, Shape<kGroups, 1, 64, 8, 4>>(problem, arguments, stream);
  if (is(128, 128)) return launch_shape<T, Shape<kGroups, 1, 128, 6, 4>>(problem, arguments, stream);
  if (is(128, 256)) return launch_shape<T, Shape<kGroups, 1, 256, 4, 3>>(problem, arguments, stream);
  if (is(256, 128)) return launch_shape<T, Shape<kGroups, 2, 128, 6, 4>>(problem, arguments, stream);
  throw std::invalid_argument("rows, tokens: expected 128, 64 or 128, 128 or 128, 256 or 256, 128, got " +
                              std::to_string(tile.rows) + ", " + std::to_string(tile.tokens));
}

template <class T>
void launch_groups(const Problem& problem, const LinearArguments& arguments, const WgmmaTile& tile, uintptr_t stream) {
  if (arguments.weight.group_size == 32) return launch_tile<T, 2>(problem, arguments, tile, stream);
  return launch_tile<T, 1>(problem, arguments, tile, stream);
}

}  // namespace

void ovp_linear_wgmma(const LinearArguments& arguments, const WgmmaTile& tile, uintptr_t stream) {
  if (current_device().capability != 90) {
    throw std::invalid_argument("device: expected compute capability 9.0 for wgmma, got another");
  }
  Problem problem = {};
  problem.weight = packed_reader(arguments.weight);
  problem.codebook = arguments.weight.codebook;
  problem.m = arguments.m, problem.n = arguments.weight.n, problem.k = arguments.weight.k;
  problem.bias = arguments.bias, problem.bias_type = arguments.bias_type;
  problem.out = arguments.out;
  if (arguments.type == Float::f16) return launch_groups<__half>(problem, arguments, tile, stream);
  if (arguments.type == Float::bf16) return launch_groups<__nv_bfloat16>(problem, arguments, tile, stream);
  throw std::invalid_argument("type: expected float16 or bfloat16 activations");
}

}  // namespace olive::cuda
