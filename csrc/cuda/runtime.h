// What the CUDA runtime says about this machine, for `gradloc doctor` and for the choice of a
// backend. Launches nothing.
#pragma once

#include <string>

namespace gradloc::cuda {

struct RuntimeReport {
  std::string compiled_version;  // toolkit that compiled the module, as "13.0"
  int num_devices;
  std::string status;  // "ok", or why there is no device
};

RuntimeReport runtime_report();

// Why kernels cannot run on this device, such as an architecture that they were not compiled for;
// empty when they can.
std::string kernel_problem(int device);

}  // namespace gradloc::cuda
