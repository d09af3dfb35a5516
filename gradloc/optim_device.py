"""Decisions of a step that stay on the device: clip coefficient, skipped steps, GradScaler's flags.

The host never waits for them: kernels write and read a *control*, three float32 on the device (the
coefficient of the gradients, 1 if the step is skipped, and how many were). The same decisions on
the host are in `optim_step.py`, for parameters that plain torch or the processor updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradloc import sharding
from gradloc.ops_cuda import Decision, refuse_capture
from gradloc.optim_work import Part
from gradloc.reference import clip_coefficient


@dataclass(frozen=True)
class Rule:
    """What a step asks before it happens.

    Attributes:
        max_norm: clip to this total norm; None: don't.
        skip_nonfinite: whether an infinite or NaN norm skips the step.
        found_inf: GradScaler's flag, or None; float32 [1] on the device of the control.
        grad_scale: GradScaler's scale, or None; likewise.
    """

    max_norm: float | None
    skip_nonfinite: bool
    found_inf: Tensor | None
    grad_scale: Tensor | None

    @property
    def needs_norms(self) -> bool:
        """Whether norms have to be known before the update."""
        return self.max_norm is not None or self.skip_nonfinite

    @property
    def decides(self) -> bool:
        """Whether there is anything to decide."""
        return self.needs_norms or self.found_inf is not None or self.grad_scale is not None


class DeviceControl:
    """The control of an optimizer's steps, on the device of its first part."""

    def __init__(self, device: torch.device) -> None:
        refuse_capture(device)
        self.values = torch.zeros(3, dtype=torch.float32, device=device)

    def num_skipped(self) -> int:
        """Steps that were skipped; waits for the device."""
        return int(self.values[2])

    def decide(
        self, parts: Sequence[tuple[Part, Any]], scales: Sequence[float], rule: Rule
    ) -> list[Tensor]:
        """Decide on a step, and return the sums of squares by layer of the parts, if any are taken.

        Args:
            parts: the parts of the step, each with its gradients.
            scales: by layer.
            rule: what is asked.
        """
        if rule.needs_norms and len(parts) == 1 and parts[0][0].reduction is None:
            ((part, grads),) = parts
            decision = Decision(
                self.values, rule.max_norm, rule.skip_nonfinite, rule.found_inf, rule.grad_scale
            )
            return [part.work.norm_sq(grads, scales, decision)]
        norm_sqs = []
        if rule.needs_norms:
            norm_sqs = [part.reduced(part.work.norm_sq(grads, scales)) for part, grads in parts]
        self._decide(norm_sqs, rule)
        return norm_sqs

    def _decide(self, norm_sqs: list[Tensor], rule: Rule) -> None:
        """What the kernel decides for a single part, for several in torch operations."""
        one = torch.ones((), dtype=torch.float64, device=self.values.device)
        coef = one if rule.grad_scale is None else one / rule.grad_scale
        skip = torch.zeros_like(one, dtype=torch.bool)
        if rule.found_inf is not None:
            skip = skip | (rule.found_inf != 0)
        if norm_sqs:
            sums = [n.sum().to(self.values.device, non_blocking=True) for n in norm_sqs]
            norm = torch.stack(sums).sum().sqrt() * coef
            if rule.skip_nonfinite:
                skip = skip | ~norm.isfinite()
            if rule.max_norm is not None:
                coef = coef * clip_coefficient(norm, rule.max_norm)
        flag = skip.to(torch.float32)
        decided = torch.stack([coef.to(torch.float32), flag, self.values[2] + flag])
        self.values.copy_(decided)

    def on(self, device: torch.device) -> Tensor:
        """The control for a part on this device."""
        if device == self.values.device:
            return self.values
        return self.values.to(device, non_blocking=True)


def scaler_value(value: Any, device: torch.device) -> Tensor | None:
    """What GradScaler left on an optimizer, as kernels on this device read it; None stays None."""
    if value is None:
        return None
    tensor = torch.as_tensor(value, dtype=torch.float32)
    if sharding.is_sharded(tensor):
        tensor = tensor.full_tensor()
    return tensor.detach().reshape(()).to(device, torch.float32, non_blocking=True)
