// Launches the norms kernel, in the variant that the number of tensors asks for.
#include "norms.cuh"
#include "norms.h"

namespace gradloc::cuda {
namespace {

template <int kCapacity>
void launch_norms(const Tables& tables, const Scratch& scratch, double* norm_sq,
                  const Decision& decision, const GradAddresses& grads, const Target& target) {
  NormParams<kCapacity> params{};
  params.tables = tables;
  params.scratch = scratch;
  params.norm_sq = norm_sq;
  params.decision = decision;
  put_gradients(grads, params.grads);
  launch("norms_kernel", norms_kernel<kCapacity>, params, target);
}

}  // namespace

void layer_norm_sq(const Tables& tables, const Scratch& scratch, double* norm_sq,
                   const Decision& decision, const GradAddresses& grads, const Target& target) {
  const auto start =
      fits_small(grads) ? launch_norms<kSmallCapacity> : launch_norms<kLargeCapacity>;
  start(tables, scratch, norm_sq, decision, grads, target);
}

}  // namespace gradloc::cuda
