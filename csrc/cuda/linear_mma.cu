// y = x W^T + bias for few activation rows, on every GPU from sm_80: mma.sync with the weight as the operand of 16
// rows, so that activations are padded to 8 and not to 16 or 64.
//
// A block holds 16 kRowTiles kWarpsN weight rows and 8 kTokenTiles activation rows, its warps also share the columns
// (kWarpsK). Codes go from memory to registers, kAhead steps before they are needed, past the end of one tile into
// the next; activations go through shared memory. Blocks are persistent: each takes a run of tiles. Where there are
// too few tiles, `split` blocks share the columns of one and add up through the cluster's shared memory, in a fixed
// order, so the same bits come out every time.
//
// The sums of a 64-column tile (32 for groups of 32) are taken with bare levels, then scaled in float32: nothing is
// rounded before the output is.
//
// Counted per warp and 64 columns of 16 rows (1024 weights): 16 table loads + 8 clocks of shared memory per 8
// activation rows and row tile they are shared by; with two row tiles 43 weights per clock at M <= 16, above the
// memory's 40, 21 at M = 64, where the products themselves take as long.
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/packed_reader.cuh"
#include "cuda/pair_table.cuh"
#include "cuda/runtime.cuh"

namespace olive::cuda {
namespace {

struct Problem {
  PackedReader weight;
  const int8_t* codebook;
  const unsigned char* x;  // [m, k] of 16-bit values
  int64_t m, n;
  int k;
  const void* bias;
  Float bias_type;
  void* out;
  float* partial;
  int row_units, token_units;
  int split;
};

// kGroups: groups of weights in 64 columns, 2 for groups of 32, else 1.
template <int kGroupsV, int kTokenTilesV, int kRowTilesV, int kWarpsNV, int kWarpsKV, int kStagesV, int kAheadV,
          int kMinBlocksV>
struct Shape {
  static constexpr int kGroups = kGroupsV;
  static constexpr int kTokenTiles = kTokenTilesV, kRowTiles = kRowTilesV, kWarpsN = kWarpsNV, kWarpsK = kWarpsKV;
  static constexpr int kStages = kStagesV, kAhead = kAheadV, kMinBlocks = kMinBlocksV;
  static constexpr int kThreads = 32 * kWarpsN * kWarpsK;
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kRows = 16 * kRowTiles * kWarpsN;
  static constexpr int kStageBytes = kWarpsK * kTokens * kTileColumns * 2;
  static constexpr int kPitch = kRows + 4;  // floats; the four keep the lanes of a fragment in different banks
  static constexpr int kSlots = kWarpsK >= 4 ? kWarpsK / 2 : kWarpsK;  // of sums in shared memory
  static constexpr int kSumBytes = kSlots * kTokens * kPitch * 4;
  static constexpr int kShared = kTableBytes + kStages * kStageBytes + kSumBytes;
};

// Which tile (row unit x token unit) a stream of loads or products is at, and which step along K.
struct Cursor {
  int task, step;
};

// The codes of this warp's row tiles, step after step and tile after tile. A tile has a whole number of rounds of
// kAhead steps, of which the last may be beyond its end: the ring of registers then starts anew with each tile.
template <class S>
struct CodeStream {
  TileRows rows;
  Cursor at;

  __device__ void place(const Problem& problem, int warp_n, int lane) {
    const int first = (at.task / problem.token_units * S::kWarpsN + warp_n) * S::kRowTiles;
    rows = problem.weight.rows(first, S::kRowTiles, lane);
  }
  __device__ void load(TileCodes<S::kGroups> (&to)[S::kRowTiles], const Problem& problem, int warp_k) const {
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r)
      to[r] = problem.weight.load<S::kGroups>(rows, r, at.step * S::kWarpsK + warp_k);
  }
};

// Activations on their way to the stages, 16 bytes a copy: [warp along K, token, 128 bytes], chunks swizzled by token.
// Rows past M are not copied: whatever the stage holds there goes to outputs that nobody writes.
template <class S>
struct ActivationStream {
  static constexpr int kLines = S::kThreads / 8;                       // of 128 bytes that the block copies at once
  static constexpr int kCopies = S::kWarpsK * S::kTokens / kLines;     // per thread
  static constexpr bool kSameToken = kLines % S::kTokens == 0;         // a thread's copies differ by columns only
  static constexpr int kColumns = kLines / S::kTokens * kTileColumns;  // then by so many
  static_assert(kCopies * kLines == S::kWarpsK * S::kTokens, "whole copies");
  static_assert(kLines % 8 == 0, "a thread's copies have the same swizzle");
  static_assert(kSameToken || S::kWarpsK == 1, "or by tokens only");
  const unsigned char* from;  // of the first copy at step 0
  int tokens;                 // left from the first copy's on
  Cursor at;

  static __device__ int line() { return threadIdx.x / 8; }
  static __device__ int column() { return line() / S::kTokens * kTileColumns + threadIdx.x % 8 * 8; }

  __device__ void place(const Problem& problem) {
    const int64_t row = static_cast<int64_t>(at.task % problem.token_units) * S::kTokens + line() % S::kTokens;
    from = problem.x + (row * problem.k + column()) * 2;
    tokens = problem.m - row > S::kTokens ? S::kTokens : static_cast<int>(problem.m - row);
  }
  __device__ void copy(const Problem& problem, uint32_t stage) const {
    const int first = at.step * (S::kWarpsK * kTileColumns);
    const uint32_t to = stage + line() * 128 + ((threadIdx.x ^ line()) & 7) * 16;
#pragma unroll
    for (int c = 0; c < kCopies; ++c) {
      const int here = first + (kSameToken ? c * kColumns : 0);
      const int64_t below = kSameToken ? 0 : static_cast<int64_t>(c * kLines) * problem.k;
      const bool valid = here + column() < problem.k;
      if (tokens > (kSameToken ? 0 : c * kLines)) {
        copy_async(to + c * kLines * 128, valid ? from + (below + here) * 2 : problem.x, valid);
      }
    }
  }
};

template <class S>
using Sums = float[S::kRowTiles][S::kTokenTiles][4];

// Activations of eight tokens: 64 columns as four products x two registers.
template <class S>
__device__ __forceinline__ void load_activations(uint32_t (&b)[4][2], uint32_t activations, int t, int lane) {
  const int token = 8 * t + lane % 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t loaded[4];
    load_matrices(loaded, activations + token * 128 + ((4 * half + lane / 8) ^ (token & 7)) * 16);
    b[2 * half][0] = loaded[0], b[2 * half][1] = loaded[1];
    b[2 * half + 1][0] = loaded[2], b[2 * half + 1][1] = loaded[3];
  }
}

template <class T>
__device__ __forceinline__ void multiply(float (&part)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool first) {
  if (first) {
    multiply_16x8x16<T, false>(part, a, b[0], b[1]);
  } else {
    multiply_16x8x16<T, true>(part, a, b[0], b[1]);
  }
}

__device__ __forceinline__ void add_scaled(float (&total)[4], const float (&part)[4], uint32_t scales) {
  const float low = low_scale(scales), high = high_scale(scales);
  total[0] += low * part[0];
  total[1] += low * part[1];
  total[2] += high * part[2];
  total[3] += high * part[3];
}

// The products of one step of this warp: 64 columns. What there is less of stays in registers: few tokens, and each
// fragment of the weight is used as soon as it is decoded; many, and the weight is decoded before.
template <class T, class S>
__device__ __forceinline__ void multiply_step(Sums<S>& total, const TileCodes<S::kGroups> (&codes)[S::kRowTiles],
                                              const unsigned char* table, uint32_t activations, int lane) {
  constexpr int kProducts = 4 / S::kGroups;  // of 16 columns, per group
  if constexpr (S::kTokenTiles <= 2) {
    uint32_t b[S::kTokenTiles][4][2];
#pragma unroll
    for (int t = 0; t < S::kTokenTiles; ++t) load_activations<S>(b[t], activations, t, lane);
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
      for (int group = 0; group < S::kGroups; ++group) {
        const TableRows rows(codes[r].scales[group], lane);
        float part[S::kTokenTiles][4];
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
          const int product = group * kProducts + i;
          uint32_t a[4];
          decode_fragment(a, table, rows, codes[r].word(product));
#pragma unroll
          for (int t = 0; t < S::kTokenTiles; ++t) multiply<T>(part[t], a, b[t][product], i == 0);
        }
#pragma unroll
        for (int t = 0; t < S::kTokenTiles; ++t) add_scaled(total[r][t], part[t], codes[r].scales[group]);
      }
    }
  } else {
    uint32_t a[S::kRowTiles][4][4];
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
      for (int product = 0; product < 4; ++product) {
        const TableRows rows(codes[r].scales[product / kProducts], lane);
        decode_fragment(a[r][product], table, rows, codes[r].word(product));
      }
    }
#pragma unroll
    for (int t = 0; t < S::kTokenTiles; ++t) {
      if (t > 0 && t % 2 == 0) __syncwarp();  // or the compiler fetches every token's activations at once, and spills
      uint32_t b[4][2];
      load_activations<S>(b, activations, t, lane);
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
        for (int group = 0; group < S::kGroups; ++group) {
          float part[4];
#pragma unroll
          for (int i = 0; i < kProducts; ++i) {
            const int product = group * kProducts + i;
            multiply<T>(part, a[r][product], b[product], i == 0);
          }
          add_scaled(total[r][t], part, codes[r].scales[group]);
        }
      }
    }
  }
}

// Where a lane's sums of one fragment go: [slot, token, row].
template <class S, class Use>
__device__ __forceinline__ void for_each_sum(Sums<S>& total, float* sums, int slot, int warp_n, int lane, Use use) {
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
    for (int t = 0; t < S::kTokenTiles; ++t) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = 16 * (warp_n * S::kRowTiles + r) + lane / 4 + 8 * (c >> 1);
        const int token = 8 * t + 2 * (lane % 4) + (c & 1);
        use(total[r][t][c], sums[(slot * S::kTokens + token) * S::kPitch + row]);
      }
    }
  }
}

// Adds up what the warps along K and the blocks of the cluster have, always in the same order, and writes the tile.
template <class T, class S>
__device__ __forceinline__ void write_tile(const Problem& problem, Sums<S>& total, float* sums, int rank, int task,
                                           int warp_n, int warp_k, int lane) {
  const auto put = [](float& own, float& shared) { shared = own; };
  const auto add = [](float& own, float& shared) { own += shared; };
  if (S::kSlots < S::kWarpsK) {  // the second half of the warps gives its sums to the first
    if (warp_k >= S::kSlots) for_each_sum<S>(total, sums, warp_k - S::kSlots, warp_n, lane, put);
    __syncthreads();
    if (warp_k < S::kSlots) for_each_sum<S>(total, sums, warp_k, warp_n, lane, add);
    __syncthreads();
  }
  if (warp_k < S::kSlots) for_each_sum<S>(total, sums, warp_k, warp_n, lane, put);
  const bool together = problem.split > 1 && problem.partial == nullptr;
  if (together) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  const int row_unit = task / problem.token_units, token_unit = task - row_unit * problem.token_units;
  const int64_t first_row = static_cast<int64_t>(row_unit) * S::kRows;
  const int64_t first_token = static_cast<int64_t>(token_unit) * S::kTokens;
  // The cluster's blocks share the outputs.
  const int share = together ? problem.split : 1;
  for (int i = (together ? rank : 0) * S::kThreads + threadIdx.x; i < S::kTokens * S::kRows; i += share * S::kThreads) {
    const int row = i % S::kRows, token = i / S::kRows;
    if (first_row + row >= problem.n || first_token + token >= problem.m) continue;
    const float* from = sums + token * S::kPitch + row;
    float value = 0.0f;
    if (together) {
      for (int other = 0; other < problem.split; ++other) {
#pragma unroll
        for (int w = 0; w < S::kSlots; ++w) value += load_from_rank(from + w * S::kTokens * S::kPitch, other);
      }
    } else {
#pragma unroll
      for (int w = 0; w < S::kSlots; ++w) value += from[w * S::kTokens * S::kPitch];
    }
    const int64_t index = (first_token + token) * problem.n + first_row + row;
    if (problem.partial != nullptr) {
      problem.partial[rank * problem.m * problem.n + index] = value;
      continue;
    }
    if (problem.bias != nullptr) value += load_float(problem.bias, first_row + row, problem.bias_type);
    static_cast<uint16_t*>(problem.out)[index] = static_cast<uint16_t>(round_pair<T>(value, value));
  }
  if (together) {
    cluster_sync();  // the others have read this block's sums
  } else {
    __syncthreads();
  }
}

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks) ovp_linear_mma_kernel(const Problem problem) {
  OLIVE_SHARED(shared);
  const unsigned char* table = shared;
  const uint32_t stages = shared_address(shared + kTableBytes);
  float* sums = reinterpret_cast<float*>(shared + kTableBytes + S::kStages * S::kStageBytes);
  const int lane = threadIdx.x % 32, warp_n = threadIdx.x / 32 % S::kWarpsN, warp_k = threadIdx.x / 32 / S::kWarpsN;

  const int workers = gridDim.x / problem.split, worker = blockIdx.x / problem.split;
  const int rank = blockIdx.x - worker * problem.split;
  const int64_t tasks = static_cast<int64_t>(problem.row_units) * problem.token_units;
  const int first_task = static_cast<int>(tasks * worker / workers);
  const int end_task = static_cast<int>(tasks * (worker + 1) / workers);
  const int all_steps = (problem.weight.column_tiles + S::kWarpsK - 1) / S::kWarpsK;
  const int first_step = static_cast<int>(static_cast<int64_t>(all_steps) * rank / problem.split);
  const int end_step = static_cast<int>(static_cast<int64_t>(all_steps) * (rank + 1) / problem.split);
  const int end_round = first_step + (end_step - first_step + S::kAhead - 1) / S::kAhead * S::kAhead;

  CodeStream<S> code_stream;
  TileCodes<S::kGroups> codes[S::kAhead][S::kRowTiles];
  code_stream.at = {first_task, first_step};
  code_stream.place(problem, warp_n, lane);
  const auto load_codes = [&](TileCodes<S::kGroups>(&to)[S::kRowTiles]) {
    if (code_stream.at.step < end_step && code_stream.at.task < end_task) code_stream.load(to, problem, warp_k);
    if (++code_stream.at.step == end_round) {
      code_stream.at = {code_stream.at.task + 1, first_step};
      code_stream.place(problem, warp_n, lane);
    }
  };
  ActivationStream<S> activation_stream;
  activation_stream.at = {first_task, first_step};
  activation_stream.place(problem);
  const auto copy_activations = [&](int stage) {
    if (activation_stream.at.task < end_task && first_step < end_step) {
      activation_stream.copy(problem, stages + stage * S::kStageBytes);
      if (++activation_stream.at.step == end_step) {
        activation_stream.at = {activation_stream.at.task + 1, first_step};
        activation_stream.place(problem);
      }
    }
    copy_async_commit();
  };
#pragma unroll
  for (int j = 0; j < S::kAhead; ++j) load_codes(codes[j]);
#pragma unroll
  for (int j = 0; j < S::kStages - 1; ++j) copy_activations(j);
  fill_table<T>(shared, problem.codebook, threadIdx.x, S::kThreads, 1.0f);

  int stage = 0;
  for (int task = first_task; task < end_task; ++task) {
    float total[S::kRowTiles][S::kTokenTiles][4] = {};
    for (int step = first_step; step < end_round; step += S::kAhead) {
#pragma unroll
      for (int j = 0; j < S::kAhead; ++j) {
        if (step + j < end_step) {
          copy_async_wait<S::kStages - 2>();
          __syncthreads();  // every thread's copies have landed, and the stage before is free
          copy_activations(stage == 0 ? S::kStages - 1 : stage - 1);
          const uint32_t activations = stages + stage * S::kStageBytes + warp_k * S::kTokens * 128;
          multiply_step<T, S>(total, codes[j], table, activations, lane);
          stage = stage + 1 == S::kStages ? 0 : stage + 1;
        }
        load_codes(codes[j]);
      }
    }
    write_tile<T, S>(problem, total, sums, rank, task, warp_n, warp_k, lane);
  }
}

// The blocks' partial sums, first to last, where blocks cannot form clusters.
template <class T>
__global__ void sum_partial_kernel(const Problem problem) {
  const int64_t count = problem.m * problem.n;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    float value = 0.0f;
    for (int rank = 0; rank < problem.split; ++rank) value += problem.partial[rank * count + i];
    if (problem.bias != nullptr) value += load_float(problem.bias, i % problem.n, problem.bias_type);
    static_cast<uint16_t*>(problem.out)[i] = static_cast<uint16_t>(round_pair<T>(value, value));
  }
}

template <class T, class S>
void launch_shape(Problem problem, uintptr_t stream) {
  const Device device = current_device();
  problem.row_units = (problem.weight.row_tiles + S::kRowTiles * S::kWarpsN - 1) / (S::kRowTiles * S::kWarpsN);
  problem.token_units = static_cast<int>((problem.m + S::kTokens - 1) / S::kTokens);
  if (S::kShared > device.shared_per_block) {
    throw std::invalid_argument("tokens: expected a tile that fits " + std::to_string(device.shared_per_block) +
                                " bytes of shared memory, got " + std::to_string(S::kTokens));
  }
  if (static_cast<int64_t>(problem.row_units) * ((problem.m + S::kTokens - 1) / S::kTokens) > (1 << 30)) {
    throw std::invalid_argument("m, n: expected at most 2^30 tiles, got M " + std::to_string(problem.m) + ", N " +
                                std::to_string(problem.n));
  }
  if (problem.split > 1 && problem.partial == nullptr && !device.clusters) {
    throw std::invalid_argument("partial: expected a buffer, because blocks form no clusters here, got none");
  }
  constexpr int kReserved = 1024;  // of shared memory, per block
  const int fitting = device.shared_per_processor / (S::kShared + kReserved);
  const int64_t resident = static_cast<int64_t>(device.multiprocessors) * (fitting < 1               ? 1
                                                                           : fitting < S::kMinBlocks ? fitting
                                                                                                     : S::kMinBlocks);
  const int64_t tasks = static_cast<int64_t>(problem.row_units) * problem.token_units;
  const int64_t most = resident / problem.split > 1 ? resident / problem.split : 1;
  const unsigned workers = static_cast<unsigned>(tasks < most ? tasks : most);
  const bool together = problem.split > 1 && problem.partial == nullptr;
  Launch shape = {workers * problem.split, 1, S::kThreads, S::kShared, together ? problem.split : 1u, stream};
  launch("ovp_linear_mma", ovp_linear_mma_kernel<T, S>, shape, problem);
  if (problem.partial != nullptr) {
    const int64_t blocks = (problem.m * problem.n + 255) / 256, limit = 8 * device.multiprocessors;
    launch("sum_partial", sum_partial_kernel<T>,
           Launch{static_cast<unsigned>(blocks < limit ? blocks : limit), 1, 256, 0, 1, stream}, problem);
  }
}

// Shared memory of the first two fits GPUs that give a block 99 KiB (sm_86, sm_89, sm_120). Groups of 32 hold more
// scales in registers, so they look less far ahead.
template <int kGroups>
using Tokens8 = std::conditional_t<kGroups == 1, Shape<1, 1, 4, 1, 8, 3, 2, 2>, Shape<2, 1, 2, 2, 4, 3, 3, 2>>;
template <int kGroups>
using Tokens16 = Shape<kGroups, 2, 2, 4, 2, 4, kGroups == 1 ? 2 : 4, kGroups == 1 ? 2 : 1>;
template <int kGroups>
using Tokens32 = Shape<kGroups, 4, 2, 4, 2, 4, 4, 1>;
template <int kGroups>
using Tokens64 = Shape<kGroups, 8, kGroups == 1 ? 2 : 1, 8, 1, 4, 2, 1>;
static_assert(Tokens8<1>::kShared <= 99 * 1024 && Tokens8<2>::kShared <= 99 * 1024, "99 KiB");
static_assert(Tokens16<1>::kShared <= 99 * 1024, "99 KiB");

template <class S>
constexpr MmaShape describe() {
  return {S::kTokens, S::kRows, S::kWarpsK, S::kMinBlocks, S::kShared};
}

template <class T, int kGroups>
void launch_tokens(const Problem& problem, int tokens, uintptr_t stream) {
  switch (tokens) {
    case 8:
      return launch_shape<T, Tokens8<kGroups>>(problem, stream);
    case 16:
      return launch_shape<T, Tokens16<kGroups>>(problem, stream);
    case 32:
      return launch_shape<T, Tokens32<kGroups>>(problem, stream);
    case 64:
      return launch_shape<T, Tokens64<kGroups>>(problem, stream);
    default:
      throw std::invalid_argument("tokens: expected 8, 16, 32 or 64, got " + std::to_string(tokens));
  }
}

template <class T>
void launch_groups(const Problem& problem, int group_size, int tokens, uintptr_t stream) {
  if (group_size == 32) return launch_tokens<T, 2>(problem, tokens, stream);
  return launch_tokens<T, 1>(problem, tokens, stream);
}

}  // namespace

const MmaShape* mma_shapes() {
  static const MmaShape shapes[kMmaShapes] = {describe<Tokens8<1>>(), describe<Tokens16<1>>(), describe<Tokens32<1>>(),
                                              describe<Tokens64<1>>()};
  return shapes;
}

void ovp_linear_mma(const LinearArguments& arguments, const MmaTile& tile, uintptr_t stream) {
  if (arguments.m == 0) return;
  Problem problem = {};
  problem.weight = packed_reader(arguments.weight);
  problem.codebook = arguments.weight.codebook;
  problem.x = static_cast<const unsigned char*>(arguments.x);
  problem.m = arguments.m, problem.n = arguments.weight.n, problem.k = static_cast<int>(arguments.weight.k);
  problem.bias = arguments.bias, problem.bias_type = arguments.bias_type;
  problem.out = arguments.out, problem.partial = arguments.partial;
  problem.split = tile.split;
  if (arguments.type == Float::f16)
    return launch_groups<__half>(problem, arguments.weight.group_size, tile.tokens, stream);
  if (arguments.type == Float::bf16) {
    return launch_groups<__nv_bfloat16>(problem, arguments.weight.group_size, tile.tokens, stream);
  }
  throw std::invalid_argument("type: expected float16 or bfloat16 activations");
}

}  // namespace olive::cuda
