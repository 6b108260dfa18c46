// A thread's own stack, and going from one to another. On x86-64 that is a dozen instructions; ucontext, used
// elsewhere, asks the kernel each time.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace olive::emulator {

#if defined(__x86_64__)

struct Fibre {
  void* top = nullptr;  // of the saved stack

  void start(char* stack, std::size_t bytes, void (*entry)()) {
    const auto end = (reinterpret_cast<std::uintptr_t>(stack) + bytes) / 16 * 16;
    auto* words = reinterpret_cast<std::uintptr_t*>(end);
    *(words -= 2) = reinterpret_cast<std::uintptr_t>(entry);  // returned to; the stack is then as after a call
    for (int i = 0; i < 6; ++i) *--words = 0;                 // the registers that a function keeps
    top = words;
  }
};

extern "C" void olive_emulator_switch(void** from, void* to);
inline void switch_fibre(Fibre& from, Fibre& to) { olive_emulator_switch(&from.top, to.top); }

#else

struct Fibre {
  ucontext_t context;

  void start(char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};

inline void switch_fibre(Fibre& from, Fibre& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace olive::emulator
