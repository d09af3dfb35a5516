"""The state that LocalizedAdamW keeps for a parameter; keys are those of torch.optim.AdamW.

`exp_avg`, `exp_avg_sq` and with amsgrad `max_exp_avg_sq` have the parameter's shape and memory
order, in float32 or wider; `step` is a float32 scalar on the CPU, as torch's default AdamW keeps
it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradloc.reference import compute_dtype

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def ensure_state(state: dict[str, Any], param: Tensor, *, amsgrad: bool) -> bool:
    """Make what is missing, zero; return whether the parameter had no state at all."""
    fresh = not state
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
    for key in MOMENTS if amsgrad else MOMENTS[:2]:
        if key not in state:
            state[key] = _zeros_like(param)
    return fresh


def laid_out(state: dict[str, Any], key: str, param: Tensor) -> Tensor:
    """The moment; first brought to the right dtype, device and memory order if need be.

    Raises:
        ValueError: the moment has another shape than the parameter.
    """
    moment: Tensor = state[key]
    if moment.shape != param.shape:
        raise ValueError(
            f"state {key!r} has shape={tuple(moment.shape)}, its parameter {tuple(param.shape)}: "
            "the state is that of another model, or the parameter was resized; load a fitting "
            "state, or clear optimizer.state[parameter] to start afresh"
        )
    if (
        moment.dtype != compute_dtype(param.dtype)
        or moment.device != param.device
        or moment.stride() != param.stride()
    ):
        state[key] = moment = _zeros_like(param).copy_(moment)
    return moment


def restore_moments(state: dict[str, Any], saved: dict[str, Any], param: Tensor) -> None:
    """Undo torch's cast of loaded moments to the parameter's dtype: as they were saved."""
    wide = compute_dtype(param.dtype)
    for key in MOMENTS:
        if key in saved and state[key].dtype != wide:
            state[key] = saved[key].detach().to(param.device, wide, copy=True)


def check_saved(saved: dict[str, Any], param: Tensor, name: str) -> None:
    """Check that a state to be loaded is that of such a parameter.

    Raises:
        ValueError: a moment has another shape.
    """
    for key in MOMENTS:
        shape = saved[key].shape if key in saved else param.shape
        if shape != param.shape:
            raise ValueError(
                f"state_dict: {key!r} of parameter {name} has shape={tuple(shape)}, the parameter "
                f"{tuple(param.shape)}: the state is that of another model"
            )


def mend_step(state: dict[str, Any]) -> Tensor:
    """Bring `step` to float32 on the CPU: old torch kept numbers, fused AdamW a device tensor."""
    step = torch.as_tensor(state["step"]).detach()
    if step.dtype != torch.float32 or step.device.type != "cpu" or step.dim():
        step = step.reshape(()).to("cpu", torch.float32)
    state["step"] = step
    return step


def state_bytes(state: dict[str, Any]) -> int:
    """Bytes of the moments of one parameter."""
    moments = (state.get(key) for key in MOMENTS)
    return sum(t.numel() * t.element_size() for t in moments if t is not None)


def _zeros_like(param: Tensor) -> Tensor:
    wide = compute_dtype(param.dtype)
    return torch.zeros_like(param, dtype=wide, memory_format=torch.preserve_format)
