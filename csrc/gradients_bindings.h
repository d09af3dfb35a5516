// What the files that see Python share: gradients as an object that Python passes from one compiled
// function to another, and the checks of lists that come from there.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "work.h"

namespace gradloc {

using Addresses = std::vector<uintptr_t>;

// The gradients of a step, in the order of a work's tensors.
struct PyGradients {
  Grads list;
  std::vector<pybind11::object> kept;  // what the addresses belong to
};

inline std::vector<DType> dtypes(const std::vector<int32_t>& codes) {
  std::vector<DType> out(codes.size());
  for (size_t i = 0; i < out.size(); ++i) {
    if (codes[i] < 0 || codes[i] >= kNumDTypes) {
      throw std::invalid_argument("dtype code " + std::to_string(codes[i]) + " is unknown");
    }
    out[i] = static_cast<DType>(codes[i]);
  }
  return out;
}

inline void check_length(const char* what, size_t length, size_t expected) {
  if (length != expected) {
    throw std::invalid_argument(std::string(what) + " has " + std::to_string(length) +
                                " entries, expected " + std::to_string(expected));
  }
}

inline void check_moment_dtype(DType dtype, size_t tensor) {
  if (dtype == DType::kFloat16) {
    throw std::invalid_argument("moments of tensor " + std::to_string(tensor) +
                                " are float16: float32 or bfloat16");
  }
}

}  // namespace gradloc
