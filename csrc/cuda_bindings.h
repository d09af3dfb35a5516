// The part of a compiled module that runs on CUDA devices.
#pragma once

#include <pybind11/pybind11.h>

namespace gradloc {

// Adds the classes CudaNormWork and CudaAdamWWork.
void register_cuda(pybind11::module_& m);

}  // namespace gradloc
