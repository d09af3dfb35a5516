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

from gradloc.ops_cuda import Decision
from gradloc.optim_work import Part
from gradloc.reference import clip_coefficient


@dataclass(frozen=True)
class Rule:
    """What a step asks before it happens.

    Attributes:
        max_norm: clip to this total norm; None: don't.
        skip_nonfinite: whether an infinite or NaN norm skips the step.
        found_inf: GradScaler's flag, or None.
        grad_scale: GradScaler's scale, or None.
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
        found_inf, grad_scale = self._here(rule.found_inf), self._here(rule.grad_scale)
        if rule.needs_norms and len(parts) == 1 and parts[0][0].reduction is None:
            ((part, grads),) = parts
            decision = Decision(
                self.values, rule.max_norm, rule.skip_nonfinite, found_inf, grad_scale
            )
            return [part.work.norm_sq(grads, scales, decision)]
        norm_sqs = []
        if rule.needs_norms:
            norm_sqs = [part.reduced(part.work.norm_sq(grads, scales)) for part, grads in parts]
        self._decide(norm_sqs, rule, found_inf, grad_scale)
        return norm_sqs

    def _decide(
        self,
        norm_sqs: list[Tensor],
        rule: Rule,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        """What the kernel decides for a single part, for several in torch operations."""
        one = torch.ones((), dtype=torch.float64, device=self.values.device)
        coef = one if grad_scale is None else one / grad_scale
        skip = torch.zeros_like(one, dtype=torch.bool)
        if found_inf is not None:
            skip = skip | (found_inf != 0)
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

    def _here(self, tensor: Tensor | None) -> Tensor | None:
        """GradScaler's tensors, as kernels read them."""
        if tensor is None:
            return None
        device = self.values.device
        return tensor.detach().reshape(()).to(device, torch.float32, non_blocking=True)
