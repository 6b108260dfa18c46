// What the parts of olive._cpu share.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/arguments.h"
#include "cpu/dispatch.h"

namespace olive {

inline Isa isa_of(const std::string& name) { return name.empty() ? default_isa() : isa_from_name(name); }

// Adds the operators of training to the module.
void bind_training(pybind11::module_& module);

// Adds the operators on uniform integer weights.
void bind_uniform(pybind11::module_& module);

}  // namespace olive
