// y = x W^T + bias with int8 levels of activations and weights, for few activation rows, on every GPU from sm_80:
// mma.sync on int8, exact int32 sums. mma_tiles.cuh is the frame; csrc/core/fragments.h says why bytes that were laid
// out for 16-bit products serve.
//
// Where rows of both matrices have one scale each, int32 sums are taken over all columns, and warps and blocks add up
// integers: the definition's bits (olive/ops/reference_quantized.py). Else the sums of 64 columns, 32 in groups of 32,
// are scaled and added in float32, one fused multiply-add each as in the definition, but in the order in which warps
// and blocks share the columns.
//
// Such a sum starts at 1.5 x 2^23 as float32 bits, so that it counts in the last bits of a float: one subtraction makes
// a float of it, where a conversion would run at half rate, on 8.0 at a quarter.
//
// Counted per warp and 64 columns of 16 rows (1024 weights): 16 look-ups and 24 byte permutations, 2 products and 8
// scalings per 8 activation rows. docs/gpu_kernels.md has the machine code's count.
#include <type_traits>

#include "cuda/mma_tiles.cuh"

namespace olive::cuda {
namespace {

enum class Scaling {
  kOnce,      // one scale per row of either matrix: at the end
  kByWeight,  // groups of weights; a row of x has one scale, applied at the end
  kByBoth     // groups of activations
};

constexpr int kFloatBits = 0x4B400000;     // of 1.5 x 2^23
constexpr float kFloatZero = 12582912.0f;  // the same as a float: sums within 2^22 keep their place
static_assert(64 * 127 * 127 < 1 << 22, "64 columns' sums do");

// Activations of eight tokens: 64 columns as two products x two registers.
template <class S>
__device__ __forceinline__ void load_levels(uint32_t (&b)[4], uint32_t activations, int t, int lane) {
  const int token = 8 * t + lane % 8;
  load_matrices(b, activations + token * S::kLine + line_chunk<S::kLine>(lane / 8, token) * 16);
}

// Scales of a step's activations: of the two tokens of a lane in every eight.
template <class S>
struct TokenScales {
  float value[S::kGroups][S::kTokenTiles][2];

  __device__ __forceinline__ void load(const MmaProblem& problem, int64_t token, int column_tile, int lane) {
#pragma unroll
    for (int part = 0; part < S::kGroups; ++part) {
      const int found = (2 * column_tile + part) >> problem.group_shift_x;
      const int group = found < problem.groups_x ? found : problem.groups_x - 1;  // past K: levels are zero
      const float* from = problem.scale_x + group * problem.scale_pitch + token + 2 * (lane % 4);
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
        value[part][t][0] = from[8 * t];  // not through the read-only path: the launch before wrote it
        value[part][t][1] = from[8 * t + 1];
      }
    }
  }
};

__device__ __forceinline__ float sum_to_float(int sum) {
  return bits_to_float(static_cast<uint32_t>(sum)) - kFloatZero;
}

__device__ __forceinline__ void add_scaled(float (&total)[4], const int (&part)[4], uint32_t scales) {
  const float low = low_scale(scales), high = high_scale(scales);
  total[0] = fmaf(sum_to_float(part[0]), low, total[0]);
  total[1] = fmaf(sum_to_float(part[1]), low, total[1]);
  total[2] = fmaf(sum_to_float(part[2]), high, total[2]);
  total[3] = fmaf(sum_to_float(part[3]), high, total[3]);
}

__device__ __forceinline__ void add_scaled(float (&total)[4], const int (&part)[4], uint32_t scales,
                                           const float (&scale_x)[2]) {
  const float low = low_scale(scales), high = high_scale(scales);
  total[0] = fmaf(sum_to_float(part[0]), __fmul_rn(scale_x[0], low), total[0]);
  total[1] = fmaf(sum_to_float(part[1]), __fmul_rn(scale_x[1], low), total[1]);
  total[2] = fmaf(sum_to_float(part[2]), __fmul_rn(scale_x[0], high), total[2]);
  total[3] = fmaf(sum_to_float(part[3]), __fmul_rn(scale_x[1], high), total[3]);
}

template <Scaling kScaling>
struct IntegerWork {
  using Sum = std::conditional_t<kScaling == Scaling::kOnce, int, float>;

  static __device__ __forceinline__ void fill(unsigned char* table, const int8_t* codebook, int thread, int threads) {
    fill_int8_table(table, codebook, thread, threads);
  }

  // One row tile times eight tokens: adds the sums of 64 columns.
  template <class S>
  static __device__ __forceinline__ void multiply(Sum (&total)[4], const uint32_t (&a)[2][4], const uint32_t (&b)[4],
                                                  const TileCodes<S::kGroups>& codes, const TokenScales<S>& scale_x,
                                                  int t) {
    if constexpr (kScaling == Scaling::kOnce) {
      multiply_int8(total, a[0], b[0], b[1]);
      multiply_int8(total, a[1], b[2], b[3]);
    } else {
#pragma unroll
      for (int part = 0; part < S::kGroups; ++part) {
        int sum[4];
        multiply_int8_from(kFloatBits, sum, a[part], b[2 * part], b[2 * part + 1]);
        if constexpr (S::kGroups == 1) multiply_int8(sum, a[1], b[2], b[3]);
        if constexpr (kScaling == Scaling::kByWeight) {
          add_scaled(total, sum, codes.scales[part]);
        } else {
          add_scaled(total, sum, codes.scales[part], scale_x.value[part][t]);
        }
      }
    }
  }

  template <class S>
  static __device__ __forceinline__ void decode(uint32_t (&a)[2][4], const unsigned char* table,
                                                const TileCodes<S::kGroups>& codes, int lane) {
#pragma unroll
    for (int product = 0; product < 2; ++product) {
      const TableRows rows(codes.scales[product * (S::kGroups - 1)], lane);
      decode_int8_fragment(a[product], table, rows, codes.word(2 * product), codes.word(2 * product + 1));
    }
  }

  // What there is less of stays in registers: few tokens, and each fragment of the weight is used as soon as it is
  // decoded; many, and the weight is decoded before.
  template <class S>
  static __device__ __forceinline__ void step(const MmaProblem& problem, Sums<Sum, S>& total,
                                              const TileCodes<S::kGroups> (&codes)[S::kRowTiles],
                                              const unsigned char* table, uint32_t activations, int64_t token,
                                              int column_tile, int lane) {
    TokenScales<S> scale_x;
    if constexpr (kScaling == Scaling::kByBoth) scale_x.load(problem, token, column_tile, lane);
    if constexpr (S::kTokenTiles <= 2) {
      uint32_t b[S::kTokenTiles][4];
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) load_levels<S>(b[t], activations, t, lane);
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
        uint32_t a[2][4];
        decode<S>(a, table, codes[r], lane);
#pragma unroll
        for (int t = 0; t < S::kTokenTiles; ++t) multiply<S>(total[r][t], a, b[t], codes[r], scale_x, t);
      }
    } else {
      uint32_t a[S::kRowTiles][2][4];
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) decode<S>(a[r], table, codes[r], lane);
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
        if (t > 0 && t % 2 == 0) __syncwarp();  // or the compiler fetches every token's activations at once, and spills
        uint32_t b[4];
        load_levels<S>(b, activations, t, lane);
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r) multiply<S>(total[r][t], a[r], b, codes[r], scale_x, t);
      }
    }
  }

  static __device__ __forceinline__ void finish(const MmaProblem& problem, Sum sum, int64_t row, int64_t token) {
    float value;
    if constexpr (kScaling == Scaling::kOnce) {
      const auto* scales = reinterpret_cast<const int16_t*>(problem.weight.scales);
      const int16_t stored = scales[row / kTileRows * kTileRows + tile_scale(static_cast<int>(row % kTileRows))];
      value = fmaf(static_cast<float>(sum), scale_value(stored), 0.0f);
    } else {
      value = sum;
    }
    if constexpr (kScaling != Scaling::kByBoth) value = __fmul_rn(value, problem.scale_x[token]);
    if (problem.bias != nullptr) value = __fadd_rn(value, load_float(problem.bias, row, problem.bias_type));
    store_output(problem.out, token * problem.n + row, problem.out_type, value);
  }
};

template <Scaling kScaling, class S>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    ovp_linear_quantized_mma_kernel(const MmaProblem problem) {
  multiply_tiles<IntegerWork<kScaling>, S>(problem);
}

// As for 16-bit products (linear_mma.cu), with half the bytes of activations.
template <int kGroups>
using Tokens8 = std::conditional_t<kGroups == 1, Shape<1, 1, 4, 1, 8, 3, 2, 2, 64>, Shape<2, 1, 2, 2, 4, 3, 3, 2, 64>>;
template <int kGroups>
using Tokens16 = Shape<kGroups, 2, 2, 4, 2, 4, kGroups == 1 ? 2 : 4, kGroups == 1 ? 2 : 1, 64>;
template <int kGroups>
using Tokens32 = Shape<kGroups, 4, 2, 4, 2, 4, 4, 1, 64>;
template <int kGroups>
using Tokens64 = Shape<kGroups, 8, kGroups == 1 ? 2 : 1, 8, 1, 4, 2, 1, 64>;
static_assert(Tokens8<1>::kShared <= 99 * 1024 && Tokens8<2>::kShared <= 99 * 1024, "99 KiB");
static_assert(Tokens16<1>::kShared <= 99 * 1024, "99 KiB");

template <Scaling kScaling, class S>
void launch_shape(const MmaProblem& problem, uintptr_t stream) {
  launch_tiles<IntegerWork<kScaling>, S>("ovp_linear_quantized_mma", ovp_linear_quantized_mma_kernel<kScaling, S>,
                                         problem, stream);
}

template <Scaling kScaling, int kGroups>
void launch_tokens(const MmaProblem& problem, int tokens, uintptr_t stream) {
  switch (tokens) {
    case 8:
      return launch_shape<kScaling, Tokens8<kGroups>>(problem, stream);
    case 16:
      return launch_shape<kScaling, Tokens16<kGroups>>(problem, stream);
    case 32:
      return launch_shape<kScaling, Tokens32<kGroups>>(problem, stream);
    case 64:
      return launch_shape<kScaling, Tokens64<kGroups>>(problem, stream);
    default:
      throw std::invalid_argument("tokens: expected 8, 16, 32 or 64, got " + std::to_string(tokens));
  }
}

}  // namespace

const MmaShape* quantized_mma_shapes() {
  static const MmaShape shapes[kMmaShapes] = {describe_shape<Tokens8<1>>(), describe_shape<Tokens16<1>>(),
                                              describe_shape<Tokens32<1>>(), describe_shape<Tokens64<1>>()};
  return shapes;
}

void ovp_linear_quantized_mma(const QuantizedLinearArguments& arguments, const MmaTile& tile, uintptr_t stream) {
  MmaProblem problem = {};
  problem.weight = packed_reader(arguments.weight);
  problem.codebook = arguments.weight.codebook;
  problem.x = reinterpret_cast<const unsigned char*>(arguments.x);
  problem.m = arguments.m, problem.n = arguments.weight.n;
  problem.row_bytes = static_cast<uint32_t>(column_tiles(arguments.weight.k) * kTileColumns);
  problem.bias = arguments.bias, problem.bias_type = arguments.bias_type;
  problem.out = arguments.out, problem.out_type = arguments.out_type, problem.partial = arguments.partial;
  problem.split = tile.split;
  problem.scale_x = arguments.scale_x, problem.scale_pitch = arguments.scale_pitch;
  problem.groups_x = static_cast<int>(group_count(arguments.weight.k, arguments.activation_group_size));
  problem.group_shift_x = half_tile_shift(arguments.activation_group_size);
  const int group_size = arguments.weight.group_size, activation_group_size = arguments.activation_group_size;
  const bool halves = group_size == 32 || activation_group_size == 32;
  if (activation_group_size > 0) {
    return halves ? launch_tokens<Scaling::kByBoth, 2>(problem, tile.tokens, stream)
                  : launch_tokens<Scaling::kByBoth, 1>(problem, tile.tokens, stream);
  }
  if (group_size > 0) {
    return halves ? launch_tokens<Scaling::kByWeight, 2>(problem, tile.tokens, stream)
                  : launch_tokens<Scaling::kByWeight, 1>(problem, tile.tokens, stream);
  }
  launch_tokens<Scaling::kOnce, 1>(problem, tile.tokens, stream);
}

}  // namespace olive::cuda
