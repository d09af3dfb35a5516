"""Every operation of the compiled core in plain torch: specification, fallback and judge in one.

Works on any device and any floating dtype. Float32, bfloat16 and float16 tensors are computed with
in float32, as the core does; float64 tensors in float64, which is what the tests compare both with.
Nothing here is fused or fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamWGroup:
    """Hyperparameters of a param group, with the meaning of `torch.optim.AdamW`."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of `dtype` is updated and its moments kept: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def layer_norm_sq(grads: Sequence[Tensor | None], layers: Sequence[int], num_layers: int) -> Tensor:
    """Sum of squares of the gradients of each layer.

    Args:
        grads: gradients, all on one device; None counts as 0.
        layers: layer index of each gradient.
        num_layers: number of layers.

    Returns:
        float64 tensor [num_layers] on the gradients' device (float32 where the device has no
        float64).
    """
    present = [(grad, layer) for grad, layer in zip(grads, layers, strict=True) if grad is not None]
    if not present:
        return torch.zeros(num_layers, dtype=torch.float64)
    device = present[0][0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    norms = torch.stack([torch.linalg.vector_norm(grad, dtype=wide) for grad, _ in present])
    index = torch.tensor([layer for _, layer in present], device=device)
    return torch.zeros(num_layers, dtype=wide, device=device).index_add_(0, index, norms.square())


def clip_coefficient(total_norm: Tensor | float, max_norm: float) -> Tensor | float:
    """min(1, max_norm / (total_norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` multiplies by."""
    if isinstance(total_norm, Tensor):
        return (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    quotient = max_norm / (total_norm + 1e-6)
    return quotient if not quotient > 1.0 else 1.0  # NaN stays NaN


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: Tensor,
    *,
    group: AdamWGroup,
    lr_scale: float = 1.0,
    clip_coef: Tensor | float = 1.0,
) -> None:
    """One AdamW step of one tensor, in place; the formula stands in csrc/adamw.h.

    Args:
        param: the parameter, any floating dtype and layout.
        grad: its gradient, same shape.
        exp_avg: first moment, same shape, dtype `compute_dtype(param.dtype)`; likewise the next
            two.
        exp_avg_sq: second moment.
        max_exp_avg_sq: its running maximum for amsgrad, or None.
        step: steps taken so far, one element; incremented.
        group: hyperparameters.
        lr_scale: the layer's learning-rate scale s; the step is AdamW's with learning rate lr·s.
        clip_coef: what the gradient is multiplied by.
    """
    wide = exp_avg.dtype
    step.add_(1.0)
    t = float(step)
    lr = group.lr * lr_scale
    g = grad.to(wide) * clip_coef
    if group.maximize:
        g = -g
    exp_avg.lerp_(g, 1.0 - group.beta1)
    exp_avg_sq.mul_(group.beta2).add_(g * g * (1.0 - group.beta2))
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
        second = max_exp_avg_sq
    denominator = second.sqrt() / (1.0 - group.beta2**t) ** 0.5 + group.eps
    decayed = param.to(wide) * (1.0 - lr * group.weight_decay)
    param.copy_(decayed - (lr / (1.0 - group.beta1**t)) * (exp_avg / denominator))
