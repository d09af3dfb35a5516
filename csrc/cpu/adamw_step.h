// One AdamW step over a list of tensors on the CPU.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../adamw.h"
#include "../work.h"

namespace gradloc::cpu {

// Updates parameters, moments and step counts of every tensor that has a gradient.
// groups: hyperparameters by param group; scales: [num_layers] learning-rate scale of each layer;
// clip_coef: what the gradients are multiplied by; norm_sq_out: [num_layers] or null, the sums of
// squared gradients as they came; rounding_seed: what is stored in bfloat16 is rounded
// stochastically with it, without it to nearest even; recadam: given where the tensors have
// anchors.
void adamw_step(Work& work, const AdamWTensors& tensors, const Grads& grads,
                const std::vector<AdamWGroup>& groups, const std::vector<double>& scales,
                double clip_coef, double* norm_sq_out, std::optional<uint64_t> rounding_seed,
                const std::optional<RecAdam>& recadam, int num_threads);

}  // namespace gradloc::cpu
