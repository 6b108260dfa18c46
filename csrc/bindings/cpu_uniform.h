// Adds the operators on uniform integer weights to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace olive {

void define_uniform(pybind11::module_& module);

}  // namespace olive
