"""Every operation of the compiled core in plain torch: specification, fallback and judge in one.

Works on any device and any floating dtype. Float32, bfloat16 and float16 tensors are computed with
in float32, as the core does; float64 tensors in float64, which is what the tests compare both with.
Nothing here is fused or fast. The random bits of stochastic rounding are specified here too, in
integer arithmetic; csrc/random.h gives the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradloc.recadam import RecAdam


@dataclass(frozen=True)
class AdamWGroup:
    """Hyperparameters of a param group, with the meaning of `torch.optim.AdamW`."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    # The learning rate, float32 [1] on the device, where it is not to be waited for: `lr` is unset.
    lr_tensor: Tensor | None = None


@dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of one tensor's bfloat16 storage, and what its random bits depend on.

    The tensor's step count and the position of each element are the rest of the generator's key, so
    that a result depends neither on the backend nor on threads, shards or the order of tensors.
    """

    seed: int  # taken modulo 2^64
    tensor: int  # identity of the tensor, 0 or more
    first_element: int = 0  # position of the first element in the full tensor, when it is a shard


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


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, dimensions in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def element_positions(tensor: Tensor) -> Tensor:
    """Position of each element: in memory order where it is dense, else in logical order.

    Returns:
        int64 tensor of the tensor's shape, 0 to numel - 1.
    """
    positions = torch.arange(tensor.numel(), device=tensor.device)
    if is_dense(tensor):
        return positions.as_strided(tensor.shape, tensor.stride())
    return positions.view(tensor.shape)


_MASK_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_GOLDEN_32 = 0x9E3779B9  # 2^32 divided by the golden ratio
_GOLDEN_64 = 0x9E3779B97F4A7C15
# Which random word, and which shift in it, gives the 16 bits of a stored tensor.
RANDOM_STREAMS = {
    "param": (0, 0),
    "exp_avg": (0, 16),
    "exp_avg_sq": (1, 0),
    "max_exp_avg_sq": (1, 16),
}


def random_words(seed: int, step: int, tensor: int, elements: Tensor, *, word: int) -> Tensor:
    """Random 32-bit words of elements: the specification of the generator in csrc/random.h.

    A function of its arguments alone, with no state. The 64-bit key is mixed from seed, step and
    tensor with the finaliser of SplitMix64 (Steele, Lea & Flood 2014), the words with the 32-bit
    finaliser `lowbias32` (Wellons, "Prospecting for Hash Functions", 2018).

    Args:
        seed: taken modulo 2^64, as are the next two.
        step: step count of the tensor, after the step that rounds.
        tensor: identity of the tensor.
        elements: int64, positions in the full tensor.
        word: 0 or 1; an element has two words.

    Returns:
        int64 tensor of the shape of `elements`, values 0 to 2^32 - 1.
    """
    key = 0
    for part in (seed, step, tensor):
        key = _mix_64(((key ^ (part & _MASK_64)) + _GOLDEN_64) & _MASK_64)
    inner = _mix_32((elements & _MASK_32) ^ (key & _MASK_32))
    words = _mix_32((inner + _mix_32(((elements >> 32) & _MASK_32) ^ (key >> 32))) & _MASK_32)
    return words if word == 0 else _mix_32((words + _GOLDEN_32) & _MASK_32)


def _mix_64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def _mix_32(x: Tensor) -> Tensor:
    x = _times(x ^ (x >> 16), 0x7FEB352D)
    x = _times(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def _times(x: Tensor, factor: int) -> Tensor:
    """x·factor modulo 2^32, in two halves that int64 holds without overflow."""
    high = (x * (factor >> 16)) & 0xFFFF
    return ((high << 16) + x * (factor & 0xFFFF)) & _MASK_32


def round_to_bfloat16(values: Tensor, random_16: Tensor) -> Tensor:
    """Round stochastically: up in magnitude where the bits cut off plus random ones carry.

    A value between two bfloat16 neighbours becomes either, with probabilities that make the mean
    the value itself. What bfloat16 holds exactly stays; infinity stays, NaN is NaN. Above the
    largest bfloat16 the upper neighbour is infinity.

    Args:
        values: float32 (wider values are first rounded to float32).
        random_16: int64, same shape, uniform on 0 to 65,535.

    Returns:
        bfloat16 tensor of the same shape.
    """
    float_bits = values.to(torch.float32).contiguous().view(torch.int32).to(torch.int64) & _MASK_32
    upper = (float_bits + random_16) >> 16
    signed = torch.where(upper >= 0x8000, upper - 0x10000, upper)  # what int16 holds
    rounded = signed.to(torch.int16).view(torch.bfloat16)
    return rounded.masked_fill_(values.isnan(), float("nan"))


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
    rounding: Rounding | None = None,
    anchor: Tensor | None = None,
    recadam: RecAdam | None = None,
) -> None:
    """One AdamW step of one tensor, in place; the formula stands in csrc/adamw.h.

    Args:
        param: the parameter, any floating dtype and layout.
        grad: its gradient, same shape.
        exp_avg: first moment, same shape, any floating dtype; likewise the next two. What is
            narrower than `compute_dtype(param.dtype)` is computed with in that and rounded when
            stored.
        exp_avg_sq: second moment.
        max_exp_avg_sq: its running maximum for amsgrad, or None.
        step: steps taken so far, one element; incremented.
        group: hyperparameters.
        lr_scale: the layer's learning-rate scale s; the step is AdamW's with learning rate lr·s.
        clip_coef: what the gradient is multiplied by.
        rounding: round what is stored in bfloat16 stochastically; None rounds to nearest.
        anchor: what RecAdam pulls to, same shape, any floating dtype; or None.
        recadam: its settings, where there is an anchor.
    """
    assert (anchor is None) == (recadam is None)
    wide = torch.promote_types(compute_dtype(param.dtype), exp_avg.dtype)
    step.add_(1.0)
    t = float(step)
    lr = group.lr * lr_scale
    g = grad.to(wide) * clip_coef
    if group.maximize:
        g = -g
    # Stored in `wide` these are the tensors themselves, else copies that _store rounds back.
    first, second = exp_avg.to(wide), exp_avg_sq.to(wide)
    first.lerp_(g, 1.0 - group.beta1)
    second.mul_(group.beta2).add_(g * g * (1.0 - group.beta2))
    stored = {"exp_avg": (exp_avg, first), "exp_avg_sq": (exp_avg_sq, second)}
    if max_exp_avg_sq is not None:
        second = torch.maximum(max_exp_avg_sq.to(wide), second)
        stored["max_exp_avg_sq"] = (max_exp_avg_sq, second)
    denominator = second.sqrt() / (1.0 - group.beta2**t) ** 0.5 + group.eps
    decayed = param.to(wide) * (1.0 - lr * group.weight_decay)
    share = 1.0 if recadam is None else recadam.annealed(t)
    moved = decayed - (share * lr / (1.0 - group.beta1**t)) * (first / denominator)
    if anchor is not None and recadam is not None:
        moved = moved - ((1.0 - share) * lr * recadam.gamma) * (moved - anchor.to(wide))
    stored["param"] = (param, moved)
    _store(stored, rounding, int(t))


def _store(stored: dict[str, tuple[Tensor, Tensor]], rounding: Rounding | None, step: int) -> None:
    """Copy values (second) into tensors (first), rounded as their dtype and `rounding` say."""
    words: dict[int, Tensor] = {}
    for name, (target, values) in stored.items():
        if rounding is None or target.dtype != torch.bfloat16:
            if target is not values:
                target.copy_(values)
            continue
        word, shift = RANDOM_STREAMS[name]
        if word not in words:
            # The parameter's order for all: moments are kept in its memory order.
            elements = element_positions(stored["param"][0]) + rounding.first_element
            words[word] = random_words(rounding.seed, step, rounding.tensor, elements, word=word)
        target.copy_(round_to_bfloat16(values, (words[word] >> shift) & 0xFFFF))
