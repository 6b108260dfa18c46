// ovp_linear, ovp_linear_quantized, ovp8_linear: convert the activations once, then share outputs among threads.
#include <algorithm>

#include "cpu/api.h"
#include "cpu/share.h"

namespace olive {
namespace {

constexpr int64_t kLanes8 = 16;    // what linear8 reads of a row at a time
constexpr int64_t kRunRows8 = 16;  // rows of an 8-bit weight per unit of work: whole blocks of those decoded together

}  // namespace

void ovp_linear(Isa isa, const LinearArguments& arguments) {
  if (arguments.m == 0) return;
  // Levels above 127 (flint4) do not fit the bytes of the VNNI and AMX kernels: 16-bit words hold them.
  const bool bytes_fit = arguments.book.is_int8;
  const Kernels& kernels = kernels_for(!bytes_fit && isa > Isa::avx512 ? Isa::avx512 : isa);
  const ActivationFormat* format = arguments.activations;
  Linear problem = {};
  Activations& x = problem.x;
  x.rows = arguments.m;
  const int64_t tile_rows = arguments.m > 4 ? kernels.tile_rows : 1;
  x.padded = (arguments.m + tile_rows - 1) / tile_rows * tile_rows;
  x.block = arguments.shape.block();
  if (format != nullptr && format->group_size > 0) x.block = std::min(x.block, format->group_size);
  x.columns = arguments.shape.vectors() * kPackColumns;
  x.digits = format != nullptr ? 1 : arguments.x_type == Float::f32 ? 3 : 2;
  const bool row_scale = format != nullptr && format->group_size <= 0;
  x.one_sum = row_scale && arguments.shape.group_size <= 0;
  const bool bytes = kernels.bytes || (x.digits == 1 && x.rows <= kernels.level_bytes_rows);
  Arena arena;
  const int64_t values = x.padded * x.columns, blocks = x.padded * x.blocks();
  const auto each = [&](auto&& use) {
    use(&x.scale, blocks);
    if (row_scale) use(&x.row_scale, x.padded);
    if (bytes) {
      use(&x.low, values);
      use(&x.offset, blocks);
      if (x.digits >= 2) use(&x.high, values);
      if (x.digits == 3) use(&x.rest_offset, blocks);
      if (x.digits == 3) use(&x.rest8, values);
    } else {
      use(&x.words, values);
      if (x.digits == 3) use(&x.rest, values);
    }
  };
  each([&](auto** where, int64_t count) { arena.reserve(where, count); });
  arena.allocate();
  each([&](auto** where, int64_t) { arena.place(where); });
  problem.codes = arguments.codes;
  problem.scale = arguments.scale;
  problem.groups = arguments.shape.groups();
  problem.group_blocks = arguments.shape.block() / x.block;
  problem.n = arguments.shape.n;
  problem.book = arguments.book;
  problem.bias = arguments.bias;
  problem.bias_type = arguments.bias_type;
  problem.out = arguments.out;
  problem.out_type = arguments.x_type;

  const auto convert = [&](int64_t begin, int64_t end) {
    if (format == nullptr) return kernels.convert_rows(x, arguments.x, arguments.x_type, arguments.shape.k, begin, end);
    kernels.quantize_rows(x, {arguments.x, arguments.x_type, x.rows, arguments.shape.k, *format}, begin, end);
  };
  const bool parallel = x.rows * problem.n * x.columns >= kParallelProducts;
  const bool convert_first = !parallel || x.padded * x.columns <= kConvertAlone;
  if (convert_first) convert(0, x.padded);

  // Within a tile consecutive tasks are consecutive in memory: runs of whole panels (two row blocks).
  const int64_t panels = (problem.row_blocks() + 1) / 2;
  const auto multiply = [&](int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
    kernels.linear(problem, m_begin, m_end, begin * 2, std::min(problem.row_blocks(), end * 2));
  };
  share(x.rows, x.padded, kTileRows, panels, parallel, !convert_first, convert, multiply);
}

void ovp8_linear(Isa isa, const Linear8Arguments& arguments) {
  if (arguments.m == 0) return;
  const Kernels& kernels = kernels_for(isa);
  Linear8 problem = {};
  problem.m = arguments.m, problem.n = arguments.n, problem.k = arguments.k, problem.group_size = arguments.group_size;
  problem.x_stride = (arguments.k + kLanes8 - 1) / kLanes8 * kLanes8;
  problem.codes = arguments.codes, problem.scale = arguments.scale;
  problem.bias = arguments.bias, problem.bias_type = arguments.bias_type;
  problem.out = arguments.out, problem.out_type = arguments.x_type;
  Arena arena;
  float* x = nullptr;
  arena.reserve(&x, problem.m * problem.x_stride);
  arena.allocate();
  arena.place(&x);
  problem.x = x;
  const auto convert = [&](int64_t begin, int64_t end) {
    kernels.float_rows(arguments.x, arguments.x_type, problem.k, problem.x_stride, begin, end, x);
  };
  const bool parallel = problem.m * problem.n * problem.k >= kParallelProducts;
  const bool convert_first = !parallel || problem.m * problem.k <= kConvertAlone;
  if (convert_first) convert(0, problem.m);
  const int64_t runs = (problem.n + kRunRows8 - 1) / kRunRows8;
  const auto multiply = [&](int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
    kernels.linear8(problem, m_begin, m_end, begin * kRunRows8, std::min(problem.n, end * kRunRows8));
  };
  share(problem.m, problem.m, kTileRows, runs, parallel, !convert_first, convert, multiply);
}

}  // namespace olive
