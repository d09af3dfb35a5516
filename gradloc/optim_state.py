"""The state that LocalizedAdamW keeps for a parameter; keys are those of torch.optim.AdamW.

`exp_avg`, `exp_avg_sq` and with amsgrad `max_exp_avg_sq` have the parameter's shape, memory order
and sharding; `step` is a float32 scalar: on the CPU, as torch's default AdamW keeps it, or where
kernels count on the device, as its fused one does. Where the state of frozen layers goes is in
`optim_freeze.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradloc import sharding
from gradloc.reference import compute_dtype

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def moment_dtype(param: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a parameter's moments: what was asked for, else float32 or wider."""
    return state_dtype or compute_dtype(param.dtype)


def ensure_state(
    state: dict[str, Any],
    param: Tensor,
    dtype: torch.dtype,
    *,
    amsgrad: bool,
    step_device: torch.device,
) -> bool:
    """Make what is missing, zero; return whether the parameter had no state at all.

    Raises:
        ValueError: the state has only some of an AdamW state's entries.
    """
    fresh = not state
    check_whole(state, "state")
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=step_device)
    for key in MOMENTS if amsgrad else MOMENTS[:2]:
        if key not in state:
            state[key] = zeros_like(param, dtype)
    return fresh


def laid_out(state: dict[str, Any], key: str, param: Tensor, dtype: torch.dtype) -> Tensor:
    """This rank's part of the moment; first brought to the right dtype, device and memory order.

    Raises:
        ValueError: the moment has another shape or sharding than the parameter.
    """
    moment: Tensor = state[key]
    here, ours = sharding.local(moment), sharding.local(param)
    if moment.shape != param.shape or here.shape != ours.shape:
        raise ValueError(
            f"state {key!r} has shape={tuple(moment.shape)}, its parameter {tuple(param.shape)}"
            f"{_shards(here, ours, param)}: the state is that of another model, or the parameter "
            "was resized; load a fitting state, or clear optimizer.state[parameter] to start afresh"
        )
    if (here.dtype, here.device, here.stride()) != (dtype, ours.device, ours.stride()):
        moment = zeros_like(param, dtype)
        sharding.local(moment).copy_(here)
        state[key] = moment
    return sharding.local(moment)


def restore_moments(
    state: dict[str, Any], saved: dict[str, Any], param: Tensor, dtype: torch.dtype
) -> None:
    """Undo torch's cast of loaded moments to the parameter's dtype: as they were saved."""
    for key in MOMENTS:
        if key in saved and (state[key].dtype != dtype or saved[key].dtype != dtype):
            state[key] = saved[key].detach().to(param.device, dtype, copy=True)


def is_complete(state: dict[str, Any], *, amsgrad: bool) -> bool:
    """Whether all that a step needs is there."""
    return all(key in state for key in ("step", *(MOMENTS if amsgrad else MOMENTS[:2])))


def check_whole(state: dict[str, Any], what: str) -> None:
    """Check that a state is an AdamW state, or none; `max_exp_avg_sq` may come later.

    Raises:
        ValueError: some entries are there and others are not.
    """
    needed = ("step", *MOMENTS[:2])
    missing = [key for key in needed if key not in state]
    if missing and (len(missing) < len(needed) or "max_exp_avg_sq" in state):
        raise ValueError(
            f"{what} has {', '.join(map(repr, state))} and not {', '.join(map(repr, missing))}: it "
            "is no AdamW state (that of another optimizer?); clear it to start afresh"
        )


def check_saved(saved: dict[str, Any], param: Tensor, name: str) -> None:
    """Check that a state to be loaded is that of such a parameter.

    Raises:
        ValueError: entries are missing, a moment has another shape, or one of the two is sharded
            and the other whole.
    """
    if saved and "step" not in saved and "exp_avg" not in saved:
        raise ValueError(
            f"state_dict: the state of parameter {name} has {', '.join(map(repr, saved))}: it is "
            "that of another optimizer, not of AdamW"
        )
    check_whole(saved, f"state_dict: the state of parameter {name}")
    for key in MOMENTS:
        moment = saved.get(key, param)
        if moment.shape != param.shape:
            raise ValueError(
                f"state_dict: {key!r} of parameter {name} has shape={tuple(moment.shape)}, the "
                f"parameter {tuple(param.shape)}: the state is that of another model"
            )
        if sharding.is_sharded(moment) != sharding.is_sharded(param):
            raise ValueError(
                f"state_dict: {key!r} and parameter {name} are not sharded alike: load through "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, after "
                "gradloc.distributed.prepare_to_load"
            )


def mend_step(state: dict[str, Any], device: torch.device | None = None) -> Tensor:
    """Bring `step` to a float32 scalar, on a device if one is given: old torch kept numbers."""
    step = state["step"]
    step = step.detach() if isinstance(step, Tensor) else torch.tensor(float(step), device="cpu")
    if step.dtype != torch.float32 or step.dim() or step.device != (device or step.device):
        to_device = device is not None and device.type != "cpu"  # the other way has to wait
        step = step.reshape(()).to(device or step.device, torch.float32, non_blocking=to_device)
    state["step"] = step
    return step


def state_bytes(state: dict[str, Any]) -> int:
    """Bytes of the moments of one parameter, of this rank's part where they are sharded."""
    moments = (sharding.local(state[key]) for key in MOMENTS if key in state)
    return sum(t.numel() * t.element_size() for t in moments)


def zeros_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """A moment of zeros, laid out and sharded as the parameter is."""
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def _shards(here: Tensor, ours: Tensor, param: Tensor) -> str:
    if not sharding.is_sharded(param):
        return ""
    return f" (on this rank {tuple(here.shape)} and {tuple(ours.shape)})"
