#include "emulator/machine.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <random>
#include <stdexcept>

#if defined(__x86_64__)
asm(R"(
.text
.hidden olive_emulator_switch
.globl olive_emulator_switch
olive_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

namespace olive::emulator {
namespace {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr int kPatience = 1000;  // turns of everybody without an event: a deadlock

Fibre scheduler;
Thread* running = nullptr;
const std::function<void()>* kernel = nullptr;
Grid current_grid;
std::uint64_t events = 0;  // meetings held, arrivals, ends: signs of life
std::exception_ptr failure;

// Stacks of threads that ended: fresh ones would be page faults.
std::vector<std::unique_ptr<char[]>> free_stacks;

char* take_stack() {
  if (free_stacks.empty()) return new char[kStackBytes];
  char* stack = free_stacks.back().release();
  free_stacks.pop_back();
  return stack;
}

void enter() {
  try {
    (*kernel)();
  } catch (...) {
    failure = std::current_exception();
  }
  running->done = true;
  ++events;
  switch_fibre(running->fibre, scheduler);
}

std::unique_ptr<Block> make_block(Cluster& cluster, unsigned rank, Index index, const Grid& grid) {
  auto block = std::make_unique<Block>();
  block->cluster = &cluster;
  block->rank = rank;
  block->index = index;
  block->storage.assign(grid.shared + 2048, 0xFF);  // NaN in every float type
  const auto start = reinterpret_cast<std::uintptr_t>(block->storage.data());
  block->shared = reinterpret_cast<unsigned char*>((start + 1023) / 1024 * 1024);
  block->shared_size = grid.shared;
  block->warps.resize((grid.threads + 31) / 32);
  block->warpgroups.resize((grid.threads + 127) / 128);
  for (unsigned i = 0; i < grid.threads; ++i) {
    auto thread = std::make_unique<Thread>();
    thread->block = block.get();
    thread->index = static_cast<int>(i);
    thread->stack = take_stack();
    thread->fibre.start(thread->stack, kStackBytes, enter);
    block->warps[i / 32].lanes[i % 32] = thread.get();
    block->threads.push_back(std::move(thread));
  }
  return block;
}

void run_cluster(Cluster& cluster) {
  std::vector<Thread*> order;
  for (auto& block : cluster.blocks) {
    for (auto& thread : block->threads) order.push_back(thread.get());
  }
  cluster.threads = static_cast<int>(order.size());
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) {
    std::mt19937 random(schedule);
    std::shuffle(order.begin(), order.end(), random);
  }
  int idle = 0;
  std::size_t left = order.size();
  while (left > 0) {
    const std::uint64_t before = events;
    left = 0;
    for (Thread* thread : order) {
      if (thread->done) continue;
      running = thread;
      switch_fibre(scheduler, thread->fibre);
      if (failure) std::rethrow_exception(failure);
      left += !thread->done;
    }
    idle = events == before ? idle + 1 : 0;
    if (idle > kPatience) throw std::runtime_error("emulator: every thread waits, none can go on");
  }
}

}  // namespace

Thread::~Thread() {
  if (stack != nullptr) free_stacks.emplace_back(stack);
}

unsigned schedule = 0;
FakeDevice fake_device;
std::vector<std::string> launched;

Thread& self() { return *running; }
Index block_dimension() { return {current_grid.threads, 1, 1}; }
Index grid_dimension() { return current_grid.blocks; }

void yield() { switch_fibre(running->fibre, scheduler); }

void meet(Meeting& meeting, int expected, const std::function<void()>& action) {
  const std::uint64_t generation = meeting.generation;
  if (++meeting.arrived == expected) {
    if (action) action();
    meeting.arrived = 0;
    ++meeting.generation;
    ++events;
    return;
  }
  while (meeting.generation == generation) yield();
}

void warp_meet(const void* offered, const std::function<void(const void* const*)>& action) {
  Thread& thread = self();
  Warp& warp = thread.block->warps[thread.index / 32];
  thread.offered = offered;
  meet(warp.meeting, 32, [&] {
    const void* all[32];
    for (int i = 0; i < 32; ++i) all[i] = warp.lanes[i]->offered;
    action(all);
  });
}

void run(const Grid& grid, const std::function<void()>& body) {
  kernel = &body;
  current_grid = grid;
  failure = nullptr;
  if (grid.blocks.x % grid.cluster != 0) throw std::runtime_error("emulator: the grid is not whole clusters");
  for (unsigned y = 0; y < grid.blocks.y; ++y) {
    for (unsigned x = 0; x < grid.blocks.x; x += grid.cluster) {
      Cluster cluster;
      for (unsigned rank = 0; rank < grid.cluster; ++rank) {
        cluster.blocks.push_back(make_block(cluster, rank, {x + rank, y, 0}, grid));
      }
      run_cluster(cluster);
    }
  }
}

}  // namespace olive::emulator
