// What the files that see Python share: gradients as an object that Python passes from one compiled
// function to another, RecAdam's settings, and the checks of lists that come from there.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "adamw.h"
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

// what: "moments" or "anchors".
inline void check_state_dtypes(const char* what, const std::vector<DType>& dtypes) {
  for (size_t i = 0; i < dtypes.size(); ++i) {
    if (dtypes[i] != DType::kFloat16) continue;
    throw std::invalid_argument(std::string(what) + " of tensor " + std::to_string(i) +
                                " are float16: float32 or bfloat16");
  }
}

// gamma, k, t0, anneal
using RecAdamTuple = std::tuple<double, double, double, int32_t>;

inline std::optional<RecAdam> recadam_of(const std::optional<RecAdamTuple>& tuple,
                                         bool has_anchors) {
  if (tuple.has_value() != has_anchors) {
    throw std::invalid_argument("recadam and anchors: both or neither");
  }
  if (!tuple.has_value()) return std::nullopt;
  const auto& [gamma, k, t0, anneal] = *tuple;
  if (anneal < 0 || anneal > static_cast<int32_t>(Anneal::kConstant)) {
    throw std::invalid_argument("anneal code " + std::to_string(anneal) + " is unknown");
  }
  return RecAdam{gamma, k, t0, static_cast<Anneal>(anneal)};
}

}  // namespace gradloc
