// The AdamW step: scalars for each tensor, then every chunk through the kernel table.
#include "adamw_step.h"

#include "dispatch.h"
#include "norms.h"
#include "parallel.h"

namespace gradloc::cpu {
namespace {

// Tensors mostly share group, layer scale and step: the two powers are computed once for a run of
// them.
std::vector<AdamWScalars> tensor_scalars(const Work& work, const AdamWTensors& tensors,
                                         const Grads& grads, const std::vector<AdamWGroup>& groups,
                                         const std::vector<double>& scales, double clip_coef) {
  std::vector<AdamWScalars> scalars(work.num_tensors());
  int32_t last_group = -1;
  double last_step = 0.0, last_scale = 0.0;
  AdamWScalars last{};
  for (size_t i = 0; i < work.num_tensors(); ++i) {
    if (grads.data[i] == nullptr) continue;
    const double step = static_cast<double>(*tensors.steps[i]) + 1.0;
    const double scale = scales[work.layers[i]];
    if (tensors.groups[i] != last_group || step != last_step || scale != last_scale) {
      last_group = tensors.groups[i];
      last_step = step;
      last_scale = scale;
      last = adamw_scalars(groups[last_group], step, scale, clip_coef);
    }
    scalars[i] = last;
  }
  return scalars;
}

}  // namespace

void adamw_step(Work& work, const AdamWTensors& tensors, const Grads& grads,
                const std::vector<AdamWGroup>& groups, const std::vector<double>& scales,
                double clip_coef, double* norm_sq_out, int num_threads) {
  const KernelTable& table = kernels();
  const bool with_norm = norm_sq_out != nullptr;
  const std::vector<AdamWScalars> scalars =
      tensor_scalars(work, tensors, grads, groups, scales, clip_coef);
  parallel_for(static_cast<int64_t>(work.chunks.size()), num_threads, [&](int64_t i) {
    const Chunk& at = work.chunks[i];
    const int32_t t = at.tensor;
    if (grads.data[t] == nullptr) return;
    const DType param_dtype = tensors.param_dtypes[t];
    const DType grad_dtype = grads.dtypes[t];
    float* max_exp_avg_sq = tensors.max_exp_avg_sqs[t];
    const AdamWChunk chunk = {
        static_cast<char*>(tensors.params[t]) + at.offset * dtype_bytes(param_dtype),
        static_cast<const char*>(grads.data[t]) + at.offset * dtype_bytes(grad_dtype),
        tensors.exp_avgs[t] + at.offset,
        tensors.exp_avg_sqs[t] + at.offset,
        max_exp_avg_sq == nullptr ? nullptr : max_exp_avg_sq + at.offset,
        at.size,
        param_dtype,
        grad_dtype,
        scalars[t]};
    work.partial[i] = table.adamw(chunk, with_norm);
  });
  for (size_t t = 0; t < work.num_tensors(); ++t) {
    if (grads.data[t] != nullptr) *tensors.steps[t] += 1.0f;
  }
  if (with_norm) sum_by_layer(work, grads, norm_sq_out);
}

}  // namespace gradloc::cpu
