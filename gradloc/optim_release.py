"""Fused backward: each parameter is updated, and its gradient freed, as backward produces it.

Never more than one gradient is held then (LOMO, Lv et al. 2023, does so with SGD). What needs all
gradients at once (clipping, skipping a step) or a sum over several backward passes (accumulation,
DDP's averaging after the hooks) cannot work and is refused. The update itself is the optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradloc import sharding
from gradloc.optim_work import Part


def check_release(max_grad_norm: float | None, on_nonfinite: str) -> None:
    """Check that the options do not need all gradients at once.

    Raises:
        ValueError: they do.
    """
    if max_grad_norm is not None:
        raise ValueError(
            f"release_gradients=True with max_grad_norm={max_grad_norm}: the norm over all layers "
            "is known only when the first ones are updated already; drop one of the two"
        )
    if on_nonfinite != "ignore":
        raise ValueError(
            f"release_gradients=True with on_nonfinite={on_nonfinite!r}: when a bad gradient "
            "shows, other layers are updated already; use 'ignore'"
        )


class GradientRelease:
    """Hooks on the parameters that update each one when its gradient is there, then free that.

    Args:
        update: updates a parameter whose `grad` is complete; returns the part that it is in, its
            sum of squares by layer and its layer, or None if the plan freezes it.
    """

    def __init__(self, update: Callable[[Tensor], tuple[Part, Tensor, int] | None]) -> None:
        self._update = update
        self._handles: dict[Tensor, Any] = {}
        self._done: set[Tensor] = set()
        self._sums: dict[tuple[Any, torch.device], tuple[Part, Tensor]] = {}
        self._layers: set[int] = set()

    def watch(self, params: Iterable[Tensor]) -> None:
        """Put hooks on the parameters that require gradients and have none of ours."""
        for param in params:
            if param.requires_grad and param not in self._handles:
                register: Any = param.register_post_accumulate_grad_hook  # torch has no types
                self._handles[param] = register(self.release)

    def release(self, param: Tensor) -> None:
        """Update a parameter and free its gradient.

        Raises:
            RuntimeError: a second gradient before the step ended, or one that other ranks have yet
                to be averaged with.
        """
        if param.grad is None:
            return  # another hook has taken it
        if param in self._done:
            raise RuntimeError(
                f"release_gradients=True: a second gradient of a parameter (shape "
                f"{tuple(param.shape)}) arrived before optimizer.step(), after the first was "
                "applied. Call step() after every backward(); gradient accumulation needs "
                "release_gradients=False"
            )
        if not sharding.is_sharded(param) and _several_ranks():
            raise RuntimeError(
                "release_gradients=True with torch.distributed: the gradients of plain parameters "
                "(DDP) are averaged only after they were applied. Use FSDP2 (fully_shard), or "
                "release_gradients=False"
            )
        with torch.no_grad():
            updated = self._update(param)
        param.grad = None
        self._done.add(param)
        if updated is not None:
            part, norm_sq, layer = updated
            key = (part.reduction, norm_sq.device)
            before = self._sums.get(key)
            self._sums[key] = part, norm_sq if before is None else before[1] + norm_sq
            self._layers.add(layer)

    def finish_step(self) -> tuple[list[Tensor], set[int]]:
        """End the step: gradients may come again.

        Returns:
            Sums of squares by layer over all ranks, to be added, and the layers that had gradients.
        """
        found = [part.reduced(norm_sq) for part, norm_sq in self._sums.values()], self._layers
        self._done.clear()
        self._sums.clear()
        self._layers = set()
        return found

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()


def _several_ranks() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
