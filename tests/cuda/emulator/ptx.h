// The emulator's side of csrc/cuda/ptx.cuh: CUDA's names and the special instructions, each as its documentation has
// it (PTX ISA 9.0: fragment layouts in 9.7.14 and 9.7.15, swizzling in 5.5).
#pragma once

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "core/floats.h"
#include "emulator/machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define OLIVE_SHARED(name) unsigned char* const name = ::olive::emulator::self().block->shared
#define OLIVE_HAS_WGMMA 1

struct __half {};
struct __nv_bfloat16 {};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

#define threadIdx (::olive::emulator::Index{static_cast<unsigned>(::olive::emulator::self().index), 0, 0})
#define blockIdx (::olive::emulator::self().block->index)
#define blockDim (::olive::emulator::block_dimension())
#define gridDim (::olive::emulator::grid_dimension())

inline void __syncthreads() {
  auto& block = *olive::emulator::self().block;
  olive::emulator::meet(block.all, static_cast<int>(block.threads.size()));
}

inline void __syncwarp(unsigned = 0xFFFFFFFFu) {
  olive::emulator::warp_meet(nullptr, [](const void* const*) {});
}

namespace olive::emulator {

// Every lane gets the value of the lane that source(lane) names.
template <class T, class Source>
T shuffle(T value, Source source) {
  struct Lane {
    T in, out;
  } lane = {value, value};
  warp_meet(&lane, [&](const void* const* all) {
    for (int i = 0; i < 32; ++i) {
      auto* to = const_cast<Lane*>(static_cast<const Lane*>(all[i]));
      to->out = static_cast<const Lane*>(all[source(i)])->in;
    }
  });
  return lane.out;
}

inline float value_of(std::uint16_t bits, __half) { return f16_to_float(bits); }
inline float value_of(std::uint16_t bits, __nv_bfloat16) { return bf16_to_float(bits); }
inline std::uint16_t bits_of(float value, __half) { return float_to_f16(value); }
inline std::uint16_t bits_of(float value, __nv_bfloat16) { return float_to_bf16(value); }

template <class T>
float half_of(std::uint32_t word, int which) {
  return value_of(static_cast<std::uint16_t>(word >> (16 * which)), T{});
}

}  // namespace olive::emulator

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return olive::emulator::shuffle(value, [mask](int lane) { return lane ^ mask; });
}

template <class T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  // The source may differ between lanes.
  struct Lane {
    T in, out;
    int source;
  } lane = {value, value, source};
  olive::emulator::warp_meet(&lane, [&](const void* const* all) {
    for (int i = 0; i < 32; ++i) {
      auto* to = const_cast<Lane*>(static_cast<const Lane*>(all[i]));
      to->out = static_cast<const Lane*>(all[i / width * width + to->source % width])->in;
    }
  });
  return lane.out;
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  struct Lane {
    bool in;
    unsigned out;
  } lane = {predicate, 0};
  olive::emulator::warp_meet(&lane, [&](const void* const* all) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(static_cast<const Lane*>(all[i])->in) << i;
    for (int i = 0; i < 32; ++i) const_cast<Lane*>(static_cast<const Lane*>(all[i]))->out = votes;
  });
  return lane.out;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }

// The bytes of b:a that the four selectors name.
inline std::uint32_t __byte_perm(std::uint32_t a, std::uint32_t b, std::uint32_t selectors) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(b) << 32 | a;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<std::uint32_t>(bytes >> (8 * (selectors >> (4 * i) & 7)) & 0xFF) << (8 * i);
  }
  return result;
}

inline int atomicOr(int* to, int value) {
  const int old = *to;
  *to |= value;
  return old;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
// One rounding each: the emulator is compiled without contraction.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
// Rounded up: the nearest sum, or its upper neighbour where it lost something positive (found without a rounding).
inline float __fadd_ru(float a, float b) {
  const float sum = a + b, part = sum - a;
  const float lost = (a - (sum - part)) + (b - part);
  return lost > 0.0f ? std::nextafter(sum, INFINITY) : sum;
}
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }

namespace olive::cuda {

using emulator::meet;
using emulator::self;
using emulator::warp_meet;

struct TensorMap {
  const unsigned char* data;
  std::int64_t rows, columns;
  int box_rows;
  int bytes;  // of an element
};

inline std::uint32_t shared_address(const void* pointer) {
  const auto& block = *self().block;
  const auto offset = static_cast<const unsigned char*>(pointer) - block.shared;
  if (offset < 0 || offset > static_cast<std::ptrdiff_t>(block.shared_size)) {
    throw std::runtime_error("emulator: an address outside of shared memory");
  }
  return static_cast<std::uint32_t>(offset) + emulator::kSharedBase;
}

inline unsigned char* shared_at(std::uint32_t address, std::size_t bytes) {
  const auto& block = *self().block;
  if (address < emulator::kSharedBase || address - emulator::kSharedBase + bytes > block.shared_size) {
    throw std::runtime_error("emulator: access outside of shared memory");
  }
  if (address % bytes != 0) throw std::runtime_error("emulator: misaligned access to shared memory");
  return emulator::shared_pointer(block, address);
}

inline uint4 load_once(const uint4* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) throw std::runtime_error("emulator: misaligned 16-byte load");
  return *from;
}

inline void copy_async(std::uint32_t to, const void* from, bool valid) {
  if (valid && reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    throw std::runtime_error("emulator: misaligned 16-byte copy");
  }
  self().open.push_back({shared_at(to, 16), static_cast<const unsigned char*>(from), valid ? 16 : 0, 16});
}

inline void copy_async_word(std::uint32_t to, const void* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % 4 != 0) throw std::runtime_error("emulator: misaligned 4-byte copy");
  self().open.push_back({shared_at(to, 4), static_cast<const unsigned char*>(from), 4, 4});
}

inline void copy_async_commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

template <int kPending>
void copy_async_wait() {
  auto& groups = self().groups;
  while (groups.size() > kPending) {
    for (const auto& copy : groups.front()) {
      std::memset(copy.to, 0, static_cast<std::size_t>(copy.size));
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.bytes));
    }
    groups.erase(groups.begin());
  }
}

inline void load_matrices(std::uint32_t (&to)[4], std::uint32_t address) {
  struct Lane {
    std::uint32_t* to;
    const unsigned char* row;
  } lane = {to, shared_at(address, 16)};
  warp_meet(&lane, [](const void* const* all) {
    for (int i = 0; i < 32; ++i) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto* row = static_cast<const Lane*>(all[8 * matrix + i / 4])->row;
        std::memcpy(&static_cast<const Lane*>(all[i])->to[matrix], row + 4 * (i % 4), 4);
      }
    }
  });
}

template <class T, bool kAccumulate>
void multiply_16x8x16(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  struct Lane {
    float* sum;
    const std::uint32_t* a;
    std::uint32_t b[2];
  } lane = {sum, a, {b0, b1}};
  warp_meet(&lane, [](const void* const* all) {
    float left[16][16], right[16][8];
    for (int i = 0; i < 32; ++i) {
      const auto* from = static_cast<const Lane*>(all[i]);
      const int group = i / 4, thread = i % 4;
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 4; ++r) {
          left[group + 8 * (r & 1)][2 * thread + 8 * (r >> 1) + e] = emulator::half_of<T>(from->a[r], e);
        }
        for (int r = 0; r < 2; ++r) right[2 * thread + 8 * r + e][group] = emulator::half_of<T>(from->b[r], e);
      }
    }
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<const Lane*>(all[i])->sum;
      for (int c = 0; c < 4; ++c) {
        const int row = i / 4 + 8 * (c >> 1), column = 2 * (i % 4) + (c & 1);
        double total = kAccumulate ? to[c] : 0.0f;
        for (int k = 0; k < 16; ++k) total += static_cast<double>(left[row][k]) * right[k][column];
        to[c] = static_cast<float>(total);
      }
    }
  });
}

inline int int8_of(std::uint32_t word, int which) { return static_cast<std::int8_t>(word >> (8 * which)); }

inline void multiply_int8(int (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  struct Lane {
    int* sum;
    const std::uint32_t* a;
    std::uint32_t b[2];
  } lane = {sum, a, {b0, b1}};
  warp_meet(&lane, [](const void* const* all) {
    int left[16][32], right[32][8];
    for (int i = 0; i < 32; ++i) {
      const auto* from = static_cast<const Lane*>(all[i]);
      const int group = i / 4, thread = i % 4;
      for (int e = 0; e < 4; ++e) {
        for (int r = 0; r < 4; ++r) {
          left[group + 8 * (r & 1)][4 * thread + 16 * (r >> 1) + e] = int8_of(from->a[r], e);
        }
        for (int r = 0; r < 2; ++r) right[4 * thread + 16 * r + e][group] = int8_of(from->b[r], e);
      }
    }
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<const Lane*>(all[i])->sum;
      for (int c = 0; c < 4; ++c) {
        const int row = i / 4 + 8 * (c >> 1), column = 2 * (i % 4) + (c & 1);
        std::uint32_t total = static_cast<std::uint32_t>(to[c]);  // wraps, as the hardware does
        for (int k = 0; k < 32; ++k) total += static_cast<std::uint32_t>(left[row][k] * right[k][column]);
        to[c] = static_cast<int>(total);
      }
    }
  });
}

inline void multiply_int8_from(int start, int (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                               std::uint32_t b1) {
  for (int& value : sum) value = start;
  multiply_int8(sum, a, b0, b1);
}

template <class T>
std::uint32_t multiply_pair(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (int e = 0; e < 2; ++e) {
    const float value = emulator::half_of<T>(a, e) * emulator::half_of<T>(b, e);  // exact: 11 + 11 bits
    product |= static_cast<std::uint32_t>(emulator::bits_of(value, T{})) << (16 * e);
  }
  return product;
}

template <class T>
std::uint32_t round_pair(float low, float high) {
  return emulator::bits_of(low, T{}) | static_cast<std::uint32_t>(emulator::bits_of(high, T{})) << 16;
}

// ---- launches -------------------------------------------------------------------------------------------

// One launch runs after the other.
inline void prefetch(const void*) {}
inline void wait_for_launch_before() {}
inline void let_next_launch_start() {}

// ---- clusters -------------------------------------------------------------------------------------------

inline std::uint32_t cluster_rank() { return self().block->rank; }
inline void cluster_sync() {
  auto& cluster = *self().block->cluster;
  meet(cluster.all, cluster.threads);
}
inline void cluster_meet() { cluster_sync(); }
inline float load_from_rank(const float* own, std::uint32_t rank) {
  const auto offset = shared_address(own) - emulator::kSharedBase;
  float value;
  std::memcpy(&value, self().block->cluster->blocks.at(rank)->shared + offset, 4);
  return value;
}

// ---- barriers in shared memory and bulk copies ----------------------------------------------------------

inline emulator::Barrier& barrier_at(std::uint32_t address) {
  shared_at(address, 8);
  return self().block->barriers[address];
}

inline void barrier_end_phase(emulator::Barrier& barrier) {
  if (barrier.missing == 0 && barrier.bytes == 0) {
    barrier.missing = barrier.arrivals;
    ++barrier.phase;
  }
}

inline void barrier_init(std::uint32_t address, std::uint32_t arrivals) {
  auto& barrier = barrier_at(address);
  barrier = {};
  barrier.arrivals = barrier.missing = static_cast<int>(arrivals);
}
inline void barrier_init_fence() {}

inline void barrier_arrive(std::uint32_t address) {
  auto& barrier = barrier_at(address);
  if (barrier.missing <= 0) throw std::runtime_error("emulator: more arrivals at a barrier than it expects");
  --barrier.missing;
  barrier_end_phase(barrier);
}

inline void barrier_arrive_expect(std::uint32_t address, std::uint32_t bytes) {
  barrier_at(address).bytes += bytes;
  barrier_arrive(address);
}

inline void barrier_wait(std::uint32_t address, std::uint32_t parity) {
  auto& barrier = barrier_at(address);
  for (int turn = 0;; ++turn) {
    if (barrier.phase % 2 != parity) return;
    for (auto& copy : barrier.copies) {  // as late as it may be
      copy.run();
      barrier.bytes -= copy.bytes;
    }
    barrier.copies.clear();
    barrier_end_phase(barrier);
    if (barrier.phase % 2 != parity) return;
    emulator::yield();
  }
}

inline void copy_box(std::uint32_t to, const TensorMap* map, std::uint32_t address, int column, int row) {
  if (to % 1024 != 0) throw std::runtime_error("emulator: a swizzled box that is not aligned to 1024 bytes");
  const std::int64_t bytes = map->box_rows * 128;
  shared_at(to, 16), shared_at(to + static_cast<std::uint32_t>(bytes) - 16, 16);
  unsigned char* base = emulator::shared_pointer(*self().block, to);
  const TensorMap source = *map;
  const auto copy = [=] {
    const int at_once = 16 / source.bytes;  // elements of a chunk
    for (int r = 0; r < source.box_rows; ++r) {
      for (int chunk = 0; chunk < 8; ++chunk) {
        unsigned char* cell = base + r * 128 + ((chunk ^ (r & 7)) * 16);
        for (int e = 0; e < at_once; ++e) {
          const std::int64_t y = row + r, x = column + at_once * chunk + e;
          const bool inside = y < source.rows && x < source.columns;
          std::memset(cell + source.bytes * e, 0, static_cast<std::size_t>(source.bytes));
          if (inside) {
            std::memcpy(cell + source.bytes * e, source.data + (y * source.columns + x) * source.bytes,
                        static_cast<std::size_t>(source.bytes));
          }
        }
      }
    }
  };
  barrier_at(address).copies.push_back({copy, bytes});
}

inline void copy_bulk(std::uint32_t to, const void* from, std::uint32_t bytes, std::uint32_t address) {
  if (bytes % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    throw std::runtime_error("emulator: misaligned bulk copy");
  }
  shared_at(to, 16), shared_at(to + bytes - 16, 16);
  unsigned char* base = emulator::shared_pointer(*self().block, to);
  barrier_at(address).copies.push_back({[=] { std::memcpy(base, from, bytes); }, bytes});
}

inline void prefetch_map(const TensorMap*) {}
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

template <int kIndex, int kThreads>
void sync_some() {
  meet(self().block->named[kIndex], kThreads);
}

inline void store_matrices_transposed(std::uint32_t address, const std::uint32_t (&from)[4]) {
  struct Lane {
    const std::uint32_t* from;
    unsigned char* row;
  } lane = {from, shared_at(address, 16)};
  warp_meet(&lane, [](const void* const* all) {
    for (int i = 0; i < 32; ++i) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int e = 0; e < 2; ++e) {  // element (i / 4, 2 (i % 4) + e) goes to (2 (i % 4) + e, i / 4)
          const auto bits = static_cast<std::uint16_t>(static_cast<const Lane*>(all[i])->from[matrix] >> (16 * e));
          unsigned char* row = static_cast<const Lane*>(all[8 * matrix + 2 * (i % 4) + e])->row;
          std::memcpy(row + 2 * (i / 4), &bits, 2);
        }
      }
    }
  });
}

// ---- warpgroup products ---------------------------------------------------------------------------------

inline emulator::Warpgroup& warpgroup() { return self().block->warpgroups[self().index / 128]; }
inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& group = warpgroup();
  meet(group.meeting, 128, [&] {
    group.pending.push_back(std::move(group.open));
    group.open.clear();
  });
}
template <int kPending>
void wgmma_wait() {
  auto& group = warpgroup();
  meet(group.meeting, 128, [&] {
    while (group.pending.size() > kPending) {
      for (auto& product : group.pending.front()) product();
      group.pending.erase(group.pending.begin());
    }
  });
}

template <class T, int kCount>
void hold(T (&)[kCount]) {}

}  // namespace olive::cuda

namespace olive::emulator {

// One product of a warpgroup: A in registers [64 x 32 bytes], B K-major by descriptor [32 bytes x kColumns]. Element is
// the type of A and B, and says how it is read; Sum that of the sums.
template <class Element, int kColumns, class Sum>
void warpgroup_product(Sum* sum, const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
  struct Lane {
    Sum* sum;
    std::uint32_t a[4];
  };
  constexpr int kInWord = 4 / Element::kBytes, kDepth = 32 / Element::kBytes;
  using Wide = typename Element::Wide;
  auto& group = self().block->warpgroups[self().index / 128];
  const Thread& thread = self();
  const Block* block = thread.block;
  const Lane lane = {sum, {a[0], a[1], a[2], a[3]}};
  // The lanes' operands are collected as they come; the last lane queues the product.
  static std::map<Warpgroup*, std::vector<Lane>> collected;
  auto& lanes = collected[&group];
  lanes.resize(128);
  lanes[static_cast<std::size_t>(thread.index % 128)] = lane;
  meet(group.meeting, 128, [&] {
    const std::vector<Lane> operands = lanes;
    group.open.push_back([=] {
      // K-major, swizzled by 128 bytes: rows of 128 bytes, eight of them a pattern of `stride` bytes.
      if (b >> 62 != 1) throw std::runtime_error("emulator: expected a descriptor with 128-byte swizzling");
      const auto start = static_cast<std::uint32_t>((b & 0x3FFF) << 4),
                 stride = static_cast<std::uint32_t>((b >> 32 & 0x3FFF) << 4);
      std::vector<Wide> right(static_cast<std::size_t>(kDepth) * kColumns);
      for (int n = 0; n < kColumns; ++n) {
        for (int k = 0; k < kDepth; ++k) {
          std::uint32_t address = start + static_cast<std::uint32_t>(n / 8) * stride +
                                  static_cast<std::uint32_t>(n % 8 * 128 + Element::kBytes * k);
          address ^= (address >> 7 & 7) << 4;
          if (address + Element::kBytes - kSharedBase > block->shared_size)
            throw std::runtime_error("emulator: B outside of shared memory");
          std::uint32_t bits = 0;
          std::memcpy(&bits, shared_pointer(*block, address), Element::kBytes);
          right[static_cast<std::size_t>(k * kColumns + n)] = Element::value(bits, 0);
        }
      }
      for (int i = 0; i < 128; ++i) {
        const int warp = i / 32;
        Sum* to = operands[static_cast<std::size_t>(i)].sum;
        for (int c = 0; c < kColumns / 2; ++c) {
          const int row = (i % 32) / 4 + 8 * (c >> 1 & 1), column = 8 * (c / 4) + 2 * (i % 4) + (c & 1);
          Wide total = accumulate ? static_cast<Wide>(to[c]) : Wide{};
          for (int k = 0; k < kDepth; ++k) {
            // Row r, column k of A: lane 4 (r % 8) + k % (4 words) / (in a word), register (r / 8) + 2 (k / 4 words).
            const int within = k % (4 * kInWord);
            const Lane& from = operands[static_cast<std::size_t>(32 * warp + 4 * (row % 8) + within / kInWord)];
            const Wide left = Element::value(from.a[row / 8 + 2 * (k / (4 * kInWord))], k % kInWord);
            total += left * right[static_cast<std::size_t>(k * kColumns + column)];
          }
          to[c] = static_cast<Sum>(total);
        }
      }
    });
  });
}

template <class T>
struct HalfElement {
  using Wide = double;
  static constexpr int kBytes = 2;
  static double value(std::uint32_t word, int which) { return half_of<T>(word, which); }
};
struct Int8Element {
  using Wide = std::int64_t;  // the sum then wraps, as the hardware does
  static constexpr int kBytes = 1;
  static std::int64_t value(std::uint32_t word, int which) { return static_cast<std::int8_t>(word >> (8 * which)); }
};

}  // namespace olive::emulator

namespace olive::cuda {

template <class T, int kColumns>
void wgmma(float (&sum)[kColumns / 2], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
  emulator::warpgroup_product<emulator::HalfElement<T>, kColumns>(sum, a, b, accumulate);
}

template <int kColumns>
void wgmma_int8(int (&sum)[kColumns / 2], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
  emulator::warpgroup_product<emulator::Int8Element, kColumns>(sum, a, b, accumulate);
}

}  // namespace olive::cuda
