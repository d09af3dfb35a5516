// Asks the CUDA runtime for its version and devices, and whether it has code for one of them.
#include <cuda_runtime.h>

#include "runtime.h"
#include "status.h"

namespace gradloc::cuda {
namespace {

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Compiled for the same architectures as all others, and never launched.
__global__ void probe_kernel() {}

std::string why_no_device(cudaError_t error) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    return "no NVIDIA driver is installed here";
  }
  if (error == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver is made for CUDA " + version_name(driver) +
           " at most, older than what compiled the kernels: update the driver, or build gradloc "
           "with an older nvcc";
  }
  return std::string("cudaGetDeviceCount: ") + cudaGetErrorString(error);
}

}  // namespace

RuntimeReport runtime_report() {
  RuntimeReport report;
  report.compiled_version = version_name(CUDART_VERSION);
  report.num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&report.num_devices);
  if (error != cudaSuccess) {
    report.num_devices = 0;
    report.status = why_no_device(error);
    cudaGetLastError();  // the error is reported; do not leave it for the next caller
  } else {
    report.status = report.num_devices > 0 ? "ok" : "no CUDA device";
  }
  return report;
}

std::string kernel_problem(int device) {
  try {
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    if (driver < 12010) {
      return "the NVIDIA driver is made for CUDA " + version_name(driver) +
             ", and the kernels' parameters need 12.1: update the driver";
    }
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, probe_kernel), "cudaFuncGetAttributes");
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace gradloc::cuda
