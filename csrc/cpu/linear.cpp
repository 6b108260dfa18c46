// ovp_linear, ovp_linear_quantized, ovp8_linear: convert the activations once, then share outputs among threads.
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/api.h"

namespace olive {
namespace {

struct Free {
  void operator()(void* data) const { std::free(data); }
};

// Below this many products a second thread costs more than it brings: waking it takes several microseconds, and tens of
// milliseconds where another program has its core.
constexpr int64_t kParallelProducts = int64_t{1} << 19;

// Up to this many activations one thread converts them before the others are woken (about 5 microseconds): a second
// barrier costs more.
constexpr int64_t kConvertAlone = int64_t{1} << 16;

// Enough tasks to even out, few enough that each is a long stream of codes.
constexpr int64_t kTasksPerThread = 8;

// Cache-line aligned pieces of one allocation.
class Arena {
 public:
  template <class T>
  void reserve(T** where, int64_t count) {
    *where = reinterpret_cast<T*>(size_);
    size_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }
  void allocate() {
    data_.reset(static_cast<char*>(std::aligned_alloc(64, std::max<size_t>(size_, 64))));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  template <class T>
  void place(T** where) {
    *where = reinterpret_cast<T*>(data_.get() + reinterpret_cast<size_t>(*where));
  }

 private:
  size_t size_ = 0;
  std::unique_ptr<char, Free> data_;
};

constexpr int64_t kLanes8 = 16;    // what linear8 reads of a row at a time
constexpr int64_t kRunRows8 = 16;  // rows of an 8-bit weight per unit of work: whole blocks of those decoded together

// Convert rows of activations in equal shares (unless the caller has), then multiply. A task is a tile of activation
// rows times a run of units of the weight. Threads take tasks as they get free: on a shared machine, or with cores of
// two kinds, equal shares would wait for the slowest. Outputs do not depend on who computes them.
template <class Convert, class Multiply>
void share(int64_t rows, int64_t padded, int64_t units, bool parallel, bool convert_here, const Convert& convert,
           const Multiply& multiply) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
#pragma omp parallel if (parallel)
  {
    const int64_t threads = omp_get_num_threads();
    const int64_t runs = std::min(units, kTasksPerThread * threads);
    if (convert_here) {
#pragma omp for schedule(static)
      for (int64_t part = 0; part < threads; ++part) {
        convert(padded * part / threads, padded * (part + 1) / threads);
      }
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < tiles * runs; ++task) {
      const int64_t tile = task / runs, run = task % runs;
      multiply(tile * kTileRows, std::min<int64_t>(rows, (tile + 1) * kTileRows), units * run / runs,
               units * (run + 1) / runs);
    }
  }
}

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
  share(x.rows, x.padded, panels, parallel, !convert_first, convert, multiply);
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
  share(problem.m, problem.m, runs, parallel, !convert_first, convert, multiply);
}

}  // namespace olive
