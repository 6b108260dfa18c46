// The frame of the kernels that multiply with mma.sync: which tiles a block takes, how codes and activations reach its
// warps, how the warps' and blocks' sums become outputs. What is multiplied and summed is a parameter (Work).
//
// A block holds 16 kRowTiles kWarpsN weight rows and 8 kTokenTiles activation rows, its warps also share the columns
// (kWarpsK). Codes go from memory to registers, kAhead steps before they are needed, past the end of one tile into
// the next; activations go through shared memory. Blocks are persistent: each takes a run of tiles. Where there are
// too few tiles, `split` blocks share the columns of one and add up through the cluster's shared memory, in a fixed
// order, so the same bits come out every time.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/packed_reader.cuh"
#include "cuda/pair_table.cuh"
#include "cuda/runtime.cuh"

namespace olive::cuda {

struct MmaProblem {
  PackedReader weight;
  const int8_t* codebook;
  const unsigned char* x;  // [m, row_bytes]
  int64_t m, n;
  uint32_t row_bytes;
  const void* bias;
  Float bias_type;
  void* out;
  Float out_type;
  void* partial;  // [split, m, n] sums
  int row_units, token_units;
  int split;
  const float* scale_x;  // [groups, pitch], of quantized activations
  int64_t scale_pitch;
  int groups_x, group_shift_x;  // columns per group as a shift of 32 columns; 31 = one group
};

// kGroups: runs of columns with scales of their own in 64 columns, 2 for groups of 32, else 1. kLine: bytes of 64
// columns of activations.
template <int kGroupsV, int kTokenTilesV, int kRowTilesV, int kWarpsNV, int kWarpsKV, int kStagesV, int kAheadV,
          int kMinBlocksV, int kLineV = 128>
struct Shape {
  static constexpr int kGroups = kGroupsV;
  static constexpr int kTokenTiles = kTokenTilesV, kRowTiles = kRowTilesV, kWarpsN = kWarpsNV, kWarpsK = kWarpsKV;
  static constexpr int kStages = kStagesV, kAhead = kAheadV, kMinBlocks = kMinBlocksV;
  static constexpr int kLine = kLineV;
  // Steps that codes are brought to L2 before they are loaded. Loads to registers alone hide less than they seem to:
  // the compiler has six counters for all that is on its way, and waits for the newest load to use the oldest.
  // (64 tokens leave no registers for it.)
  static constexpr int kPrefetched = kTokenTiles < 8 ? 4 : 0;
  static constexpr int kThreads = 32 * kWarpsN * kWarpsK;
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kRows = 16 * kRowTiles * kWarpsN;
  static constexpr int kStageBytes = kWarpsK * kTokens * kLine;
  static constexpr int kPitch = kRows + 4;  // floats; the four keep the lanes of a fragment in different banks
  static constexpr int kSlots = kWarpsK >= 4 ? kWarpsK / 2 : kWarpsK;  // of sums in shared memory
  static constexpr int kSumBytes = kSlots * kTokens * kPitch * 4;
  static constexpr int kShared = kTableBytes + kStages * kStageBytes + kSumBytes;
};

template <class S>
constexpr MmaShape describe_shape() {
  return {S::kTokens, S::kRows, S::kWarpsK, S::kMinBlocks, S::kShared};
}

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

  __device__ void place(const MmaProblem& problem, int warp_n, int lane) {
    const int first = (at.task / problem.token_units * S::kWarpsN + warp_n) * S::kRowTiles;
    rows = problem.weight.rows(first, S::kRowTiles, lane);
  }
  __device__ void prefetch(const MmaProblem& problem, int step, int warp_k, int lane) const {
    problem.weight.prefetch_tiles<S::kRowTiles>(rows, step * S::kWarpsK + warp_k, lane);
  }
  __device__ void load(TileCodes<S::kGroups> (&to)[S::kRowTiles], const MmaProblem& problem, int warp_k) const {
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r)
      to[r] = problem.weight.load<S::kGroups>(rows, r, at.step * S::kWarpsK + warp_k);
  }
};

// Where the 16-byte chunk of a line is: so that eight lines' chunks of one number are in eight different quarters of
// the banks.
template <int kLine>
__device__ __forceinline__ uint32_t line_chunk(int chunk, int line) {
  static_assert(kLine == 64 || kLine == 128, "64 columns of 8 or 16 bits");
  return kLine == 128 ? (chunk ^ line) & 7 : (chunk ^ line >> 1) & 3;
}

// Activations on their way to the stages, 16 bytes a copy: [warp along K, token, a line of 64 columns], chunks swizzled
// by token. Rows past M are not copied: whatever the stage holds there goes to outputs that nobody writes.
template <class S>
struct ActivationStream {
  static constexpr int kChunks = S::kLine / 16;
  static constexpr int kAll = S::kWarpsK * S::kTokens;               // lines of a stage
  static constexpr int kLines = S::kThreads / kChunks;               // that the block copies at once
  static constexpr int kCopies = kAll < kLines ? 1 : kAll / kLines;  // per thread
  static constexpr bool kSameToken = kLines % S::kTokens == 0;       // its copies differ by columns only
  static constexpr uint32_t kBytes = kSameToken ? kLines / S::kTokens * S::kLine : 0;  // then by so many
  static_assert(kAll < kLines || kCopies * kLines == kAll, "whole copies");
  static_assert(kLines % 8 == 0, "a thread's copies have the same swizzle");
  static_assert(kSameToken || S::kWarpsK == 1, "or by tokens only");
  const unsigned char* from;  // of the first copy at step 0
  int tokens;                 // left from the first copy's on
  Cursor at;

  static __device__ int line() { return threadIdx.x / kChunks; }
  static __device__ uint32_t byte() { return line() / S::kTokens * S::kLine + threadIdx.x % kChunks * 16; }

  __device__ void place(const MmaProblem& problem) {
    const int64_t row = static_cast<int64_t>(at.task % problem.token_units) * S::kTokens + line() % S::kTokens;
    from = problem.x + row * problem.row_bytes + byte();
    tokens = problem.m - row > S::kTokens ? S::kTokens : static_cast<int>(problem.m - row);
    if (line() >= kAll) tokens = 0;
  }
  __device__ void copy(const MmaProblem& problem, uint32_t stage) const {
    const uint32_t first = static_cast<uint32_t>(at.step) * (S::kWarpsK * S::kLine);
    const uint32_t to = stage + line() * S::kLine + line_chunk<S::kLine>(threadIdx.x, line()) * 16;
#pragma unroll
    for (int c = 0; c < kCopies; ++c) {
      const uint32_t here = first + c * kBytes;
      const int64_t below = kSameToken ? 0 : static_cast<int64_t>(c * kLines) * problem.row_bytes;
      const bool valid = here + byte() < problem.row_bytes;
      if (tokens > (kSameToken ? 0 : c * kLines)) {
        copy_async(to + c * kLines * S::kLine, valid ? from + below + here : problem.x, valid);
      }
    }
  }
};

template <class Sum, class S>
using Sums = Sum[S::kRowTiles][S::kTokenTiles][4];

// A sum in the shared memory of another block of the cluster.
__device__ __forceinline__ float load_sum(const float* own, int rank) { return load_from_rank(own, rank); }
__device__ __forceinline__ int load_sum(const int* own, int rank) {
  return static_cast<int>(float_to_bits(load_from_rank(reinterpret_cast<const float*>(own), rank)));
}

__device__ __forceinline__ void store_output(void* out, int64_t index, Float type, float value) {
  if (type == Float::f32) {
    static_cast<float*>(out)[index] = value;
  } else {
    static_cast<uint16_t*>(out)[index] = static_cast<uint16_t>(
        type == Float::bf16 ? round_pair<__nv_bfloat16>(value, value) : round_pair<__half>(value, value));
  }
}

// Where a lane's sums of one fragment go: [slot, token, row].
template <class S, class Sum, class Use>
__device__ __forceinline__ void for_each_sum(Sums<Sum, S>& total, Sum* sums, int slot, int warp_n, int lane, Use use) {
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
template <class Work, class S, class Sum = typename Work::Sum>
__device__ __forceinline__ void write_tile(const MmaProblem& problem, Sums<Sum, S>& total, Sum* sums, int rank,
                                           int task, int warp_n, int warp_k, int lane) {
  const auto put = [](Sum& own, Sum& shared) { shared = own; };
  const auto add = [](Sum& own, Sum& shared) { own += shared; };
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
    const Sum* from = sums + token * S::kPitch + row;
    Sum value = 0;
    if (together) {
      for (int other = 0; other < problem.split; ++other) {
#pragma unroll
        for (int w = 0; w < S::kSlots; ++w) value += load_sum(from + w * S::kTokens * S::kPitch, other);
      }
    } else {
#pragma unroll
      for (int w = 0; w < S::kSlots; ++w) value += from[w * S::kTokens * S::kPitch];
    }
    const int64_t index = (first_token + token) * problem.n + first_row + row;
    if (problem.partial != nullptr) {
      static_cast<Sum*>(problem.partial)[rank * problem.m * problem.n + index] = value;
      continue;
    }
    Work::finish(problem, value, first_row + row, first_token + token);
  }
  if (together) {
    cluster_meet();  // the others have read this block's sums
  } else {
    __syncthreads();
  }
}

// What a block does. Work says what is summed and how:
//   Sum                                        float or int
//   fill(table, codebook, thread, threads)     the table of decoded pairs
//   step<S>(problem, total, codes, table, activations, token, column_tile, lane)   the products of a warp's 64 columns
//   finish(problem, sum, row, token)           writes an output
template <class Work, class S>
__device__ __forceinline__ void multiply_tiles(const MmaProblem& problem) {
  using Sum = typename Work::Sum;
  OLIVE_SHARED(shared);
  const unsigned char* table = shared;
  const uint32_t stages = shared_address(shared + kTableBytes);
  Sum* sums = reinterpret_cast<Sum*>(shared + kTableBytes + S::kStages * S::kStageBytes);
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
    if (code_stream.at.step < end_step && code_stream.at.task < end_task) {
      code_stream.load(to, problem, warp_k);
      const int later = code_stream.at.step + S::kPrefetched;
      if (S::kPrefetched > 0 && later < end_step) code_stream.prefetch(problem, later, warp_k, lane);
    }
    if (++code_stream.at.step == end_round) {
      code_stream.at = {code_stream.at.task + 1, first_step};
      code_stream.place(problem, warp_n, lane);
    }
  };
  for (int step = first_step; step < end_step && step < first_step + S::kPrefetched; ++step) {
    code_stream.prefetch(problem, step, warp_k, lane);
  }
  wait_for_launch_before();
  let_next_launch_start();
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
  Work::fill(shared, problem.codebook, threadIdx.x, S::kThreads);

  int stage = 0;
  for (int task = first_task; task < end_task; ++task) {
    Sums<Sum, S> total = {};
    const int64_t token = static_cast<int64_t>(task % problem.token_units) * S::kTokens;
    for (int step = first_step; step < end_round; step += S::kAhead) {
#pragma unroll
      for (int j = 0; j < S::kAhead; ++j) {
        if (step + j < end_step) {
          copy_async_wait<S::kStages - 2>();
          __syncthreads();  // every thread's copies have landed, and the stage before is free
          copy_activations(stage == 0 ? S::kStages - 1 : stage - 1);
          const uint32_t activations = stages + stage * S::kStageBytes + warp_k * S::kTokens * S::kLine;
          Work::template step<S>(problem, total, codes[j], table, activations, token, (step + j) * S::kWarpsK + warp_k,
                                 lane);
          stage = stage + 1 == S::kStages ? 0 : stage + 1;
        }
        load_codes(codes[j]);
      }
    }
    write_tile<Work, S>(problem, total, sums, rank, task, warp_n, warp_k, lane);
  }
}

// The blocks' partial sums, first to last, where blocks cannot form clusters.
template <class Work>
__global__ void sum_partial_kernel(const MmaProblem problem) {
  const int64_t count = problem.m * problem.n;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    typename Work::Sum value = 0;
    for (int rank = 0; rank < problem.split; ++rank)
      value += static_cast<const typename Work::Sum*>(problem.partial)[rank * count + i];
    Work::finish(problem, value, i % problem.n, i / problem.n);
  }
}

template <class Work, class S>
void launch_tiles(const char* name, void (*kernel)(MmaProblem), MmaProblem problem, uintptr_t stream) {
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
  Launch shape = {workers * problem.split, 1, S::kThreads, S::kShared, together ? problem.split : 1u, stream, true};
  launch(name, kernel, shape, problem);
  if (problem.partial != nullptr) {
    const int64_t blocks = (problem.m * problem.n + 255) / 256, limit = 8 * device.multiprocessors;
    launch("sum_partial", sum_partial_kernel<Work>,
           Launch{static_cast<unsigned>(blocks < limit ? blocks : limit), 1, 256, 0, 1, stream}, problem);
  }
}

}  // namespace olive::cuda
