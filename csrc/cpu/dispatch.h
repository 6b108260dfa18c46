// Which instruction set runs, decided once by cpuid.
#pragma once

#include <string>

#include "cpu/kernels.h"

namespace olive {

const char* isa_name(Isa isa);

// "portable", "avx2", "avx512", "avx512_vnni", "amx"; throws std::invalid_argument on another name.
Isa isa_from_name(const std::string& name);

// Whether this processor and this operating system can run it.
bool isa_supported(Isa isa);

// The best supported one, or what the environment variable OLIVE_CPU_ISA names.
Isa default_isa();

// Throws std::runtime_error if it is not supported.
const Kernels& kernels_for(Isa isa);

}  // namespace olive
