#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(OLIVE_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace olive {
namespace {

constexpr const char* kNames[kIsaCount] = {"portable", "avx2", "avx512", "avx512_vnni", "amx"};

#if defined(OLIVE_EMULATED)
bool detect(Isa) { return true; }  // tests/avx512/emulator stands in for what the processor lacks
#elif defined(OLIVE_X86)
// The processor has AMX int8 and Linux lets this process use the tile state (asked for once, for all its threads).
bool request_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool has_tile = (edx >> 24) & 1, has_int8 = (edx >> 25) & 1;
  if (!has_tile || !has_int8) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool detect(Isa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_vnni:
      return vnni;
    case Isa::amx:
      return vnni && request_amx();
  }
  return false;
}
#else
bool detect(Isa isa) { return isa == Isa::portable; }
#endif

struct Table {
  bool supported[kIsaCount];
  Kernels kernels[kIsaCount];
};

const Table& table() {
  static const Table instance = [] {
    Table built = {};
    for (int i = 0; i < kIsaCount; ++i) built.supported[i] = detect(static_cast<Isa>(i));
    built.kernels[0] = portable::kernels();
#if defined(OLIVE_X86)
    // These functions themselves are compiled for their instruction set: a processor without it must not call them.
    Kernels (*const makers[kIsaCount])() = {portable::kernels, avx2::kernels, avx512::kernels, avx512_vnni::kernels,
                                            amx::kernels};
    for (int i = 1; i < kIsaCount; ++i) {
      if (built.supported[i]) built.kernels[i] = makers[i]();
    }
#endif
    return built;
  }();
  return instance;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(const std::string& name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (name == kNames[i]) return static_cast<Isa>(i);
  }
  throw std::invalid_argument("isa: expected portable, avx2, avx512, avx512_vnni or amx, got " + name);
}

bool isa_supported(Isa isa) { return table().supported[static_cast<int>(isa)]; }

Isa default_isa() {
  static const Isa chosen = [] {
    if (const char* name = std::getenv("OLIVE_CPU_ISA")) {
      const Isa isa = isa_from_name(name);
      kernels_for(isa);  // throws if it cannot run
      return isa;
    }
    Isa best = Isa::portable;
    for (int i = 0; i < kIsaCount; ++i) {
      if (isa_supported(static_cast<Isa>(i))) best = static_cast<Isa>(i);
    }
    return best;
  }();
  return chosen;
}

const Kernels& kernels_for(Isa isa) {
  if (!isa_supported(isa)) {
    throw std::runtime_error(std::string("isa: expected one that this processor and system support, got ") +
                             isa_name(isa) + "; unset OLIVE_CPU_ISA to choose automatically");
  }
  return table().kernels[static_cast<int>(isa)];
}

}  // namespace olive
