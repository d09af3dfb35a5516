// Launches the AdamW kernel, in the variant that the step asks for.
#include <algorithm>

#include "adamw.cuh"
#include "adamw_step.h"

namespace gradloc::cuda {
namespace {

template <bool kAmsgrad, bool kStochastic, int kCapacity>
void launch_adamw(const Tables& tables, const Scratch& scratch, const StepOptions& options,
                  const GradAddresses& grads, const Target& target) {
  AdamWParams<kCapacity> params{};
  params.tables = tables;
  params.scratch = scratch;
  params.norm_sq = options.norm_sq;
  params.control = options.control;
  params.grad_coef = options.grad_coef;
  params.rounding_seed = options.rounding_seed.value_or(0);
  params.group_table = options.group_table;
  if (options.group_table == nullptr) {
    std::copy(options.groups.begin(), options.groups.end(), params.groups);
  }
  put_gradients(grads, params.grads);
  launch("adamw_kernel", adamw_kernel<kAmsgrad, kStochastic, kCapacity>, params, target);
}

template <bool kAmsgrad, bool kStochastic>
auto of_capacity(const GradAddresses& grads) {
  return fits_small(grads) ? launch_adamw<kAmsgrad, kStochastic, kSmallCapacity>
                           : launch_adamw<kAmsgrad, kStochastic, kLargeCapacity>;
}

}  // namespace

void adamw_step(const Tables& tables, const Scratch& scratch, const StepOptions& options,
                const GradAddresses& grads, const Target& target) {
  const bool stochastic = options.rounding_seed.has_value();
  const auto start =
      options.amsgrad
          ? (stochastic ? of_capacity<true, true>(grads) : of_capacity<true, false>(grads))
          : (stochastic ? of_capacity<false, true>(grads) : of_capacity<false, false>(grads));
  start(tables, scratch, options, grads, target);
}

}  // namespace gradloc::cuda
