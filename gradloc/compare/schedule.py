"""run_grid: works through the runs of a comparison that are missing, in processes side by side.

Decides what is done when; the work itself is the runner's. Everything it knows between two calls is
in RUN:

    config.json      the comparison
    results.jsonl    a line a run and a base
    failures.jsonl   a line a failure, with its traceback
    locks/           who works at what; the files are empty and stay
    logs/            what the workers' libraries printed
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradloc.compare.board import Board
from gradloc.compare.config import CompareConfig
from gradloc.compare.config_file import CONFIG_FILE, load_config, save_config
from gradloc.compare.crew import Died, Worker, crew, speaking
from gradloc.compare.grid import Cell, cells
from gradloc.compare.messages import (
    RUNNER,
    Base,
    Busy,
    Done,
    Failed,
    Note,
    Setup,
    Step,
    Task,
)
from gradloc.compare.progress import GridProgress
from gradloc.compare.results import FAILURES_FILE, RESULTS_FILE, append_record, read_records
from gradloc.files import check_writable
from gradloc.wording import listed

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_A_ROUND = 0.5


@dataclass(frozen=True, kw_only=True)
class GridResult:
    """How a grid ended.

    Args:
        num_cells: runs that were asked for.
        num_done: of these, those with a result, earlier ones among them.
        num_failed: of these, those that failed this time, or whose base did.
        failures: a sentence each.
    """

    num_cells: int
    num_done: int
    num_failed: int
    failures: tuple[str, ...]


def run_grid(
    config: CompareConfig,
    folder: Path,
    *,
    places: Mapping[str, str],
    processes: int = 1,
    only: Sequence[str] | None = None,
    runner: tuple[str, str] | None = None,
    console: Console | None = None,
) -> GridResult:
    """Run what is missing of a comparison. May be killed at any moment and called again.

    Several calls at once on the same folder, from one process or many, share the work: a run is
    never made twice. A run that raises, or whose process dies, is noted in failures.jsonl, the
    others go on, and another call tries it again.

    Args:
        config: the comparison.
        folder: RUN; made where it is missing.
        places: "model", "data" -> where they lie on this machine.
        processes: workers, each with `config.threads` threads.
        only: methods; None: all.
        runner: what makes a run and a base, as `messages.RUNNER`, in modules that a new process can
            import; None: that.
        console: where the progress is shown; None: standard output.

    Raises:
        ValueError: RUN holds another comparison, or something else; no such method; `processes`.
        OSError: RUN cannot be written.
        RuntimeError: a worker cannot start.
        KeyboardInterrupt: as it came, after the workers have been ended.
    """
    if processes < 1:
        raise ValueError(f"processes={processes!r}: at least 1")
    wanted = cells(config, only)
    open_folder(config, folder)
    setup = Setup(config=config, folder=folder, places=dict(places), runner=runner or RUNNER)
    board, done = _what_is_left(wanted, read_records(folder / RESULTS_FILE))
    num_workers = min(processes, max(len(board.left), len(board.bases)))
    with GridProgress(console, wanted, done, num_workers) as progress:
        work = _Work(setup, board, done, progress)
        try:
            with crew(num_workers, setup) as workers:
                while not board.is_over:
                    work.hand_out(workers)
                    for worker in speaking(workers, _SECONDS_A_ROUND):
                        work.hear(worker, workers)
        except KeyboardInterrupt:
            progress.say(
                f"stopped: {len(done)} of {len(wanted)} runs are done; the same command goes on "
                "from there"
            )
            raise
    return GridResult(
        num_cells=len(wanted),
        num_done=len(done),
        num_failed=work.num_lost,
        failures=tuple(work.failures),
    )


def check_folder(config: CompareConfig, folder: Path) -> CompareConfig | None:
    """Check that the runs of a comparison may go to a folder; nothing is changed.

    Returns:
        The comparison that the folder has so far; None: it is new or empty.

    Raises:
        ValueError: the folder has another comparison, or something else.
        OSError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise OSError(f"output={str(folder)!r} is a file, not a folder: choose another name")
    if not (folder / CONFIG_FILE).exists():
        # A start that was killed leaves a temporary file, whose name has a point before it.
        if folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
            raise ValueError(
                f"output={str(folder)!r} holds files and no comparison ({CONFIG_FILE}), so nothing "
                "is written there: choose another folder or a new name"
            )
        return None
    earlier = load_config(folder)
    differ = _differences(earlier.fixed(), config.fixed())
    if differ:
        raise ValueError(
            f"output={str(folder)!r} has runs of another comparison: {listed(differ)}. Methods, "
            "seeds and learning rates may change within a folder, these may not: choose another "
            "folder, or the earlier values"
        )
    return earlier


def open_folder(config: CompareConfig, folder: Path) -> None:
    """The same, and write the comparison there.

    Raises:
        ValueError, OSError: as `check_folder`, and where the folder cannot be written.
    """
    earlier = check_folder(config, folder)
    check_writable(folder / RESULTS_FILE)
    if earlier != config:
        save_config(config, folder)


def _differences(earlier: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        return [
            text
            for key in dict.fromkeys([*earlier, *now])
            for text in _differences(
                earlier.get(key), now.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if earlier == now else [f"{name}={now!r} (was {earlier!r})"]


def _what_is_left(
    wanted: Sequence[Cell], records: Sequence[dict[str, Any]]
) -> tuple[Board, dict[str, dict[str, Any]]]:
    """The board, and the records of the cells that are done, by key."""
    keys = {cell.key for cell in wanted}
    done = {record["key"]: record for record in records if record["key"] in keys}
    based = [record["seed"] for record in records if record.get("kind") == "base"]
    return Board(wanted, done, based), done


class _Work:
    """What happens between the workers, the board and the display."""

    def __init__(
        self,
        setup: Setup,
        board: Board,
        done: dict[str, dict[str, Any]],
        progress: GridProgress,
    ) -> None:
        self.setup = setup
        self.board = board
        self.done = done
        self.progress = progress
        self.failures: list[str] = []
        self.num_lost = 0

    def hand_out(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            if worker.is_idle:
                task = self.board.next(time.monotonic())
                if task is not None:
                    worker.give(task)
                    self.progress.began(worker.number, task)
        self.progress.waiting(self.board.num_waiting)

    def hear(self, worker: Worker, workers: list[Worker]) -> None:
        task, started = worker.task, worker.is_ready
        match worker.receive():
            case Step(step, total):
                self.progress.step(worker.number, step, total)
            case Note(text):
                self.progress.note(worker.number, text)
            case Done(record, elsewhere) if task is not None:
                self.board.done(task)
                if isinstance(task, Cell):
                    self.done[task.key] = record
                self.progress.done(worker.number, record, elsewhere=elsewhere)
            case Busy() if isinstance(task, Cell):
                self.board.busy(task, time.monotonic())
                self.progress.idle(worker.number)
            case Failed() as failed if not started:
                raise RuntimeError(f"a worker cannot start:\n{failed.traceback}")
            case Failed() as failed if failed.is_fatal:
                raise OSError(f"{failed.error}: the results cannot be written")
            case Failed() as failed:
                self._lose(worker, task, failed)
            case Died(reason):
                if not started:
                    raise RuntimeError(f"a worker cannot start: {reason}; see {worker.log}")
                self._lose(worker, task, Failed(f"the process died: {reason}", ""))
                worker.end(at_once=True)
                workers[workers.index(worker)] = Worker(worker.number, self.setup)

    def _lose(self, worker: Worker, task: Task | None, failed: Failed) -> None:
        self.progress.idle(worker.number)
        if task is None:
            return
        lost = self.board.failed(task)
        self.num_lost += len(lost)
        sentence = f"{task.name}: {failed.error}"
        if isinstance(task, Base) and lost:
            sentence += f" ({len(lost)} runs of this seed are left out)"
        self.failures.append(sentence)
        self.progress.failed(sentence, lost)
        append_record(
            self.setup.folder / FAILURES_FILE,
            {
                "kind": "failure",
                "key": task.key,
                "cell": task.name,
                "error": failed.error,
                "traceback": failed.traceback,
                "log": str(worker.log.relative_to(self.setup.folder)),
                "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
        )
