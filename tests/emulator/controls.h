// What a test may ask of the emulator, beside CUDA's own functions. For C++; module.cpp has the
// same for Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

namespace emulator {

struct Launch {
  std::string kernel;
  dim3 grid, block;
  size_t param_bytes;
  uintptr_t stream;
  int device;
};

// As in the beginning: two devices, no streams, seed 0, nothing recorded, nothing to fail. The
// calling thread's device is 0 again.
void reset();

// The order of blocks and threads is a function of the seed, and of how many launches followed.
void set_seed(uint64_t seed);

// Launches that ran or failed while running, since the list was cleared.
std::vector<Launch> launches();
void clear_launches();

// The next launch runs nothing and returns this.
void fail_next_launch(cudaError_t error);

// About the last error, whichever thread met it: more than cudaGetErrorString can say.
std::string last_error_text();
// The same if it is about this error, else empty.
std::string last_error_text(cudaError_t error);

void set_device_count(int count);

// A handle for cudaStream_t. 0, always there, is the default stream of the current device.
uintptr_t new_stream(int device);

}  // namespace emulator
