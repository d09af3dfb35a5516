"""Which backend updates which parameter: the compiled core where it can, else plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from gradloc import ops, reference
from gradloc.ops_cuda import Decision
from gradloc.recadam import RecAdam
from gradloc.reference import AdamWGroup, Rounding


class AdamWWork(Protocol):
    """What a backend gives the optimizer for a fixed list of parameters."""

    slots: tuple[ops.AdamWSlot, ...]
    on_device: bool  # whether kernels can read the decisions of a step on the device

    def gather(self, grads: Sequence[Tensor | None]) -> Any:
        """Bring the gradients of `slots` into the form that the other two take."""

    def prepare(self, grads: Any, scales: Sequence[float]) -> None:
        """Have all ready that the next two need beside the gradients."""

    def norm_sq(
        self, grads: Any, scales: Sequence[float], decision: Decision | None = None
    ) -> Tensor:
        """Sums of squares by layer, float64 [num_layers]; `decision` where `on_device`."""

    def step(
        self,
        grads: Any,
        groups: Sequence[AdamWGroup],
        scales: Sequence[float],
        coef: float | Tensor,
        *,
        with_norms: bool,
        rounding_seed: int | None,
        recadam: RecAdam | None = None,
    ) -> Tensor | None:
        """Update what has a gradient; return the sums of squares by layer if asked.

        Gradients are multiplied by `coef`, or by what a control says (a tensor, where `on_device`).
        With a seed, what is stored in bfloat16 is rounded stochastically, else to nearest.
        `recadam` goes with slots that have anchors.
        """


class ReferenceAdamW:
    """The same work in plain torch, tensor by tensor: any device, float64, strided views."""

    on_device = False

    def __init__(self, slots: Sequence[ops.AdamWSlot], num_layers: int) -> None:
        self.slots = tuple(slots)
        self._num_layers = num_layers

    def gather(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients as they are."""
        return list(grads)

    def prepare(self, grads: list[Tensor | None], scales: Sequence[float]) -> None:
        """Nothing is needed."""

    def norm_sq(
        self,
        grads: list[Tensor | None],
        scales: Sequence[float] = (),
        decision: Decision | None = None,
    ) -> Tensor:
        """Sums of squares by layer, float64 [num_layers] on the gradients' device."""
        assert decision is None
        return reference.layer_norm_sq(grads, [slot.layer for slot in self.slots], self._num_layers)

    def step(
        self,
        grads: list[Tensor | None],
        groups: Sequence[AdamWGroup],
        scales: Sequence[float],
        coef: float | Tensor,
        *,
        with_norms: bool,
        rounding_seed: int | None,
        recadam: RecAdam | None = None,
    ) -> Tensor | None:
        """Update what has a gradient; return the sums of squares by layer if asked."""
        norm_sq = self.norm_sq(grads) if with_norms else None
        for slot, grad in zip(self.slots, grads, strict=True):
            if grad is not None:
                rounding = None
                if rounding_seed is not None:
                    rounding = Rounding(rounding_seed, slot.tensor, slot.first_element)
                reference.adamw_step(
                    slot.param,
                    grad,
                    slot.exp_avg,
                    slot.exp_avg_sq,
                    slot.max_exp_avg_sq,
                    slot.step,
                    group=groups[slot.group],
                    lr_scale=scales[slot.layer],
                    clip_coef=coef,
                    rounding=rounding,
                    anchor=slot.anchor,
                    recadam=recadam,
                )
        return norm_sq


def choose(
    param: Tensor, fused: bool | None, name: str
) -> type[ops.NativeAdamW] | type[ReferenceAdamW]:
    """The backend for a parameter: None is automatic, True is the core, False plain torch.

    Raises:
        ValueError: fused=True for a parameter that the core cannot take.
    """
    if fused is False:
        return ReferenceAdamW
    if ops.runs_natively(param):
        return ops.NativeAdamW
    if fused:
        problem = "" if param.device.type == "cpu" else ops.kernel_problem(param.device)
        raise ValueError(
            f"fused=True, but parameter {name} (device={param.device}, dtype={param.dtype}, "
            f"strides={param.stride()}) is not a dense float32, bfloat16 or float16 tensor on "
            f"{' or '.join(ops.native_devices())}{problem and f', or {problem}'}: leave fused=None "
            "to update it with plain torch"
        )
    return ReferenceAdamW


def runs_on_device(param: Tensor, fused: bool | None, name: str) -> bool:
    """Whether a kernel on the parameter's device will update it, and count its steps there.

    Raises:
        ValueError: as for `choose`.
    """
    return choose(param, fused, name) is ops.NativeAdamW and ops.counts_on_device(param)
