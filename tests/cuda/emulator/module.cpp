// The CUDA backend as a Python module that runs on the emulator: the same functions on CPU addresses, and a few to
// steer the emulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cuda/api.h"
#include "cuda/runtime.cuh"

namespace olive::cuda {

void bind(pybind11::module_& module);

Device device(int) { return current_device(); }

std::string unsupported(int index) {
  if (device(index).capability >= 80) return "";
  return "the emulator has code for 8.0 and later, the GPU has compute capability " +
         std::to_string(device(index).capability);
}

}  // namespace olive::cuda

PYBIND11_MODULE(emulated_cuda, module) {
  namespace emulator = olive::emulator;
  olive::cuda::bind(module);
  module.def("set_schedule", [](unsigned schedule) { emulator::schedule = schedule; });
  module.def("set_device", [](int multiprocessors, int capability, int shared_per_block) {
    emulator::fake_device = {multiprocessors, capability, shared_per_block};
  });
  // Names of the kernels that ran since the last call.
  module.def("launched", [] { return std::exchange(emulator::launched, {}); });
}
