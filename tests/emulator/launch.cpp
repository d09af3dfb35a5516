// The runtime: devices, streams, errors, and a launch from its checks to its last block. What a
// device would refuse is refused here with the same error.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "block.h"
#include "controls.h"

namespace emulator {
namespace {

// Handles below are what CUDA uses for its own default streams.
constexpr uintptr_t kFirstStream = 16;
constexpr size_t kMaxParamBytes = 32764;
constexpr unsigned kMaxThreads = 1024;

struct Machine {
  int num_devices = 2;
  std::map<uintptr_t, int> stream_devices;
  uint64_t seed = 0;
  uint64_t launches_since_seed = 0;
  cudaError_t next_failure = cudaSuccess;
  std::vector<Launch> launches;
  cudaError_t text_error = cudaSuccess;  // what error_text is about
  std::string error_text;
};

std::mutex mutex;  // guards the machine; a launch holds it until its last block has ended
Machine machine;
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

using Lock = std::lock_guard<std::mutex>;

// Under the mutex.
cudaError_t refuse(cudaError_t error, const std::string& text) {
  machine.text_error = error;
  machine.error_text = text;
  return last_error = error;
}

std::string text_of(dim3 size) {
  return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " +
         std::to_string(size.z) + ")";
}

// As the source has it, template arguments included, without return type and parameters.
std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_saddr != kernel || info.dli_sname == nullptr) {
    return "a kernel with internal linkage";
  }
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  int depth = 0;  // of template arguments: a parenthesis or a space in them is no end
  size_t begin = 0, end = name.size();
  for (size_t i = 0; i < name.size(); ++i) {
    depth += name[i] == '<' ? 1 : name[i] == '>' ? -1 : 0;
    if (depth > 0) continue;
    if (name[i] == ' ') begin = i + 1;
    if (name[i] == '(') {
      end = i;
      break;
    }
  }
  return name.substr(begin, end - begin);
}

bool is_grid(dim3 grid) {
  return grid.x >= 1 && grid.x <= 0x7FFFFFFFu && grid.y >= 1 && grid.y <= 0xFFFFu && grid.z >= 1 &&
         grid.z <= 0xFFFFu;
}

bool is_block(dim3 block) {
  return block.x >= 1 && block.x <= kMaxThreads && block.y >= 1 && block.y <= kMaxThreads &&
         block.z >= 1 && block.z <= 64 && uint64_t{block.x} * block.y * block.z <= kMaxThreads;
}

cudaError_t check(const cudaLaunchConfig_t& config, const Call& call, const std::string& name) {
  if (current_device >= machine.num_devices) {
    return refuse(machine.num_devices == 0 ? cudaErrorNoDevice : cudaErrorInvalidDevice,
                  name + ": the current device is " + std::to_string(current_device) + " of " +
                      std::to_string(machine.num_devices));
  }
  if (!is_grid(config.gridDim) || !is_block(config.blockDim)) {
    return refuse(cudaErrorInvalidConfiguration, name + ": no device takes a grid of " +
                                                     text_of(config.gridDim) + " blocks of " +
                                                     text_of(config.blockDim) + " threads");
  }
  if (call.param_bytes > kMaxParamBytes) {
    return refuse(cudaErrorInvalidValue, name + ": its parameters take " +
                                             std::to_string(call.param_bytes) +
                                             " bytes, at most 32,764 fit");
  }
  if (config.dynamicSmemBytes != 0 || config.numAttrs != 0) {
    return refuse(cudaErrorNotSupported,
                  name + ": the emulator has neither dynamic shared memory nor launch attributes");
  }
  const auto stream = reinterpret_cast<uintptr_t>(config.stream);
  const auto found = machine.stream_devices.find(stream);
  if (stream != 0 && found == machine.stream_devices.end()) {
    return refuse(cudaErrorInvalidResourceHandle,
                  name + ": there is no stream " + std::to_string(stream));
  }
  if (stream != 0 && found->second != current_device) {
    return refuse(cudaErrorInvalidResourceHandle,
                  name + ": stream " + std::to_string(stream) + " belongs to device " +
                      std::to_string(found->second) + ", the current device is " +
                      std::to_string(current_device));
  }
  return cudaSuccess;
}

// Blocks in an order drawn from the seed; an error ends the launch.
std::string run_blocks(dim3 grid, dim3 block, const Call& call) {
  Random random(machine.seed + 0x9E3779B97F4A7C15u * machine.launches_since_seed++);
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  begin_launch(grid, block, call);
  for (size_t left = order.size(); left > 0; --left) {
    std::swap(order[random.below(left)], order[left - 1]);
    const uint64_t at = order[left - 1];
    const uint3 index{static_cast<unsigned>(at % grid.x),
                      static_cast<unsigned>(at / grid.x % grid.y),
                      static_cast<unsigned>(at / grid.x / grid.y)};
    const std::string error = run_block(index, call, random);
    if (!error.empty()) return "block " + text_of({index.x, index.y, index.z}) + " " + error;
  }
  return end_launch(call);
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t* config, const Call& call) {
  const Lock lock(mutex);
  const std::string name = kernel_name(call.kernel);
  if (machine.next_failure != cudaSuccess) {
    const cudaError_t error = machine.next_failure;
    machine.next_failure = cudaSuccess;
    return refuse(error, name + ": this launch fails because a test wants it to");
  }
  if (config == nullptr) return refuse(cudaErrorInvalidValue, name + ": no launch configuration");
  if (const cudaError_t error = check(*config, call, name); error != cudaSuccess) return error;
  machine.launches.push_back({name, config->gridDim, config->blockDim, call.param_bytes,
                              reinterpret_cast<uintptr_t>(config->stream), current_device});
  const std::string error = run_blocks(config->gridDim, config->blockDim, call);
  if (!error.empty()) return refuse(cudaErrorLaunchFailure, name + ": " + error);
  return cudaSuccess;
}

void reset() {
  const Lock lock(mutex);
  machine = Machine{};
  current_device = 0;
  last_error = cudaSuccess;
}

void set_seed(uint64_t seed) {
  const Lock lock(mutex);
  machine.seed = seed;
  machine.launches_since_seed = 0;
}

std::vector<Launch> launches() {
  const Lock lock(mutex);
  return machine.launches;
}

void clear_launches() {
  const Lock lock(mutex);
  machine.launches.clear();
}

void fail_next_launch(cudaError_t error) {
  const Lock lock(mutex);
  machine.next_failure = error;
}

std::string last_error_text() {
  const Lock lock(mutex);
  return machine.error_text;
}

std::string last_error_text(cudaError_t error) {
  const Lock lock(mutex);
  return error != cudaSuccess && error == machine.text_error ? machine.error_text : "";
}

void set_device_count(int count) {
  if (count < 0) throw std::invalid_argument("count=" + std::to_string(count) + " is negative");
  const Lock lock(mutex);
  machine.num_devices = count;
}

uintptr_t new_stream(int device) {
  const Lock lock(mutex);
  if (device < 0 || device >= machine.num_devices) {
    throw std::invalid_argument("device=" + std::to_string(device) + ": there are " +
                                std::to_string(machine.num_devices));
  }
  const uintptr_t stream = kFirstStream + machine.stream_devices.size();
  machine.stream_devices[stream] = device;
  return stream;
}

}  // namespace emulator

using namespace emulator;

cudaError_t cudaGetDevice(int* device) {
  const Lock lock(mutex);
  if (machine.num_devices == 0) return refuse(cudaErrorNoDevice, "cudaGetDevice: no device");
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  const Lock lock(mutex);
  if (device < 0 || device >= machine.num_devices) {
    return refuse(machine.num_devices == 0 ? cudaErrorNoDevice : cudaErrorInvalidDevice,
                  "cudaSetDevice: device " + std::to_string(device) + " of " +
                      std::to_string(machine.num_devices));
  }
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  const Lock lock(mutex);
  *count = machine.num_devices;
  if (*count == 0) return refuse(cudaErrorNoDevice, "cudaGetDeviceCount: no device");
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
