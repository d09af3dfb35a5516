// What a caller hands to a backend: the tensors of one optimizer or one norm call, cut into chunks.
// Holds addresses only; whoever makes one keeps the tensors alive.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "chunks.h"

namespace gradloc {

struct Work {
  std::vector<int64_t> sizes;   // [tensors] elements
  std::vector<int32_t> layers;  // [tensors] layer index, 0 to num_layers - 1
  int32_t num_layers;
  std::vector<Chunk> chunks;
  std::vector<double> partial;  // [chunks] scratch: the sum of squares of each chunk

  Work(std::vector<int64_t> sizes_in, std::vector<int32_t> layers_in, int32_t num_layers_in)
      : sizes(std::move(sizes_in)), layers(std::move(layers_in)), num_layers(num_layers_in) {
    if (sizes.size() != layers.size()) {
      throw std::invalid_argument("sizes and layers differ in length");
    }
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] < 0 || layers[i] < 0 || layers[i] >= num_layers) {
        throw std::invalid_argument("tensor " + std::to_string(i) +
                                    " has a negative size or a layer out of range");
      }
    }
    chunks = make_chunks(sizes, layers);
    partial.resize(chunks.size());
  }

  size_t num_tensors() const { return sizes.size(); }
};

// The gradients of a step: they come with new addresses every time. A null address: no gradient.
struct Grads {
  std::vector<const void*> data;  // [tensors]
  std::vector<DType> dtypes;      // [tensors]
};

// The parameters and state of an AdamW step, in the order of the work's tensors.
struct AdamWTensors {
  std::vector<void*> params;           // [tensors], param_dtypes
  std::vector<DType> param_dtypes;     // [tensors]
  std::vector<DType> moment_dtypes;    // [tensors] of the next three: float32 or bfloat16
  std::vector<void*> exp_avgs;         // [tensors]
  std::vector<void*> exp_avg_sqs;      // [tensors]
  std::vector<void*> max_exp_avg_sqs;  // [tensors], null without amsgrad
  std::vector<float*> steps;           // [tensors] one float32 each, steps taken so far
  std::vector<int32_t> groups;         // [tensors] index of the param group
  // For stochastic rounding: what tells a tensor from others, and where a shard begins in it.
  std::vector<int64_t> tensor_ids;      // [tensors]
  std::vector<int64_t> first_elements;  // [tensors] position of the first element in the whole
  // For RecAdam: what the parameters are pulled to, float32 or bfloat16. Empty without it.
  std::vector<const void*> anchors;  // [tensors]
  std::vector<DType> anchor_dtypes;  // [tensors]
};

}  // namespace gradloc
