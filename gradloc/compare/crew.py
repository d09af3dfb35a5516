"""The worker processes of a grid, seen from the process that starts them.

Starts them, gives them tasks, notices what they say and that they died, ends them. Which task and
what a message means is decided in `schedule`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING

from gradloc.compare.messages import Message, Note, Ready, Setup, Step, Task
from gradloc.compare.worker import serve

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

_SECONDS_TO_END = 5.0


@dataclass(frozen=True)
class Died:
    """A worker is gone without having been told to go."""

    reason: str


class Worker:
    """One process.

    Args:
        number: from 1, for people.
        setup: what is worked on.
    """

    def __init__(self, number: int, setup: Setup) -> None:
        self.number = number
        self.log: Path = setup.folder / "logs" / f"worker-{number}.log"
        self.is_ready = False
        self.task: Task | None = None
        # Spawned, not forked: a fork copies locks and threads of whatever runs here.
        context = multiprocessing.get_context("spawn")
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=serve, args=(theirs, setup, self.log), name=f"gradloc compare {number}"
        )
        with _environment(setup.config.threads), _interrupts_blocked():
            self.process.start()
        theirs.close()  # so that the pipe ends when the worker does

    @property
    def is_idle(self) -> bool:
        """Whether it can take a task."""
        return self.is_ready and self.task is None

    def give(self, task: Task) -> None:
        """Give it a task. A worker that has just died is noticed at the next `receive`."""
        self.task = task
        try:
            self.pipe.send(task)
        except OSError:
            pass

    def receive(self) -> Message | Died:
        """Take the next message of a worker that has one."""
        try:
            # Its last words come before its death, even where both are known.
            message: Message | None = self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            message = None
        if message is None:
            self.process.join()
            return Died(_how(self.process.exitcode))
        if isinstance(message, Ready):
            self.is_ready = True
        elif not isinstance(message, (Step, Note)):
            self.task = None
        return message

    def end(self, *, at_once: bool) -> None:
        """Tell it to go, or make it go."""
        if not at_once:
            try:
                self.pipe.send(None)
                self.process.join(_SECONDS_TO_END)
            except OSError:
                pass
        for stop in (self.process.terminate, self.process.kill):
            if self.process.exitcode is None:
                stop()
                self.process.join(_SECONDS_TO_END)
        self.pipe.close()
        self.process.close()


@contextmanager
def crew(number: int, setup: Setup) -> Iterator[list[Worker]]:
    """Start workers; all are gone when the block ends, at once if it raised."""
    workers: list[Worker] = []
    at_once = True
    try:
        for index in range(number):
            workers.append(Worker(index + 1, setup))
        yield workers
        at_once = False
    finally:
        for worker in workers:
            worker.end(at_once=at_once)


def speaking(workers: list[Worker], timeout: float) -> list[Worker]:
    """The workers that have something to say, or died; waits until one has."""
    ends = [end for worker in workers for end in (worker.pipe, worker.process.sentinel)]
    ready = connection.wait(ends, timeout)
    return [w for w in workers if w.pipe in ready or w.process.sentinel in ready]


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"it ended with status {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else "an unknown signal"
    hint = ", which is how a machine that runs out of memory ends processes"
    return f"it was killed by signal {-code} ({name}{hint if -code == signal.SIGKILL else ''})"


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C in a terminal reaches all its processes; this one decides when the others end.

    A new process begins with what is blocked here, so that none comes through while it starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """What a worker's libraries read when they are loaded, before any code of ours."""
    ours = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
