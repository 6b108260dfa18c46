// AVX-512 with VNNI: byte products summed to 32 bits, four at a time.
#include "cpu/lanes.h"
#include "cpu/uniform.h"

namespace olive {
namespace avx512_vnni {
namespace {

#include "cpu/activations.inl"

#include "cpu/linear_common.inl"

#include "cpu/decode_avx512.inl"

#include "cpu/linear_bytes.inl"

#include "cpu/linear_vnni.inl"

#include "cpu/uniform_dot_vnni.inl"

#include "cpu/uniform_linear.inl"

}  // namespace

Kernels kernels() {
  Kernels set = avx512::kernels();  // encode and decode gain nothing from VNNI
  set.convert_rows = convert_rows;
  set.linear = linear_vnni;
  set.uniform_linear = uniform_linear;
  set.bytes = true;
  return set;
}

}  // namespace avx512_vnni
}  // namespace olive
