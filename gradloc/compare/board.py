"""What of a grid is left to do and what may be done next: the order of work, and nothing else.

Knows no processes and no files; `schedule` tells it what happened.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gradloc.compare.grid import Cell
from gradloc.compare.messages import Base, Task

PATIENCE_SECONDS = 2.0
"""How long a cell that another process has in work is left alone before it is tried again."""


class Board:
    """The tasks of a grid.

    Args:
        cells: in the order in which they are wanted.
        done: keys of those that have a result.
        based: seeds whose base has a record. The base of another seed is made even where all its
            cells are done, as the results would lack what they are compared with.
    """

    def __init__(
        self, cells: Sequence[Cell], done: Collection[str], based: Collection[int]
    ) -> None:
        self.left = [cell for cell in cells if cell.key not in done]
        seeds = dict.fromkeys(cell.seed for cell in cells)
        needed = {cell.seed for cell in self.left}
        # In the order of the cells. A base that has a record is asked for as well: it may lie on
        # another machine.
        self.bases = [seed for seed in seeds if seed in needed or seed not in based]
        self.working: set[Task] = set()
        self._prepared: set[int] = set()
        self._wait_until: dict[str, float] = {}

    @property
    def is_over(self) -> bool:
        """Whether nothing is left and nothing in work."""
        return not (self.left or self.bases or self.working)

    @property
    def num_waiting(self) -> int:
        """Cells that another process had in work when they were last tried."""
        return sum(cell.key in self._wait_until for cell in self.left)

    def next(self, now: float) -> Task | None:
        """Take the next task; None: nothing can be done now.

        A cell whose base is there comes first, then the first base that is missing.

        Args:
            now: in seconds of a clock that does not go back.
        """
        for cell in self.left:
            if cell.seed in self._prepared and self._wait_until.get(cell.key, now) <= now:
                self.left.remove(cell)
                self.working.add(cell)
                return cell
        if self.bases:
            base = Base(self.bases.pop(0))
            self.working.add(base)
            return base
        return None

    def done(self, task: Task) -> None:
        """The task has its record."""
        self.working.remove(task)
        if isinstance(task, Base):
            self._prepared.add(task.seed)

    def busy(self, cell: Cell, now: float) -> None:
        """Another process has the cell: it comes back, to be taken over if that one dies."""
        self.working.remove(cell)
        self.left.append(cell)
        self._wait_until[cell.key] = now + PATIENCE_SECONDS

    def failed(self, task: Task) -> list[Cell]:
        """The task is given up.

        Returns:
            The cells that are given up with it: of a base, all of its seed.
        """
        self.working.remove(task)
        if not isinstance(task, Base):
            return [task]
        lost = [cell for cell in self.left if cell.seed == task.seed]
        self.left = [cell for cell in self.left if cell.seed != task.seed]
        return lost
