// gradloc's CUDA core behind two C functions for ctypes, without Python's headers: copies of the
// core with a planted defect are then built in seconds. The tests of the kernels go through the
// module.
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "controls.h"
#include "cuda/adamw_step.h"
#include "cuda/norms.h"
#include "cuda/tables.h"

namespace {

using namespace gradloc;
using namespace gradloc::cuda;

std::string error_text_of_call;

// Tensors as ctypes hands them over; all arrays are [count].
struct Tensors {
  int count, num_layers;
  const int64_t* sizes;
  const int32_t* layers;
  const int32_t* grad_dtypes;
  const void* const* grads;
};

// Device memory is memory: tables and scratch are the driver's own.
struct Memory {
  HostTables host;
  std::vector<double> tables, scratch;

  explicit Memory(const Tensors& t)
      : host({t.sizes, t.sizes + t.count}, {t.layers, t.layers + t.count}, t.num_layers),
        tables((host.table_bytes() + 7) / 8),
        scratch((host.scratch_bytes() + 7) / 8) {}

  void write(const Tensors& t, const std::vector<TensorEntry>& entries,
             const std::vector<double>& scales) {
    std::vector<DType> dtypes;
    for (int i = 0; i < t.count; ++i) dtypes.push_back(static_cast<DType>(t.grad_dtypes[i]));
    host.write(reinterpret_cast<char*>(tables.data()), dtypes, entries, scales);
  }
  Tables device_tables() { return host.at(reinterpret_cast<char*>(tables.data())); }
  Scratch device_scratch() { return host.scratch_at(reinterpret_cast<char*>(scratch.data())); }
};

template <class Work>
int guarded(const Work& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    error_text_of_call = error.what();
    return 1;
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void set_seed(uint64_t seed) { emulator::set_seed(seed); }
const char* error_text() { return error_text_of_call.c_str(); }

// 0, or 1 with the reason in error_text. out: [num_layers]
int layer_sums(const Tensors* tensors, double* out) {
  return guarded([&] {
    const Tensors& t = *tensors;
    Memory memory(t);
    memory.write(t, {}, {});
    const std::vector<const void*> grads(t.grads, t.grads + t.count);
    layer_norm_sq(memory.device_tables(), memory.device_scratch(), out, {}, {grads, nullptr},
                  {0, nullptr});
  });
}

// One step with lr=0.1, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.5 on parameters and moments in
// float32. state: [4, count] addresses of parameters, moments, squared moments and step counts.
int adamw(const Tensors* tensors, void* const* state, double* norm_sq) {
  return guarded([&] {
    const Tensors& t = *tensors;
    std::vector<TensorEntry> entries;
    for (int i = 0; i < t.count; ++i) {
      entries.push_back({state[i], state[t.count + i], state[2 * t.count + i], nullptr,
                         static_cast<float*>(state[3 * t.count + i]), i, 0, 0, t.layers[i],
                         DType::kFloat32, DType::kFloat32, DType::kFloat32, nullptr});
    }
    Memory memory(t);
    memory.write(t, entries, std::vector<double>(static_cast<size_t>(t.num_layers), 1.0));
    const std::vector<const void*> grads(t.grads, t.grads + t.count);
    const std::vector<GroupEntry> groups = {
        {adamw_group(0.1, 0.5, 0.75, 1e-3, 0.5, false), nullptr}};
    const StepOptions options = {groups,  nullptr,      nullptr, 1.0,
                                 norm_sq, std::nullopt, false,   std::nullopt};
    adamw_step(memory.device_tables(), memory.device_scratch(), options, {grads, nullptr},
               {0, nullptr});
  });
}
}
#pragma GCC visibility pop
