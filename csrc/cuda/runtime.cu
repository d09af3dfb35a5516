// Asks the CUDA runtime for its version and devices; the place from which CUDA code is linked in.
#include <cuda_runtime_api.h>

#include "runtime.h"

namespace gradloc::cuda {

RuntimeReport runtime_report() {
  RuntimeReport report;
  report.compiled_version =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  report.num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&report.num_devices);
  if (error != cudaSuccess) {
    report.num_devices = 0;
    report.status = std::string("cudaGetDeviceCount: ") + cudaGetErrorString(error);
    cudaGetLastError();  // the error is reported; do not leave it for the next caller
  } else {
    report.status = report.num_devices > 0 ? "ok" : "no CUDA device";
  }
  return report;
}

}  // namespace gradloc::cuda
