// uniform_linear: convert the activations once, then share outputs among threads.
#include "cpu/uniform.h"

#include <algorithm>

#include "cpu/share.h"

namespace olive {
namespace {

// Bytes of a tile of activations that stay in the second-level cache while a run of weights goes by.
constexpr int64_t kTileBytes = int64_t{1} << 18;

// Rows of activations are this much longer than their vectors: rows a multiple of 4096 bytes apart would share the sets
// of the first-level cache.
constexpr int64_t kRowPadding = 64;

// Vectors under one scale, of the weight and, for fixed-point numbers, of the activation: a whole block or one vector.
int64_t span_of(const UniformArguments& arguments, int64_t group, int columns) {
  const bool one_group = group >= arguments.k;
  if (arguments.quantizer != nullptr) {
    if (one_group) return (arguments.k + columns - 1) / columns;
    return group % columns == 0 ? group / columns : 1;
  }
  return one_group || group % kUniformBlock == 0 ? kUniformBlock / columns : 1;
}

int64_t ceil_div(int64_t count, int64_t block) { return (count + block - 1) / block; }

}  // namespace

void uniform_linear(Isa isa, const UniformArguments& arguments) {
  if (arguments.m == 0) return;
  const Kernels& kernels = kernels_for(isa);
  const UniformQuantizer* quantizer = arguments.quantizer;
  UniformLinear problem = {};
  UniformInput& x = problem.x;
  x.rows = arguments.m;
  x.width = arguments.bits <= 2 ? 2 : arguments.bits <= 4 ? 4 : 8;
  x.zero = (1 << arguments.bits) - (arguments.mid_rise ? 1 : 0);
  const int fixed_point_digits = (arguments.x_type == Float::f32 ? 3 : 2) - (x.width == 8 ? 1 : 0);
  x.digits = quantizer != nullptr ? 1 : fixed_point_digits;
  const int columns = x.columns();
  problem.group_size = arguments.group_size < 0 ? arguments.k : arguments.group_size;
  problem.groups = ceil_div(arguments.k, problem.group_size);
  if (problem.groups == 1) problem.group_size = arguments.k;
  x.span = span_of(arguments, problem.group_size, columns);
  x.vectors = ceil_div(arguments.k, x.span * columns) * x.span;
  x.stride = x.vectors * x.vector_bytes() + kRowPadding;
  problem.codes = arguments.codes;
  problem.row_bytes = (arguments.k * x.width + 7) / 8;
  problem.n = problem.last = arguments.n;
  const int64_t padded_bytes = x.vectors * kUniformBytes;
  if (padded_bytes > problem.row_bytes) {
    const int64_t reaching = ceil_div(padded_bytes - problem.row_bytes, problem.row_bytes);
    problem.last = std::max<int64_t>(0, problem.n - reaching);
  }

  Arena arena;
  uint8_t* last = nullptr;
  const int64_t spans = x.rows * x.spans();
  const auto each = [&](auto&& use) {
    use(&x.data, x.rows * x.stride);
    if (quantizer == nullptr) use(&x.scale, spans);
    use(&x.offset, spans * x.offsets() * kUniformLanes);
    if (quantizer != nullptr) use(&x.row_scale, x.rows);
    use(&last, (problem.n - problem.last) * padded_bytes);
  };
  each([&](auto** where, int64_t count) { arena.reserve(where, count); });
  arena.allocate();
  each([&](auto** where, int64_t) { arena.place(where); });

  problem.unsigned_x = quantizer != nullptr && quantizer->qmax > 127;
  problem.scale = arguments.scale;
  problem.bias = arguments.bias;
  problem.bias_type = arguments.bias_type;
  problem.out = arguments.out;
  problem.out_type = arguments.x_type;

  for (int64_t row = problem.last; row < problem.n; ++row) {
    uint8_t* to = last + (row - problem.last) * padded_bytes;
    std::copy_n(problem.codes + row * problem.row_bytes, problem.row_bytes, to);
    std::fill_n(to + problem.row_bytes, padded_bytes - problem.row_bytes, uint8_t{0});
  }
  problem.last_codes = last;

  const UniformSource source = {arguments.x, arguments.x_type, arguments.k, quantizer};
  const auto convert = [&](int64_t begin, int64_t end) { kernels.uniform_rows(x, source, begin, end); };
  const bool parallel = x.rows * problem.n * arguments.k >= kParallelProducts;
  const bool convert_first = !parallel || x.rows * arguments.k <= kConvertAlone;
  if (convert_first) convert(0, x.rows);
  const int64_t units = (problem.n + kUniformRows - 1) / kUniformRows;
  const auto multiply = [&](int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
    kernels.uniform_linear(problem, m_begin, m_end, begin * kUniformRows, std::min(problem.n, end * kUniformRows));
  };
  const int64_t tile = std::min<int64_t>(kTileRows, std::max<int64_t>(4, kTileBytes / x.stride / 4 * 4));
  share(x.rows, x.rows, tile, units, parallel, !convert_first, convert, multiply);
}

}  // namespace olive
