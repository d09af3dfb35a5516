// Per-layer sums of squared gradients on a CUDA device, and the decisions of a step that rest on
// them.
#pragma once

#include "launch.h"
#include "params.h"

namespace gradloc::cuda {

// norm_sq[l] = sum of g² over the tensors of layer l that have a gradient; with a control in
// `decision` also what the step does. One launch.
void layer_norm_sq(const Tables& tables, const Scratch& scratch, double* norm_sq,
                   const Decision& decision, const GradAddresses& grads, const Target& target);

}  // namespace gradloc::cuda
