"""Where the optimizer state of a frozen layer goes: it stays, moves off the device, or is dropped.

Moves whole moments and anchors, bit for bit, and computes nothing. Anchors are never dropped: a
layer that has trained is no longer what it was, and nothing else knows that. Which layers are
frozen is the plan's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from gradloc import sharding
from gradloc.optim_anchor import ANCHOR
from gradloc.optim_state import LIKE_PARAMETER, zeros_like

ON_FREEZE = ("keep", "offload", "drop")


def check_offload(param: Tensor, name: str) -> None:
    """Check that moments of a parameter can be offloaded.

    Raises:
        ValueError: they are sharded.
    """
    if sharding.is_sharded(param):
        raise ValueError(
            f"on_freeze='offload', but parameter {name} is a DTensor (FSDP2), whose moments cannot "
            "leave the mesh's device: use on_freeze='drop', which frees them, or 'keep'"
        )


def put_away(
    mode: str,
    frozen: Iterable[tuple[Tensor, str]],
    states: MutableMapping[Tensor, dict[str, Any]],
    away: set[Tensor],
) -> None:
    """Treat the state of frozen parameters as `mode` says.

    Args:
        mode: one of ON_FREEZE.
        frozen: parameters that the plan freezes, with their names.
        states: the optimizer's state.
        away: the parameters whose moments are offloaded; kept up to date.

    Raises:
        ValueError: moments that cannot be offloaded.
        OSError: no room to offload to. The parameters done so far are in `away`, the rest are as
            they were.
    """
    for param, name in frozen if mode != "keep" else ():
        if mode == "drop":
            anchor = states.pop(param, {}).get(ANCHOR)
            if anchor is not None:
                states[param] = {ANCHOR: anchor}
        elif states.get(param) and param not in away:
            check_offload(param, name)
            _offload(states[param])
            away.add(param)


def bring_back(
    params: Iterable[Tensor], states: MutableMapping[Tensor, dict[str, Any]], away: set[Tensor]
) -> None:
    """Bring offloaded moments of these parameters back to their devices."""
    for param in params:
        if param in away:
            state = states[param]
            for key in LIKE_PARAMETER:
                if key in state:
                    moment = zeros_like(param, state[key].dtype)
                    state[key] = moment.copy_(state[key], non_blocking=True)
            away.remove(param)


def _offload(state: dict[str, Any]) -> None:
    """Move the moments of one parameter, and its anchor, off their device.

    From an accelerator to host memory (pinned), from host memory to a temporary file that is mapped
    and has no name, so that nothing is left behind when the process ends.
    """
    moved = {key: _moved(state[key]) for key in LIKE_PARAMETER if key in state}
    state.update(moved)


def _moved(moment: Tensor) -> Tensor:
    if not moment.numel():
        return moment
    # As the moment, without its gaps if it has any.
    strides = torch.empty_like(moment, device="meta").stride()
    if moment.device.type != "cpu":
        pinned = moment.device.type == "cuda"
        away = torch.empty_strided(
            moment.shape, strides, dtype=moment.dtype, device="cpu", pin_memory=pinned
        )
        return away.copy_(moment)
    handle, path = tempfile.mkstemp(prefix="gradloc-moments-")
    try:
        if hasattr(os, "posix_fallocate"):
            # A full disk is an error here; written to through the map, it would be a SIGBUS.
            os.posix_fallocate(handle, 0, moment.numel() * moment.element_size())
        flat = torch.from_file(
            path, shared=True, size=moment.numel(), dtype=moment.dtype, device="cpu"
        )
    finally:
        os.close(handle)
        os.unlink(path)
    return flat.as_strided(moment.shape, strides).copy_(moment)
