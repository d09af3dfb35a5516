"""Fused backward: each parameter is updated, and its gradient freed, as backward produces it.

Never more than one gradient is held then (LOMO, Lv et al. 2023, does so with SGD). What needs all
gradients at once (clipping, skipping a step) or a sum over several backward passes (accumulation,
DDP's averaging after the hooks) cannot work and is refused. The update itself is the optimizer's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradloc import sharding
from gradloc.optim_work import Part

_HOOKS = "_post_accumulate_grad_hooks"


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
        # Weak, as are the hooks: an optimizer that is deleted must not go on training the model.
        self._update = weakref.WeakMethod(update)
        self._handles: dict[Tensor, Any] = {}
        self._done: set[Tensor] = set()
        self._sums: dict[tuple[Any, torch.device], tuple[Part, Tensor]] = {}
        self._layers: set[int] = set()

    @property
    def in_step(self) -> bool:
        """Whether gradients have come since the last step ended."""
        return bool(self._done)

    def watch(self, params: Iterable[Tensor]) -> None:
        """Put hooks on the parameters that require gradients and have none of ours.

        A parameter has one such hook: that of an earlier optimizer is taken off.
        """
        for param in params:
            if param.requires_grad and param not in self._handles:
                for hook in list((getattr(param, _HOOKS, None) or {}).values()):
                    if isinstance(hook, _Hook):
                        hook.leave(param)
                register: Any = param.register_post_accumulate_grad_hook  # torch has no types
                self._handles[param] = register(_Hook(self))

    def release(self, param: Tensor) -> None:
        """Update a parameter and free its gradient.

        Raises:
            RuntimeError: a second gradient before the step ended, or one that other ranks have yet
                to be averaged with. The gradient is freed, the parameter as it was.
        """
        update = self._update()
        if param.grad is None or update is None:
            return
        try:
            self._check(param)
            with torch.no_grad():
                updated = update(param)
        finally:
            param.grad = None
        self._done.add(param)
        if updated is not None:
            part, norm_sq, layer = updated
            key = (part.reduction, norm_sq.device)
            before = self._sums.get(key)
            self._sums[key] = part, norm_sq if before is None else before[1] + norm_sq
            self._layers.add(layer)

    def _check(self, param: Tensor) -> None:
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

    def leave(self, param: Tensor) -> None:
        """Take the hook off one parameter."""
        self._handles.pop(param).remove()

    def remove(self) -> None:
        """Take the hooks off."""
        for param in list(self._handles):
            self.leave(param)


class _Hook:
    """What a parameter calls; it knows the optimizer's part only as long as that lives."""

    def __init__(self, release: GradientRelease) -> None:
        self._release = weakref.ref(release)

    def __call__(self, param: Tensor) -> None:
        release = self._release()
        if release is not None:
            release.release(param)

    def leave(self, param: Tensor) -> None:
        release = self._release()
        if release is not None:
            release.leave(param)


def _several_ranks() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
