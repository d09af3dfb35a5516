// The norms: every chunk through the kernel table, then chunks into layers in a fixed order.
#include "norms.h"

#include "dispatch.h"
#include "parallel.h"

namespace gradloc::cpu {

void sum_by_layer(const Work& work, const Grads& grads, double* out) {
  for (int32_t layer = 0; layer < work.num_layers; ++layer) out[layer] = 0.0;
  for (size_t i = 0; i < work.chunks.size(); ++i) {
    const Chunk& chunk = work.chunks[i];
    if (grads.data[chunk.tensor] != nullptr) out[chunk.layer] += work.partial[i];
  }
}

void layer_norm_sq(Work& work, const Grads& grads, double* out, int num_threads) {
  const KernelTable& table = kernels();
  parallel_for(static_cast<int64_t>(work.chunks.size()), num_threads, [&](int64_t i) {
    const Chunk& chunk = work.chunks[i];
    const void* grad = grads.data[chunk.tensor];
    if (grad == nullptr) return;
    const DType dtype = grads.dtypes[chunk.tensor];
    const char* first = static_cast<const char*>(grad) + chunk.offset * dtype_bytes(dtype);
    work.partial[i] = table.norm_sq(first, dtype, chunk.size);
  });
  sum_by_layer(work, grads, out);
}

}  // namespace gradloc::cpu
