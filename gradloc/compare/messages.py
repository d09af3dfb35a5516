"""What a grid and its workers say to one another: tasks one way, messages about them the other.

Plain data that is pickled; does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from gradloc.compare.config import CompareConfig
from gradloc.compare.grid import Cell

RUNNER = ("gradloc.compare.run_cell:run_cell", "gradloc.compare.study:prepare")
"""What does the work: a function of a cell and one of a seed, as "module:name"."""


@dataclass(frozen=True)
class Base:
    """The task to make the base of a seed."""

    seed: int

    @property
    def name(self) -> str:
        """For people, and the key of a failure."""
        return f"base seed={self.seed}"

    @property
    def key(self) -> str:
        """The same: a base has no other key before it is made."""
        return self.name


Task: TypeAlias = Base | Cell


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker knows from the start.

    Args:
        config: the comparison.
        folder: RUN.
        places: where things lie on this machine.
        runner: as `RUNNER`.
    """

    config: CompareConfig
    folder: Path
    places: Mapping[str, str]
    runner: tuple[str, str]


@dataclass(frozen=True)
class Ready:
    """Everything is imported; tasks may come."""


@dataclass(frozen=True)
class Step:
    """How far the task is."""

    step: int
    total: int


@dataclass(frozen=True)
class Note:
    """A sentence for the user."""

    text: str


@dataclass(frozen=True)
class Done:
    """The task's record is in the results; `elsewhere`: another process had put it there."""

    record: dict[str, Any]
    elsewhere: bool = False


@dataclass(frozen=True)
class Busy:
    """Another process has the cell in work."""


@dataclass(frozen=True)
class Failed:
    """The task raised; `is_fatal`: another would fail as well, as results cannot be written."""

    error: str
    traceback: str
    is_fatal: bool = False


Message: TypeAlias = Ready | Step | Note | Done | Busy | Failed
