"""What the demo shows while it works: a line a stage, and a bar while something trains.

Only shows; knows nothing of worlds and methods.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class Stages:
    """Numbered lines, with the time since the start.

    Args:
        console: where to.
        total: how many stages there will be.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.number = 0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def begin(self, what: str) -> None:
        """Say that the next stage begins."""
        self.number += 1
        minutes, seconds = divmod(int(self.seconds), 60)
        self.console.print(
            f"[bold]\\[{self.number}/{self.total}][/bold] {what} "
            f"[dim]({minutes}:{seconds:02})[/dim]",
            highlight=False,
            soft_wrap=True,
        )

    def note(self, what: str) -> None:
        """Say what came of it."""
        self.console.print(f"      [dim]{what}[/dim]", highlight=False, soft_wrap=True)


class StepCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Times the steps of a Trainer run, reports each, and may end the run early.

    Args:
        advance: called after each step.
        check: called with (model, step) after every `check_every` steps; True ends the run.
        check_every: None: never.
    """

    def __init__(
        self,
        advance: Callable[[], None],
        check: Callable[[torch.nn.Module, int], bool] | None = None,
        check_every: int | None = None,
    ) -> None:
        self.advance = advance
        self.check = check
        self.check_every = check_every
        self.seconds = 0.0
        self.num_steps = 0
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it, and check."""
        self.seconds += time.perf_counter() - self._began
        self.num_steps = state.global_step
        self.advance()
        if self.check is None or self.check_every is None:
            return
        if state.global_step % self.check_every == 0:
            control.should_training_stop |= self.check(kwargs["model"], state.global_step)


@contextmanager
def step_bar(console: Console, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar over `total` steps that goes away when done; gives the function that advances it."""
    columns = (
        TextColumn("     "),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
