// What the multi-threaded linear operators share: scratch memory, and how work is cut into tasks.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace olive {

// Below this many products a second thread costs more than it brings: waking it takes several microseconds, and tens of
// milliseconds where another program has its core.
constexpr int64_t kParallelProducts = int64_t{1} << 19;

// Up to this many activations one thread converts them before the others are woken (about 5 microseconds): a second
// barrier costs more.
constexpr int64_t kConvertAlone = int64_t{1} << 16;

// Enough tasks to even out, few enough that each is a long stream of codes.
constexpr int64_t kTasksPerThread = 8;

struct Free {
  void operator()(void* data) const { std::free(data); }
};

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

// Convert rows of activations in equal shares (unless the caller has), then multiply. A task is a tile of activation
// rows times a run of units of the weight. Threads take tasks as they get free: on a shared machine, or with cores of
// two kinds, equal shares would wait for the slowest. Outputs do not depend on who computes them.
template <class Convert, class Multiply>
void share(int64_t rows, int64_t padded, int64_t tile_rows, int64_t units, bool parallel, bool convert_here,
           const Convert& convert, const Multiply& multiply) {
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
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
      multiply(tile * tile_rows, std::min<int64_t>(rows, (tile + 1) * tile_rows), units * run / runs,
               units * (run + 1) / runs);
    }
  }
}

}  // namespace olive
