// Per-layer sums of squared gradients on the CPU.
#pragma once

#include "../work.h"

namespace gradloc::cpu {

// out[l] = sum of g² over the tensors of layer l that have a gradient, in float64. out:
// [num_layers].
void layer_norm_sq(Work& work, const Grads& grads, double* out, int num_threads);

// Adds the chunks' partial sums into layers, in chunk order: the same bits for any number of
// threads.
void sum_by_layer(const Work& work, const Grads& grads, double* out);

}  // namespace gradloc::cpu
