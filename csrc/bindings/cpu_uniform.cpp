// Operators of olive._cpu on uniform integer weights: checks what memory safety needs, then calls.

#include <limits>
#include <string>

#include "bindings/cpu_arguments.h"
#include "cpu/uniform.h"

namespace py = pybind11;

namespace olive {
namespace {

void check_uniform(int64_t m, int64_t n, int64_t k, int bits, int64_t group_size) {
  if (m < 0) throw std::invalid_argument("m: expected at least 0, got " + std::to_string(m));
  if (n < 1 || k < 1 || k > kUniformMaxK || n > std::numeric_limits<int64_t>::max() / kUniformMaxK) {
    throw std::invalid_argument("shape: expected N, K >= 1 and K <= 2^18, got " + std::to_string(n) + ", " +
                                std::to_string(k));
  }
  if (bits < 1 || bits > 8) throw std::invalid_argument("bits: expected 1 to 8, got " + std::to_string(bits));
  if (group_size != -1 && (group_size < 1 || group_size % kUniformGroup != 0)) {
    throw std::invalid_argument("group_size: expected -1 or a multiple of 32, got " + std::to_string(group_size));
  }
}

// input_scale 0: the input is not quantized, and what follows is not looked at.
void linear(uintptr_t x, int x_type, int64_t m, int64_t n, int64_t k, int bits, bool mid_rise, int64_t group_size,
            uintptr_t codes, uintptr_t scale, uintptr_t bias, int bias_type, uintptr_t out, uintptr_t input_scale,
            int64_t input_scales, uintptr_t input_offset, int qmin, int qmax, const std::string& isa) {
  check_uniform(m, n, k, bits, group_size);
  UniformQuantizer quantizer = {};
  if (input_scale != 0) {
    if (input_scales < 1) throw std::invalid_argument("input_scales: expected at least 1");
    const bool fits = (qmin >= -128 && qmax <= 127) || (qmin >= 0 && qmax <= 255);
    if (qmin > qmax || !fits) throw std::invalid_argument("qmin, qmax: expected the range of a byte");
    quantizer = {pointer<const float>("input_scale", input_scale), input_scales,
                 pointer<const float>("input_offset", input_offset, true), qmin, qmax};
  }
  const UniformArguments arguments = {pointer<const void>("x", x, m == 0),
                                      float_type(x_type),
                                      m,
                                      n,
                                      k,
                                      bits,
                                      mid_rise,
                                      group_size,
                                      pointer<const uint8_t>("codes", codes),
                                      pointer<const float>("scale", scale),
                                      pointer<const void>("bias", bias, true),
                                      float_type(bias_type),
                                      pointer<void>("out", out, m == 0),
                                      input_scale == 0 ? nullptr : &quantizer};
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  uniform_linear(chosen, arguments);
}

}  // namespace

void bind_uniform(py::module_& module) {
  module.def("uniform_linear", &linear);
  module.attr("uniform_max_k") = kUniformMaxK;
}

}  // namespace olive
