// The AdamW step: scalars for each tensor, then every chunk through the kernel table.
#include "adamw_step.h"

#include <type_traits>

#include "dispatch.h"
#include "norms.h"
#include "parallel.h"

namespace gradloc::cpu {
namespace {

// Tensors mostly share group, layer scale and step: the two powers are computed once for a run of
// them.
std::vector<AdamWScalars> tensor_scalars(const Work& work, const AdamWTensors& tensors,
                                         const Grads& grads, const std::vector<AdamWGroup>& groups,
                                         const std::vector<double>& scales, double clip_coef,
                                         const RecAdam* recadam) {
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
      last =
          adamw_scalars(groups[last_group], groups[last_group].lr, step, scale, clip_coef, recadam);
    }
    scalars[i] = last;
  }
  return scalars;
}

// Keys of the tensors that have a gradient; none at all without a seed.
std::vector<RoundingKey> rounding_keys(const AdamWTensors& tensors, const Grads& grads,
                                       std::optional<uint64_t> seed) {
  std::vector<RoundingKey> keys(grads.data.size());
  if (!seed.has_value()) return keys;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (grads.data[i] == nullptr) continue;
    const auto step = static_cast<uint64_t>(*tensors.steps[i] + 1.0f);  // as it will be stored
    keys[i] = rounding_key(*seed, step, static_cast<uint64_t>(tensors.tensor_ids[i]));
  }
  return keys;
}

// Address of an element of a tensor; null stays null.
template <class Pointer>
Pointer* element_at(Pointer* first, int64_t offset, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
  return first == nullptr ? nullptr : static_cast<Byte*>(first) + offset * dtype_bytes(dtype);
}

}  // namespace

void adamw_step(Work& work, const AdamWTensors& tensors, const Grads& grads,
                const std::vector<AdamWGroup>& groups, const std::vector<double>& scales,
                double clip_coef, double* norm_sq_out, std::optional<uint64_t> rounding_seed,
                const std::optional<RecAdam>& recadam, int num_threads) {
  const KernelTable& table = kernels();
  const bool with_norm = norm_sq_out != nullptr;
  const std::vector<AdamWScalars> scalars = tensor_scalars(
      work, tensors, grads, groups, scales, clip_coef, recadam ? &*recadam : nullptr);
  const std::vector<RoundingKey> keys = rounding_keys(tensors, grads, rounding_seed);
  parallel_for(static_cast<int64_t>(work.chunks.size()), num_threads, [&](int64_t i) {
    const Chunk& at = work.chunks[i];
    const int32_t t = at.tensor;
    if (grads.data[t] == nullptr) return;
    const DType param_dtype = tensors.param_dtypes[t];
    const DType grad_dtype = grads.dtypes[t];
    const DType moment_dtype = tensors.moment_dtypes[t];
    const DType anchor_dtype = recadam ? tensors.anchor_dtypes[t] : DType::kFloat32;
    const void* anchor = recadam ? tensors.anchors[t] : nullptr;
    const AdamWChunk chunk = {element_at(tensors.params[t], at.offset, param_dtype),
                              element_at(grads.data[t], at.offset, grad_dtype),
                              element_at(tensors.exp_avgs[t], at.offset, moment_dtype),
                              element_at(tensors.exp_avg_sqs[t], at.offset, moment_dtype),
                              element_at(tensors.max_exp_avg_sqs[t], at.offset, moment_dtype),
                              element_at(anchor, at.offset, anchor_dtype),
                              at.size,
                              param_dtype,
                              grad_dtype,
                              moment_dtype,
                              anchor_dtype,
                              scalars[t],
                              rounding_seed.has_value(),
                              keys[t],
                              static_cast<uint64_t>(tensors.first_elements[t] + at.offset)};
    work.partial[i] = table.adamw(chunk, with_norm);
  });
  for (size_t t = 0; t < work.num_tensors(); ++t) {
    if (grads.data[t] != nullptr) *tensors.steps[t] += 1.0f;
  }
  if (with_norm) sum_by_layer(work, grads, norm_sq_out);
}

}  // namespace gradloc::cpu
