// ovp_linear: convert the activations once, then share outputs among threads.
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

}  // namespace

void ovp_linear(Isa isa, const LinearArguments& arguments) {
  if (arguments.m == 0) return;
  // Levels above 127 (flint4) do not fit the bytes of the VNNI and AMX kernels: 16-bit words hold them.
  const bool bytes_fit = arguments.book.is_int8;
  const Kernels& kernels = kernels_for(!bytes_fit && isa > Isa::avx512 ? Isa::avx512 : isa);
  Linear problem = {};
  Activations& x = problem.x;
  x.rows = arguments.m;
  const int64_t tile_rows = arguments.m > 4 ? kernels.tile_rows : 1;
  x.padded = (arguments.m + tile_rows - 1) / tile_rows * tile_rows;
  x.block = arguments.shape.block();
  x.columns = arguments.shape.vectors() * kPackColumns;
  x.wide = arguments.x_type == Float::f32;
  Arena arena;
  const int64_t values = x.padded * x.columns, blocks = x.padded * x.blocks();
  arena.reserve(&x.scale, blocks);
  if (kernels.bytes) {
    arena.reserve(&x.high, values);
    arena.reserve(&x.low, values);
    arena.reserve(&x.offset, blocks);
    if (x.wide) arena.reserve(&x.rest_offset, blocks);
    if (x.wide) arena.reserve(&x.rest8, values);
  } else {
    arena.reserve(&x.words, values);
    if (x.wide) arena.reserve(&x.rest, values);
  }
  arena.allocate();
  arena.place(&x.scale);
  if (kernels.bytes) {
    arena.place(&x.high);
    arena.place(&x.low);
    arena.place(&x.offset);
    if (x.wide) arena.place(&x.rest_offset);
    if (x.wide) arena.place(&x.rest8);
  } else {
    arena.place(&x.words);
    if (x.wide) arena.place(&x.rest);
  }
  problem.codes = arguments.codes;
  problem.scale = arguments.scale;
  problem.groups = arguments.shape.groups();
  problem.n = arguments.shape.n;
  problem.book = arguments.book;
  problem.bias = arguments.bias;
  problem.bias_type = arguments.bias_type;
  problem.out = arguments.out;
  problem.out_type = arguments.x_type;

  const auto convert = [&](int64_t begin, int64_t end) {
    kernels.convert_rows(x, arguments.x, arguments.x_type, arguments.shape.k, begin, end);
  };
  const bool parallel = x.rows * problem.n * x.columns >= kParallelProducts;
  const bool convert_first = !parallel || x.padded * x.columns <= kConvertAlone;
  if (convert_first) convert(0, x.padded);

  // A task is a tile of activation rows times a run of whole panels (two row blocks); within a tile consecutive tasks
  // are consecutive in memory. Threads take tasks as they get free: on a shared machine, or with cores of two kinds,
  // equal shares would wait for the slowest. Outputs do not depend on who computes them.
  const int64_t panels = (problem.row_blocks() + 1) / 2;
  const int64_t tiles = (x.rows + kTileRows - 1) / kTileRows;
#pragma omp parallel if (parallel)
  {
    const int64_t threads = omp_get_num_threads();
    const int64_t runs = std::min(panels, kTasksPerThread * threads);
    if (!convert_first) {
#pragma omp for schedule(static)
      for (int64_t part = 0; part < threads; ++part) {
        convert(x.padded * part / threads, x.padded * (part + 1) / threads);
      }
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < tiles * runs; ++task) {
      const int64_t tile = task / runs, run = task % runs;
      const int64_t begin = panels * run / runs * 2,
                    end = std::min(problem.row_blocks(), panels * (run + 1) / runs * 2);
      kernels.linear(problem, tile * kTileRows, std::min<int64_t>(x.rows, (tile + 1) * kTileRows), begin, end);
    }
  }
}

}  // namespace olive
