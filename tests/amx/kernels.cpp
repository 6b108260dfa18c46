// The AMX kernels behind a plain C function: a dispatcher that asks no processor, for a library loaded by ctypes.
#include "cpu/api.h"
#include "cpu/dispatch.h"

namespace olive {

// amx.cpp takes encode and decode from here by way of avx512_vnni.cpp; nothing of them is called.
namespace avx512 {
Kernels kernels() { return {}; }
}  // namespace avx512

const Kernels& kernels_for(Isa) {
  static const Kernels instance = amx::kernels();
  return instance;
}

}  // namespace olive

extern "C" {

void amx_linear(const void* x, int x_type, int64_t m, int64_t n, int64_t k, int group_size, const uint8_t* codes,
                const int16_t* scale, const int8_t* codebook, const void* bias, int bias_type, void* out) {
  olive::LinearArguments arguments = {};
  arguments.x = x;
  arguments.x_type = static_cast<olive::Float>(x_type);
  arguments.m = m;
  arguments.shape = {n, k, group_size};
  arguments.codes = codes;
  arguments.scale = scale;
  arguments.book = olive::read_codebook(codebook);
  arguments.bias = bias;
  arguments.bias_type = static_cast<olive::Float>(bias_type);
  arguments.out = out;
  olive::ovp_linear(olive::Isa::amx, arguments);
}

// Uses a tile that nothing has configured: an error on every processor.
void amx_misuse() { asm volatile("tilezero %tmm0"); }

}  // extern "C"
