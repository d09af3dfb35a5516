"""RunWatch: what a cell sees of its training: steps, their time, losses, bytes of gradients.

Changes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class RunWatch(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Watches a Trainer's run.

    Args:
        on_step: called with (steps done, steps in all).
        num_steps: steps in all.
    """

    def __init__(self, on_step: Callable[[int, int], None], num_steps: int) -> None:
        self._on_step = on_step
        self._num_steps = num_steps
        self._began = 0.0
        self.step_seconds: list[float] = []
        """Of each step, without loading and scoring."""
        self.losses: list[tuple[int, float | None]] = []
        """(step, mean training loss since the line before, in nats a token; None: not finite)."""
        self.num_trained = 0
        """Elements of the parameters that have gradients."""
        self.gradient_bytes = 0
        """Of these gradients."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.step_seconds.append(time.perf_counter() - self._began)
        trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
        self.num_trained = sum(p.numel() for p in trained)
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in trained)
        self._on_step(state.global_step, self._num_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss."""
        if logs is not None and "loss" in logs:
            loss = float(logs["loss"])
            self.losses.append((state.global_step, loss if math.isfinite(loss) else None))
