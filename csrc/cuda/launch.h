// Launches a kernel that takes one params struct, a block a chunk, and copies gradient addresses
// into that struct. Allocates nothing and waits for nothing.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <vector>

#include "params.h"
#include "status.h"

namespace gradloc::cuda {

// Where a launch goes. The stream is one of the device's.
struct Target {
  int device;
  cudaStream_t stream;
};

// Gradients as a launcher gets them: addresses on the host, or `table`, the same ones already in
// device memory. One of the two is enough.
struct GradAddresses {
  const std::vector<const void*>& data;  // [num_tensors]
  const void* const* table;              // [num_tensors] in device memory, or null
};

template <int kCapacity>
void put_gradients(const GradAddresses& from, Gradients<kCapacity>& to) {
  to.table = from.table;
  if (from.table == nullptr) std::copy(from.data.begin(), from.data.end(), to.inlined);
}

inline bool fits_small(const GradAddresses& grads) {
  return grads.table != nullptr || grads.data.size() <= static_cast<size_t>(kSmallCapacity);
}

template <class Params>
void launch(const char* name, void (*kernel)(Params), const Params& params, const Target& target) {
  const DeviceGuard guard(target.device);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::max(params.tables.num_chunks, 1)));
  config.blockDim = dim3(kThreads);
  config.stream = target.stream;
  check(cudaLaunchKernelEx(&config, kernel, params),
        std::string("cudaLaunchKernelEx(") + name + ")");
}

}  // namespace gradloc::cuda
