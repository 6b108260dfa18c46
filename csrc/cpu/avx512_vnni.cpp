// AVX-512 with VNNI: byte products summed to 32 bits, four at a time.
#include "cpu/lanes.h"

namespace olive {
namespace avx512_vnni {
namespace {

#include "cpu/activations.inl"

#include "cpu/linear_common.inl"

#include "cpu/decode_avx512.inl"

#include "cpu/linear_bytes.inl"

#include "cpu/linear_vnni.inl"

void linear(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  if (problem.x.wide) {
    linear_vnni<true>(problem, m_begin, m_end, begin, end);
  } else {
    linear_vnni<false>(problem, m_begin, m_end, begin, end);
  }
}

}  // namespace

Kernels kernels() {
  Kernels set = avx512::kernels();  // encode and decode gain nothing from VNNI
  set.convert_rows = convert_rows;
  set.linear = linear;
  set.bytes = true;
  return set;
}

}  // namespace avx512_vnni
}  // namespace olive
