// Runs CUDA kernels on a CPU: every thread of a cluster is a fibre, blocks come one cluster after another.
//
// What it is for: indexing, fragment layouts, barriers and races, on a machine without a GPU. So it is unkind where
// the hardware may be: asynchronous copies and products happen as late as they may, shared memory starts as NaN, and
// threads run in an order of the caller's choice, each as far as it can.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator/fibre.h"

namespace olive::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// A point that `expected` threads have to reach together.
struct Meeting {
  int arrived = 0;
  std::uint64_t generation = 0;
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;  // the rest of `size` is zeros
  int size;
};

struct BoxCopy {
  std::function<void()> run;
  std::int64_t bytes;
};

// An mbarrier.
struct Barrier {
  int arrivals = 0;
  int missing = 0;
  std::int64_t bytes = 0;
  std::uint64_t phase = 0;
  std::vector<BoxCopy> copies;
};

struct Warpgroup {
  Meeting meeting;
  std::vector<std::function<void()>> open;                  // products since the last commit
  std::vector<std::vector<std::function<void()>>> pending;  // committed groups, oldest first
};

struct Block;

struct Thread {
  Fibre fibre;
  char* stack = nullptr;
  ~Thread();
  Block* block = nullptr;
  int index = 0;  // in the block
  bool done = false;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  const void* offered = nullptr;  // what this lane brings to its warp's meeting
};

struct Warp {
  Meeting meeting;
  Thread* lanes[32] = {};
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  Index index;
  std::vector<unsigned char> storage;
  unsigned char* shared = nullptr;  // aligned to 1024
  std::size_t shared_size = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Meeting all;
  std::map<int, Meeting> named;
  std::map<std::uint32_t, Barrier> barriers;  // by address
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Meeting all;
  int threads = 0;
};

struct Grid {
  Index blocks;
  unsigned threads;
  std::size_t shared;
  unsigned cluster;
};

// Runs `body` once per thread. Throws std::runtime_error on a deadlock.
void run(const Grid& grid, const std::function<void()>& body);

Thread& self();
Index block_dimension();
Index grid_dimension();

// Gives the other threads a turn. Waiting threads call it in a loop.
void yield();

// Waits for `expected` threads; the last one to come runs `action` first.
void meet(Meeting& meeting, int expected, const std::function<void()>& action = {});

// A warp's meeting: every lane brings `offered`, the last one runs `action` on all 32.
void warp_meet(const void* offered, const std::function<void(const void* const*)>& action);

// 0: ascending, 1: descending, else a shuffle by that seed.
extern unsigned schedule;

struct FakeDevice {
  int multiprocessors = 4;
  int capability = 90;
  int shared_per_block = 227 * 1024;
};
extern FakeDevice fake_device;

// Names of the kernels that ran since the list was cleared: so that a test knows which path it tested.
extern std::vector<std::string> launched;

// Shared addresses begin here: address 0 is nobody's.
constexpr std::uint32_t kSharedBase = 1024;
inline unsigned char* shared_pointer(const Block& block, std::uint32_t address) {
  return block.shared + (address - kSharedBase);
}

}  // namespace olive::emulator
