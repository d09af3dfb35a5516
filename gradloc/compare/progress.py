"""GridProgress: what a person sees of a grid while it runs; live in a terminal, else plain lines.

Only shows, and estimates the time left; decides nothing.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gradloc.compare.grid import Cell
from gradloc.compare.messages import Base, Task
from gradloc.compare.results import measures

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_SHOWN_RESULTS = 6
_REFRESH_PER_SECOND = 4


@dataclass
class _Line:
    """What a worker does."""

    what: str = "starting"
    task: Task | None = None
    note: str = ""
    step: int = 0
    total: int = 0
    since: float = field(default_factory=time.monotonic)


class GridProgress:
    """The display of one call of `run_grid`; a context manager.

    Args:
        console: where to; None: standard output.
        cells: all runs that were asked for.
        done: key -> record of those that are done.
        num_workers: a line each.
    """

    def __init__(
        self,
        console: Console | None,
        cells: Sequence[Cell],
        done: Mapping[str, Mapping[str, Any]],
        num_workers: int,
    ) -> None:
        if console is None:
            from rich.console import Console

            console = Console()
        self.console = console
        self._num_waiting = 0
        self._left = {cell.key: cell.method.name for cell in cells if cell.key not in done}
        self._num_cells = len(cells)
        self._num_lost = 0
        self._records = list(done.values())
        self._lines = {number + 1: _Line() for number in range(num_workers)}
        self._last: deque[str] = deque(maxlen=_SHOWN_RESULTS)
        self._started = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> GridProgress:
        if self.console.is_terminal and self._lines:
            from rich.live import Live

            self._live = Live(
                console=self.console,
                get_renderable=self._rendered,
                refresh_per_second=_REFRESH_PER_SECOND,
                transient=True,
            )
            self._live.start()
        elif self._lines:
            self.say(f"{self._num_done} of {self._num_cells} runs are done")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def began(self, worker: int, task: Task) -> None:
        """A worker has a task."""
        self._lines[worker] = _Line(task.name, task)

    def step(self, worker: int, step: int, total: int) -> None:
        """How far it is."""
        line = self._lines[worker]
        line.step, line.total = step, total

    def note(self, worker: int, text: str) -> None:
        """What it is about, or found."""
        line = self._lines[worker]
        line.note, line.step, line.total = text, 0, 0
        # Bases are few, and what is said of them concerns all runs.
        if self._live is None and isinstance(line.task, Base):
            self.say(f"{line.what}: {text}")

    def done(self, worker: int, record: Mapping[str, Any], *, elsewhere: bool) -> None:
        """A worker's task has its record; `elsewhere`: from another process."""
        line = self._lines[worker]
        self.idle(worker)
        if isinstance(line.task, Base) and elsewhere:
            return
        took = "done elsewhere" if elsewhere else duration(time.monotonic() - line.since)
        shown = f"{line.what}: {result_line(record)} ({took})"
        self._last.append(shown)
        if isinstance(line.task, Cell):
            del self._left[line.task.key]
            self._records.append(record)
            shown = f"[{self._num_done}/{self._num_cells}] {shown}{self._rest()}"
        if self._live is None:
            self.say(shown)

    def failed(self, sentence: str, lost: Sequence[Cell]) -> None:
        """A task is given up, and cells with it."""
        for cell in lost:
            del self._left[cell.key]
        self._num_lost += len(lost)
        self.say(f"failed: {sentence}", style="red")

    def idle(self, worker: int) -> None:
        """A worker has nothing to do."""
        self._lines[worker] = _Line("waiting")

    def waiting(self, number: int) -> None:
        """How many runs are left that another process has in work."""
        if number and not self._num_waiting and self._live is None:
            self.say("another process works at this grid too; what it has begun is waited for")
        self._num_waiting = number

    def say(self, what: str, style: str | None = None) -> None:
        """A line that stays."""
        self.console.print(what, style=style, markup=False, highlight=False, soft_wrap=True)

    @property
    def _num_done(self) -> int:
        return self._num_cells - self._num_lost - len(self._left)

    def _rest(self) -> str:
        left = seconds_left(list(self._left.values()), self._records, max(1, len(self._lines)))
        return f", {duration(left)} left" if left else ""

    def _rendered(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        head = f"{self._num_done}/{self._num_cells} runs"
        if self._num_lost:
            head += f", {self._num_lost} failed"
        if self._num_waiting:
            head += f", {self._num_waiting} in work elsewhere"
        head += f"  {duration(now - self._started)}{self._rest()}"
        top = Table.grid(padding=(0, 2))
        top.add_row(ProgressBar(max(1, self._num_cells), self._num_done, width=30), Text(head))
        workers = Table.grid(padding=(0, 2))
        for number, line in self._lines.items():
            bar: RenderableType = Text("")
            steps = ""
            if line.total:
                bar = ProgressBar(line.total, line.step, width=20)
                steps = f"{line.step}/{line.total}"
            workers.add_row(
                Text(str(number), style="dim"),
                Text(line.what),
                bar,
                Text(steps),
                Text(line.note, style="dim"),
                Text(duration(now - line.since), style="dim"),
            )
        results = [
            Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self._last
        ]
        return Group(top, workers, *results)


def seconds_left(
    methods: Sequence[str], records: Sequence[Mapping[str, Any]], processes: int
) -> float | None:
    """The time that runs will take, by the median of finished ones of their method.

    Args:
        methods: the method of each run that is missing.
        records: of finished runs. A method with none counts as the median of all.
        processes: that share the work.

    Returns:
        Seconds; None where nothing is finished yet.
    """
    took: dict[str, list[float]] = {}
    for record in records:
        seconds = (record.get("seconds") or {}).get("total")
        if seconds is not None:
            took.setdefault(str(record.get("method")), []).append(float(seconds))
    if not took:
        return None
    overall = statistics.median(value for values in took.values() for value in values)
    expected = {name: statistics.median(values) for name, values in took.items()}
    return sum(expected.get(name, overall) for name in methods) / processes


def duration(seconds: float) -> str:
    """Such as "7 s", "4:05 min" or "3:20 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


def result_line(record: Mapping[str, Any]) -> str:
    """The measures of a record without interpolation: "learn 1.234, forget 0.456, text 2.345"."""
    found = measures((record.get("scores") or {}).get("1") or {})
    return ", ".join(
        f"{name} {'–' if value is None else f'{value:.3f}'}"
        for name, value in found._asdict().items()
    )
