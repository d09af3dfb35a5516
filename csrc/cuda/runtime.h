// What the CUDA runtime says about this machine, for `gradloc doctor`. Launches nothing.
#pragma once

#include <string>

namespace gradloc::cuda {

struct RuntimeReport {
  std::string compiled_version;  // toolkit that compiled the module, as "13.0"
  int num_devices;
  std::string status;  // "ok", or why there is no device
};

RuntimeReport runtime_report();

}  // namespace gradloc::cuda
