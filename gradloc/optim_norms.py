"""The layers' gradient norms in the last step, as the optimizer measured them on its way."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set

import torch
from torch import Tensor


class StepNorms:
    """Sums of squares by layer, kept on the device until somebody asks.

    Args:
        num_layers: number of layers.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._norm_sq: Tensor | None = None
        self._measured: Set[int] = frozenset()

    def record(
        self, norm_sqs: Sequence[Tensor], measured: Set[int], unscale: float | Tensor
    ) -> Tensor:
        """Take the sums of a step.

        Args:
            norm_sqs: [num_layers] each, to be added; of gradients that are still to be multiplied
                by `unscale`.
            measured: layers that had a gradient.
            unscale: what undoes a GradScaler's scale; a tensor where it is not to be waited for.

        Returns:
            The sums of squares by layer, float64 [num_layers].
        """
        if len(norm_sqs) == 1:
            total = norm_sqs[0]
        elif norm_sqs:
            total = torch.stack(
                [n.to(norm_sqs[0].device, non_blocking=True) for n in norm_sqs]
            ).sum(dim=0)
        else:
            total = torch.zeros(self._num_layers, dtype=torch.float64, device="cpu")
        known_one = not isinstance(unscale, Tensor) and unscale == 1.0
        self._norm_sq = total if known_one else total * unscale**2
        self._measured = measured
        return self._norm_sq

    @property
    def known(self) -> bool:
        """Whether there has been a step."""
        return self._norm_sq is not None

    def norms(self) -> Tensor:
        """float32 [num_layers]; NaN where nothing was measured.

        Raises:
            ValueError: there has been no step yet.
        """
        if self._norm_sq is None:
            raise ValueError("no norms yet: call grad_norms() after a step")
        norms = self._norm_sq.sqrt().float()
        # Made here and sent off: an index would be copied to the device and waited for.
        unmeasured = torch.ones(norms.shape, dtype=torch.bool, device="cpu")
        unmeasured[sorted(self._measured)] = False
        if norms.is_cuda:
            unmeasured = unmeasured.pin_memory()
        return norms.masked_fill_(unmeasured.to(norms.device, non_blocking=True), math.nan)
