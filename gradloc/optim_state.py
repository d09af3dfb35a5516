"""The state that LocalizedAdamW keeps for a parameter; keys are those of torch.optim.AdamW.

`exp_avg`, `exp_avg_sq` and with amsgrad `max_exp_avg_sq` have the parameter's shape, memory order
and sharding; `step` is a float32 scalar: on the CPU, as torch's default AdamW keeps it, or where
kernels count on the device, as its fused one does. `anchor` is there with RecAdam. Where the state
of frozen layers goes is in `optim_freeze.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradloc import sharding
from gradloc.optim_anchor import ANCHOR, anchor_dtype, anchor_of
from gradloc.recadam import RecAdam
from gradloc.reference import compute_dtype

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
LIKE_PARAMETER = (*MOMENTS, ANCHOR)  # what has the parameter's shape


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
    recadam: RecAdam | None = None,
) -> bool:
    """Make what is missing, zero and the anchor; return whether the parameter had no moments.

    Raises:
        ValueError: the state has only some of an AdamW state's entries.
    """
    check_whole(state, "state")
    fresh = "step" not in state
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=step_device)
    for key in MOMENTS if amsgrad else MOMENTS[:2]:
        if key not in state:
            state[key] = zeros_like(param, dtype)
    of_anchor = anchor_dtype(param, recadam)
    if of_anchor is not None and ANCHOR not in state:
        state[ANCHOR] = anchor_of(param, of_anchor)
    return fresh


def laid_out(state: dict[str, Any], key: str, param: Tensor, dtype: torch.dtype) -> Tensor:
    """This rank's part of a moment or anchor, brought to the right dtype, device and memory order.

    Raises:
        ValueError: it has another shape or sharding than the parameter.
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


def restore(
    state: dict[str, Any],
    saved: dict[str, Any],
    param: Tensor,
    state_dtype: torch.dtype | None,
    recadam: RecAdam | None,
) -> None:
    """Undo torch's cast of what was loaded to the parameter's dtype: as it was saved.

    An anchor is taken out where there is to be none.
    """
    of_moments, of_anchor = moment_dtype(param, state_dtype), anchor_dtype(param, recadam)
    if of_anchor is None:
        state.pop(ANCHOR, None)
    for key in LIKE_PARAMETER:
        wanted = of_anchor if key == ANCHOR else of_moments
        if key in state and (state[key].dtype != wanted or saved[key].dtype != wanted):
            state[key] = saved[key].detach().to(param.device, wanted, copy=True)


def is_complete(state: dict[str, Any], *, amsgrad: bool, anchored: bool) -> bool:
    """Whether all that a step needs is there."""
    needed = ("step", *(MOMENTS if amsgrad else MOMENTS[:2]), *((ANCHOR,) if anchored else ()))
    return all(key in state for key in needed)


def check_whole(state: dict[str, Any], what: str) -> None:
    """Check that a state is an AdamW state, or none; `max_exp_avg_sq` and an anchor may differ.

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
    if set(saved) - {ANCHOR} and "step" not in saved and "exp_avg" not in saved:
        raise ValueError(
            f"state_dict: the state of parameter {name} has {', '.join(map(repr, saved))}: it is "
            "that of another optimizer, not of AdamW"
        )
    check_whole(saved, f"state_dict: the state of parameter {name}")
    for key in LIKE_PARAMETER:
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


def state_bytes(state: dict[str, Any], keys: Sequence[str] = LIKE_PARAMETER) -> int:
    """Bytes of one parameter's moments and anchor, of this rank's part where they are sharded."""
    found = (sharding.local(state[key]) for key in keys if key in state)
    return sum(t.numel() * t.element_size() for t in found)


def zeros_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """A moment of zeros, laid out and sharded as the parameter is."""
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def _shards(here: Tensor, ours: Tensor, param: Tensor) -> str:
    if not sharding.is_sharded(param):
        return ""
    return f" (on this rank {tuple(here.shape)} and {tuple(ours.shape)})"
