// The arithmetic of AdamW for one element, and the scalars it needs. Every backend includes this
// file; the formula stands nowhere else. Loads, stores and the walk over chunks are the backends'.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace gradloc {

// What a param group says, as torch.optim.AdamW means it.
struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay;
  double log_beta1, log_beta2;  // of a beta of 0, minus infinity
  bool maximize;
};

inline AdamWGroup adamw_group(double lr, double beta1, double beta2, double eps,
                              double weight_decay, bool maximize) {
  return {lr, beta1, beta2, eps, weight_decay, std::log(beta1), std::log(beta2), maximize};
}

// The scalars of one tensor in one step, rounded to float32 once.
struct AdamWScalars {
  float grad_coef;              // clip coefficient, negative when maximizing
  float decay;                  // 1 - lr·s·weight_decay
  float beta1;                  //
  float one_minus_beta1;        // 1 - beta1
  float beta2;                  //
  float one_minus_beta2;        // 1 - beta2
  float step_size;              // lr·s / (1 - beta1^t)
  float bias_correction2_sqrt;  // sqrt(1 - beta2^t)
  float eps;                    //
};

// lr: the group's. step: t, counted from 1, of this tensor. lr_scale: s, the layer's scale.
// clip_coef: what gradients are multiplied by. 1 - β^t is taken as -expm1(t·log β): an exponential
// costs a GPU far less than a power.
GRADLOC_HOST_DEVICE static inline AdamWScalars adamw_scalars(const AdamWGroup& group, double lr,
                                                             double step, double lr_scale,
                                                             double clip_coef) {
  lr *= lr_scale;
  AdamWScalars scalars;
  scalars.grad_coef = static_cast<float>(group.maximize ? -clip_coef : clip_coef);
  scalars.decay = static_cast<float>(1.0 - lr * group.weight_decay);
  scalars.beta1 = static_cast<float>(group.beta1);
  scalars.one_minus_beta1 = static_cast<float>(1.0 - group.beta1);
  scalars.beta2 = static_cast<float>(group.beta2);
  scalars.one_minus_beta2 = static_cast<float>(1.0 - group.beta2);
  scalars.step_size = static_cast<float>(lr / -std::expm1(step * group.log_beta1));
  scalars.bias_correction2_sqrt =
      static_cast<float>(std::sqrt(-std::expm1(step * group.log_beta2)));
  scalars.eps = static_cast<float>(group.eps);
  return scalars;
}

// What adamw_element needs of its F, for one float.
GRADLOC_HOST_DEVICE static inline float square_root(float x) { return std::sqrt(x); }
// NaN in either operand stays NaN, as in torch.maximum.
GRADLOC_HOST_DEVICE static inline float maximum(float x, float y) {
  return x != x || x > y ? x : y;
}

// One AdamW update (Loshchilov & Hutter 2019, Algorithm 2; torch.optim.AdamW):
//   g ← coef·g;  p ← decay·p;  m ← β1·m + (1-β1)·g;  v ← β2·v + (1-β2)·g²
//   p ← p - step_size · m / (sqrt(v̂)/bias_correction2_sqrt + eps),  v̂ = max over steps with amsgrad
// m is interpolated from its nearer end, as torch.lerp does: from the other, bits of g would be
// lost. F is float, or a vector of floats with + - * / and the functions square_root and maximum.
template <bool kAmsgrad, class F>
GRADLOC_HOST_DEVICE inline void adamw_element(F& param, F grad, F& exp_avg, F& exp_avg_sq,
                                              F& max_exp_avg_sq, const AdamWScalars& s) {
  grad = grad * F(s.grad_coef);
  const F way = grad - exp_avg;
  exp_avg =
      s.one_minus_beta1 < 0.5f ? exp_avg + way * F(s.one_minus_beta1) : grad - way * F(s.beta1);
  exp_avg_sq = exp_avg_sq * F(s.beta2) + grad * grad * F(s.one_minus_beta2);
  F second = exp_avg_sq;
  if constexpr (kAmsgrad) {
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);
    second = max_exp_avg_sq;
  }
  const F denominator = square_root(second) / F(s.bias_correction2_sqrt) + F(s.eps);
  param = param * F(s.decay) - F(s.step_size) * (exp_avg / denominator);
}

}  // namespace gradloc
