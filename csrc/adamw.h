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

// How RecAdam's λ goes from the pull to the task with a tensor's steps. gradloc/recadam.py has the
// same numbers.
enum class Anneal : int32_t { kSigmoid = 0, kLinear = 1, kConstant = 2 };

// RecAdam (Chen et al., EMNLP 2020): a step is shared between Adam, which gets λ of it, and a pull
// to anchors, the pretrained weights.
struct RecAdam {
  double gamma;  // strength of the pull
  double k, t0;  // how steep λ rises and when it is half way; with kConstant k is λ itself
  Anneal anneal;
};

// λ(t), in [0, 1]. step: t, counted from 1, of this tensor.
GRADLOC_HOST_DEVICE static inline double annealed(const RecAdam& recadam, double step) {
  if (recadam.anneal == Anneal::kConstant) return recadam.k;
  if (recadam.anneal == Anneal::kLinear) return step < recadam.t0 ? step / recadam.t0 : 1.0;
  return 1.0 / (1.0 + std::exp(-recadam.k * (step - recadam.t0)));
}

// The scalars of one tensor in one step, rounded to float32 once.
struct AdamWScalars {
  float grad_coef;              // clip coefficient, negative when maximizing
  float decay;                  // 1 - lr·s·weight_decay
  float beta1;                  //
  float one_minus_beta1;        // 1 - beta1
  float beta2;                  //
  float one_minus_beta2;        // 1 - beta2
  float step_size;              // λ·lr·s / (1 - beta1^t), λ = 1 without anchors
  float bias_correction2_sqrt;  // sqrt(1 - beta2^t)
  float eps;                    //
  float pull;                   // (1 - λ)·lr·s·γ, of anchors only
};

// lr: the group's. step: t, counted from 1, of this tensor. lr_scale: s, the layer's scale.
// clip_coef: what gradients are multiplied by. recadam: null without anchors. 1 - β^t is taken as
// -expm1(t·log β): an exponential costs a GPU far less than a power.
GRADLOC_HOST_DEVICE static inline AdamWScalars adamw_scalars(const AdamWGroup& group, double lr,
                                                             double step, double lr_scale,
                                                             double clip_coef,
                                                             const RecAdam* recadam) {
  lr *= lr_scale;
  const double share = recadam != nullptr ? annealed(*recadam, step) : 1.0;
  AdamWScalars scalars;
  scalars.grad_coef = static_cast<float>(group.maximize ? -clip_coef : clip_coef);
  scalars.decay = static_cast<float>(1.0 - lr * group.weight_decay);
  scalars.beta1 = static_cast<float>(group.beta1);
  scalars.one_minus_beta1 = static_cast<float>(1.0 - group.beta1);
  scalars.beta2 = static_cast<float>(group.beta2);
  scalars.one_minus_beta2 = static_cast<float>(1.0 - group.beta2);
  scalars.step_size = static_cast<float>(share * lr / -std::expm1(step * group.log_beta1));
  scalars.bias_correction2_sqrt =
      static_cast<float>(std::sqrt(-std::expm1(step * group.log_beta2)));
  scalars.eps = static_cast<float>(group.eps);
  scalars.pull =
      recadam != nullptr ? static_cast<float>((1.0 - share) * lr * recadam->gamma) : 0.0f;
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
// and with anchors, as in RecAdam's published code from where Adam's step has led:
//   p ← p - pull · (p - anchor)
// m is interpolated from its nearer end, as torch.lerp does: from the other, bits of g would be
// lost. F is float, or a vector of floats with + - * / and the functions square_root and maximum.
template <bool kAmsgrad, bool kAnchored, class F>
GRADLOC_HOST_DEVICE inline void adamw_element(F& param, F grad, F& exp_avg, F& exp_avg_sq,
                                              F& max_exp_avg_sq, [[maybe_unused]] F anchor,
                                              const AdamWScalars& s) {
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
  if constexpr (kAnchored) param = param - F(s.pull) * (param - anchor);
}

}  // namespace gradloc
