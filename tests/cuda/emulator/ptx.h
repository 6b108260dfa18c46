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
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
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
  self().open.push_back({shared_at(to, 16), static_cast<const unsigned char*>(from), valid ? 16 : 0});
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
      std::memset(copy.to, 0, 16);
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

// ---- clusters -------------------------------------------------------------------------------------------

inline std::uint32_t cluster_rank() { return self().block->rank; }
inline void cluster_sync() {
  auto& cluster = *self().block->cluster;
  meet(cluster.all, cluster.threads);
}
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
  barrier_at(address).copies.push_back({[=] {
                                          for (int r = 0; r < source.box_rows; ++r) {
                                            for (int chunk = 0; chunk < 8; ++chunk) {
                                              unsigned char* cell = base + r * 128 + ((chunk ^ (r & 7)) * 16);
                                              for (int e = 0; e < 8; ++e) {
                                                const std::int64_t y = row + r, x = column + 8 * chunk + e;
                                                std::uint16_t value = 0;
                                                if (y < source.rows && x < source.columns) {
                                                  std::memcpy(&value, source.data + (y * source.columns + x) * 2, 2);
                                                }
                                                std::memcpy(cell + 2 * e, &value, 2);
                                              }
                                            }
                                          }
                                        },
                                        bytes});
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

template <int kCount>
void hold(float (&)[kCount]) {}

template <class T, int kColumns>
void wgmma(float (&sum)[kColumns / 2], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
  struct Lane {
    float* sum;
    std::uint32_t a[4];
  };
  auto& group = warpgroup();
  const emulator::Thread& thread = self();
  const emulator::Block* block = thread.block;
  const Lane lane = {sum, {a[0], a[1], a[2], a[3]}};
  // The lanes' operands are collected as they come; the last lane queues the product.
  static std::map<emulator::Warpgroup*, std::vector<Lane>> collected;
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
      std::vector<float> right(static_cast<std::size_t>(16) * kColumns);
      for (int n = 0; n < kColumns; ++n) {
        for (int k = 0; k < 16; ++k) {
          std::uint32_t address =
              start + static_cast<std::uint32_t>(n / 8) * stride + static_cast<std::uint32_t>(n % 8 * 128 + 2 * k);
          address ^= (address >> 7 & 7) << 4;
          std::uint16_t bits;
          if (address + 2 - emulator::kSharedBase > block->shared_size)
            throw std::runtime_error("emulator: B outside of shared memory");
          std::memcpy(&bits, emulator::shared_pointer(*block, address), 2);
          right[static_cast<std::size_t>(k * kColumns + n)] = emulator::value_of(bits, T{});
        }
      }
      for (int i = 0; i < 128; ++i) {
        const int warp = i / 32;
        float* to = operands[static_cast<std::size_t>(i)].sum;
        for (int c = 0; c < kColumns / 2; ++c) {
          const int row = (i % 32) / 4 + 8 * (c >> 1 & 1), column = 8 * (c / 4) + 2 * (i % 4) + (c & 1);
          double total = accumulate ? to[c] : 0.0;
          for (int k = 0; k < 16; ++k) {
            // row r, column k of A is held by lane 4 (r % 8) + k % 8 / 2, register (r / 8) + 2 (k / 8)
            const Lane& from = operands[static_cast<std::size_t>(32 * warp + 4 * (row % 8) + k % 8 / 2)];
            const float left = emulator::half_of<T>(from.a[row / 8 + 2 * (k / 8)], k % 2);
            total += static_cast<double>(left) * right[static_cast<std::size_t>(k * kColumns + column)];
          }
          to[c] = static_cast<float>(total);
        }
      }
    });
  });
}

}  // namespace olive::cuda
