// One AdamW step over a list of tensors on a CUDA device.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "launch.h"
#include "params.h"

namespace gradloc::cuda {

// What is new in every step, beside the gradients.
struct StepOptions {
  const std::vector<GroupEntry>& groups;  // [groups] by param group
  const GroupEntry* group_table;  // the same in device memory; needed beyond kMaxInlineGroups
  const Control* control;         // in device memory, or null: grad_coef
  double grad_coef;               // what gradients are multiplied by
  double* norm_sq;  // [num_layers] in device memory: sums of squares of the gradients, or null
  std::optional<uint64_t> rounding_seed;  // of stochastic rounding; without it to nearest even
  bool amsgrad;                           // whether any tensor has a max_exp_avg_sq
  std::optional<RecAdam> recadam;         // where the tensors have anchors
};

// Updates parameters, moments and step counts of every tensor that has a gradient. One launch.
void adamw_step(const Tables& tables, const Scratch& scratch, const StepOptions& options,
                const GradAddresses& grads, const Target& target);

}  // namespace gradloc::cuda
