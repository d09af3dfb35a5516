// What gradloc/watch.py uses of the compiled module: a class that notices changes between two steps
// of an optimizer, and collects gradients. Its methods are told in watch_bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace gradloc {

// Adds TensorWatch to a module, and Gradients must be there already.
void register_watch(pybind11::module_& m);

}  // namespace gradloc
