"""RecAdam in the optimizer: the anchors that parameters are pulled to, and the bound of a pull.

An anchor is a parameter's value when it first trains, kept as `state[parameter]["anchor"]`, so that
it is saved and loaded with the rest. The settings are in `recadam.py`; the update is the backends'.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradloc.recadam import RecAdam

ANCHOR = "anchor"


def in_effect(recadam: RecAdam | None) -> RecAdam | None:
    """The settings if they pull at all: with gamma = 0 steps are AdamW's and need no anchors."""
    return recadam if recadam is not None and recadam.gamma > 0 else None


def anchor_dtype(param: Tensor, recadam: RecAdam | None) -> torch.dtype | None:
    """The dtype of a parameter's anchor; None where there is to be none."""
    if in_effect(recadam) is None:
        return None
    assert recadam is not None
    if recadam.anchor_dtype is not None:
        named: torch.dtype = getattr(torch, recadam.anchor_dtype)
        return named
    return exact_dtype(param)


def exact_dtype(param: Tensor) -> torch.dtype:
    """A dtype of anchors, which are never float16, that holds every value of a parameter."""
    return torch.float32 if param.dtype == torch.float16 else param.dtype


def anchor_of(param: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the parameter's values, laid out and sharded as it is."""
    return param.detach().to(dtype, copy=True, memory_format=torch.preserve_format)


def check_pull(
    recadam: RecAdam | None, groups: Sequence[dict[str, Any]], scales: Sequence[float]
) -> None:
    """Check that no pull overshoots so far that weights fly away from their anchors.

    A learning rate that is a tensor on an accelerator is not looked at: that would wait for it.

    Args:
        recadam: the settings, or None.
        groups: param groups with their learning rates.
        scales: the largest scale of a layer in each of them.

    Raises:
        ValueError: lr·scale·gamma is above 2 in a group.
    """
    if recadam is None:
        return
    for group, scale in zip(groups, scales, strict=False):  # the number of groups torch checks
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            continue
        strength = float(lr) * scale
        if strength * recadam.gamma > 2:
            raise ValueError(
                f"gamma={recadam.gamma:g} with lr={float(lr):g} and a layer scale of {scale:g}: "
                f"lr·scale·gamma={strength * recadam.gamma:g} is above 2, so that the pull could "
                "carry a weight past its anchor to farther away than it was, and diverge. Use "
                f"gamma <= {2 / strength:.4g}, or lr <= {2 / (scale * recadam.gamma):.4g}"
            )


def warn_unanchored(states: Iterable[dict[str, Any]], recadam: RecAdam | None) -> None:
    """Warn of loaded states that have moments and no anchor.

    Warns:
        RuntimeWarning: there are some; what they will be pulled to are the present weights.
    """
    if in_effect(recadam) is None:
        return
    count = sum("step" in state and ANCHOR not in state for state in states)
    if count:
        warnings.warn(
            f"state_dict: {count} parameters have moments and no anchor, as the state was saved "
            "without recadam: they will be pulled to the weights that they have when they next "
            "train, which are not the pretrained ones if they were trained before. To pull to "
            "others, put those in optimizer.state[parameter]['anchor']",
            RuntimeWarning,
            stacklevel=3,
        )
