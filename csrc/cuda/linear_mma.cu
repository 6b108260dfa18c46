// y = x W^T + bias for few activation rows, on every GPU from sm_80: mma.sync with the weight as the operand of 16
// rows, so that activations are padded to 8 and not to 16 or 64. mma_tiles.cuh is the frame.
//
// The sums of a 64-column tile (32 for groups of 32) are taken with bare levels, then scaled in float32: nothing is
// rounded before the output is.
//
// Counted per warp and 64 columns of 16 rows (1024 weights): 16 table loads + 8 clocks of shared memory per 8
// activation rows and row tile they are shared by: 46 weights per clock at M <= 8 (four row tiles), above the memory's
// 40, 34 at M = 16 (two), 21 at M = 64, where the products themselves take as long.
#include <type_traits>

#include "cuda/mma_tiles.cuh"

namespace olive::cuda {
namespace {

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
__device__ __forceinline__ void multiply_step(Sums<float, S>& total, const TileCodes<S::kGroups> (&codes)[S::kRowTiles],
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

template <class T>
struct FloatWork {
  using Sum = float;
  static __device__ __forceinline__ void fill(unsigned char* table, const int8_t* codebook, int thread, int threads) {
    fill_table<T>(table, codebook, thread, threads, 1.0f);
  }
  template <class S>
  static __device__ __forceinline__ void step(const MmaProblem&, Sums<float, S>& total,
                                              const TileCodes<S::kGroups> (&codes)[S::kRowTiles],
                                              const unsigned char* table, uint32_t activations, int64_t, int,
                                              int lane) {
    multiply_step<T, S>(total, codes, table, activations, lane);
  }
  static __device__ __forceinline__ void finish(const MmaProblem& problem, float value, int64_t row, int64_t token) {
    if (problem.bias != nullptr) value += load_float(problem.bias, row, problem.bias_type);
    static_cast<uint16_t*>(problem.out)[token * problem.n + row] = static_cast<uint16_t>(round_pair<T>(value, value));
  }
};

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks) ovp_linear_mma_kernel(const MmaProblem problem) {
  multiply_tiles<FloatWork<T>, S>(problem);
}

template <class T, class S>
void launch_shape(const MmaProblem& problem, uintptr_t stream) {
  launch_tiles<FloatWork<T>, S>("ovp_linear_mma", ovp_linear_mma_kernel<T, S>, problem, stream);
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

template <class T, int kGroups>
void launch_tokens(const MmaProblem& problem, int tokens, uintptr_t stream) {
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
void launch_groups(const MmaProblem& problem, int group_size, int tokens, uintptr_t stream) {
  if (group_size == 32) return launch_tokens<T, 2>(problem, tokens, stream);
  return launch_tokens<T, 1>(problem, tokens, stream);
}

}  // namespace

const MmaShape* mma_shapes() {
  static const MmaShape shapes[kMmaShapes] = {describe_shape<Tokens8<1>>(), describe_shape<Tokens16<1>>(),
                                              describe_shape<Tokens32<1>>(), describe_shape<Tokens64<1>>()};
  return shapes;
}

void ovp_linear_mma(const LinearArguments& arguments, const MmaTile& tile, uintptr_t stream) {
  if (arguments.m == 0) return;
  MmaProblem problem = {};
  problem.weight = packed_reader(arguments.weight);
  problem.codebook = arguments.weight.codebook;
  problem.x = static_cast<const unsigned char*>(arguments.x);
  problem.m = arguments.m, problem.n = arguments.weight.n;
  problem.row_bytes = static_cast<uint32_t>(arguments.weight.k * 2);
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
