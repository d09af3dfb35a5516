// Launches the AdamW kernel, in the variant that the step asks for.
#include <algorithm>

#include "adamw.cuh"
#include "adamw_step.h"

namespace gradloc::cuda {
namespace {

template <bool kAmsgrad, bool kStochastic, bool kAnchored, int kCapacity>
void launch_adamw(const Tables& tables, const Scratch& scratch, const StepOptions& options,
                  const GradAddresses& grads, const Target& target) {
  AdamWParams<kCapacity> params{};
  params.tables = tables;
  params.scratch = scratch;
  params.norm_sq = options.norm_sq;
  params.control = options.control;
  params.grad_coef = options.grad_coef;
  params.rounding_seed = options.rounding_seed.value_or(0);
  if (kAnchored) params.recadam = *options.recadam;
  params.group_table = options.group_table;
  if (options.group_table == nullptr) {
    std::copy(options.groups.begin(), options.groups.end(), params.groups);
  }
  put_gradients(grads, params.grads);
  launch("adamw_kernel", adamw_kernel<kAmsgrad, kStochastic, kAnchored, kCapacity>, params, target);
}

template <bool kAmsgrad, bool kStochastic, bool kAnchored>
auto of_capacity(const GradAddresses& grads) {
  return fits_small(grads) ? launch_adamw<kAmsgrad, kStochastic, kAnchored, kSmallCapacity>
                           : launch_adamw<kAmsgrad, kStochastic, kAnchored, kLargeCapacity>;
}

// The kernels for anchors are amsgrad's too: these take as many registers either way, and look
// tensor by tensor whether there is a maximum.
template <bool kStochastic>
auto of_streams(const StepOptions& options, const GradAddresses& grads) {
  if (options.recadam.has_value()) return of_capacity<true, kStochastic, true>(grads);
  return options.amsgrad ? of_capacity<true, kStochastic, false>(grads)
                         : of_capacity<false, kStochastic, false>(grads);
}

}  // namespace

void adamw_step(const Tables& tables, const Scratch& scratch, const StepOptions& options,
                const GradAddresses& grads, const Target& target) {
  const auto start = options.rounding_seed.has_value() ? of_streams<true>(options, grads)
                                                       : of_streams<false>(options, grads);
  start(tables, scratch, options, grads, target);
}

}  // namespace gradloc::cuda
