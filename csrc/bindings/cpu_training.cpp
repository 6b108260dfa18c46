// The part of olive._cpu that trains: StatsQ, LSQ and oscillations.
#include <algorithm>

#include "bindings/cpu_arguments.h"
#include "cpu/api.h"

namespace py = pybind11;

namespace olive {
namespace {

RowGroups row_groups(uintptr_t weight, int type, int64_t n, int64_t k, int64_t width) {
  check_shape(n, k, -1);
  if (width < 1 || width > k) throw std::invalid_argument("width: expected 1 to K, got " + std::to_string(width));
  return {pointer<const void>("weight", weight), float_type(type), n, k, width};
}

// Results at address 0 are not asked for.
void statsq_at(uintptr_t weight, int type, int64_t n, int64_t k, int64_t width, int bits, uintptr_t levels,
               uintptr_t codes, uintptr_t scale, uintptr_t margin, const std::string& isa) {
  if (bits < 1 || bits > 8) throw std::invalid_argument("bits: expected 1 to 8, got " + std::to_string(bits));
  const StatsQ q = {row_groups(weight, type, n, k, width), 1 << (bits - 1),
                    pointer<void>("levels", levels, true), pointer<int8_t>("codes", codes, true),
                    pointer<float>("scale", scale, true),  pointer<float>("margin", margin, true)};
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  statsq(chosen, q);
}

// grad: 0 for the forward pass.
LsqArguments lsq_arguments(uintptr_t input, int type, int64_t outer, int64_t size, int64_t inner, uintptr_t scale,
                           int qmin, int qmax, bool is_sign, uintptr_t grad, uintptr_t out, bool backward) {
  if (outer < 0 || size < 0 || inner < 0 || std::max({outer, size, inner}) > (int64_t{1} << 40)) {
    throw std::invalid_argument("shape: expected outer, size and inner from 0 to 2^40");
  }
  const int64_t most = std::numeric_limits<int64_t>::max() / 16;
  if (inner > 0 && size > 0 && outer > most / inner / size) throw std::invalid_argument("shape: expected fewer values");
  if (!(qmin < qmax && qmin >= -128 && qmax <= 255))
    throw std::invalid_argument("qmin, qmax: expected a range of 8 bits");
  const bool empty = outer * size * inner == 0;
  LsqArguments arguments = {};
  arguments.outer = outer;
  arguments.size = size;
  arguments.inner = inner;
  arguments.scale = pointer<const float>("scale", scale, size == 0);
  arguments.values = {pointer<const void>("input", input, empty),
                      float_type(type),
                      static_cast<float>(qmin),
                      static_cast<float>(qmax),
                      is_sign,
                      pointer<const void>("grad", grad, empty || !backward),
                      pointer<void>("out", out, empty)};
  return arguments;
}

void lsq_at(uintptr_t input, int type, int64_t outer, int64_t size, int64_t inner, uintptr_t scale, int qmin, int qmax,
            bool is_sign, uintptr_t out, const std::string& isa) {
  const LsqArguments arguments =
      lsq_arguments(input, type, outer, size, inner, scale, qmin, qmax, is_sign, 0, out, false);
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  lsq(chosen, arguments);
}

void lsq_backward_at(uintptr_t grad, uintptr_t input, int type, int64_t outer, int64_t size, int64_t inner,
                     uintptr_t scale, int qmin, int qmax, bool is_sign, uintptr_t grad_input, uintptr_t grad_scale,
                     const std::string& isa) {
  const LsqArguments arguments =
      lsq_arguments(input, type, outer, size, inner, scale, qmin, qmax, is_sign, grad, grad_input, true);
  float* to = pointer<float>("grad_scale", grad_scale, size == 0);
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  lsq_backward(chosen, arguments, to);
}

void oscillation_at(uintptr_t weight, int type, int64_t n, int64_t k, int64_t width, uintptr_t step, bool one_step,
                    float offset, int qmin, int qmax, float momentum, float keep, float boundary, uintptr_t codes,
                    uintptr_t direction, uintptr_t frequency, uintptr_t near, const std::string& isa) {
  if (!(qmin < qmax && qmin >= -128 && qmax <= 127))
    throw std::invalid_argument("qmin, qmax: expected a range of int8");
  const Oscillation q = {row_groups(weight, type, n, k, width),
                         pointer<const float>("step", step),
                         one_step,
                         offset,
                         static_cast<float>(qmin),
                         static_cast<float>(qmax),
                         momentum,
                         keep,
                         boundary,
                         pointer<int8_t>("codes", codes),
                         pointer<int8_t>("direction", direction),
                         pointer<float>("frequency", frequency),
                         pointer<uint8_t>("near", near)};
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  oscillation(chosen, q);
}

}  // namespace

void bind_training(py::module_& module) {
  module.def("statsq", &statsq_at);
  module.def("lsq", &lsq_at);
  module.def("lsq_backward", &lsq_backward_at);
  module.def("oscillation", &oscillation_at);
}

}  // namespace olive
