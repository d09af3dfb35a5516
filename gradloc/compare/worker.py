"""A process that works for a grid: takes a task, does it, says what came of it, until told to stop.

It chooses nothing: which task comes next is decided by the process that started it (`schedule`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gradloc.compare.grid import Cell
from gradloc.compare.locks import locked
from gradloc.compare.messages import (
    Base,
    Busy,
    Done,
    Failed,
    Message,
    Note,
    Ready,
    Setup,
    Step,
)
from gradloc.compare.results import RESULTS_FILE, append_record, read_records

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_SECONDS_BETWEEN_STEPS = 0.2


def serve(pipe: Connection, setup: Setup, log: Path) -> None:
    """The life of a worker.

    Args:
        pipe: brings tasks, None for the end; takes messages.
        setup: what is worked on.
        log: takes what libraries print.
    """
    # Ctrl-C in a terminal reaches every process of it; the one that started this one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _print_to(log)
    # tqdm's own lock has a semaphore that outlives a process which is killed, with a warning.
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        run_cell, prepare = (_imported(place) for place in setup.runner)
        # OMP_NUM_THREADS says the same, but what was imported may have set another number.
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(setup.config.threads)
    except Exception as error:  # of whatever kind: it is told to the user
        pipe.send(_failure(error))
        return
    pipe.send(Ready())
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            return
        try:
            if isinstance(task, Base):
                outcome: Message = _prepare(prepare, task, setup, pipe)
            else:
                outcome = _run(run_cell, task, setup, pipe)
        except Exception as error:  # of whatever kind: one bad cell must not end the grid
            traceback.print_exc()
            outcome = _failure(error)
        pipe.send(outcome)


def _run(run_cell: Callable[..., Any], cell: Cell, setup: Setup, pipe: Connection) -> Message:
    results = setup.folder / RESULTS_FILE
    with locked(setup.folder / "locks" / cell.key, wait=False) as held:
        if not held:
            return Busy()
        # Now that nobody else can work at it: it may have been finished just before.
        earlier = _find(results, cell.key)
        if earlier is not None:
            return Done(earlier, elsewhere=True)
        print(f"--- {cell.name}", flush=True)
        record = dict(
            run_cell(cell, setup.config, setup.folder, places=setup.places, **_reports(pipe))
        )
        if record.get("key") != cell.key:
            raise ValueError(f"the record has key={record.get('key')!r}, not {cell.key!r}")
        try:
            append_record(results, record)
        except OSError as error:
            return _failure(error, is_fatal=True)
    return Done(record)


def _prepare(prepare: Callable[..., Any], base: Base, setup: Setup, pipe: Connection) -> Message:
    print(f"--- {base.name}", flush=True)
    record = dict(
        prepare(setup.config, base.seed, setup.folder, places=setup.places, **_reports(pipe))
    )
    results = setup.folder / RESULTS_FILE
    earlier = _find(results, record["key"])
    if earlier is None:
        append_record(results, record)
    return Done(record, elsewhere=earlier is not None)


def _find(results: Path, key: str) -> dict[str, Any] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken lines: the starting process has said so
        return next((record for record in read_records(results) if record["key"] == key), None)


def _reports(pipe: Connection) -> dict[str, Callable[..., None]]:
    """`on_step` and `note`; of many quick steps only some are told."""
    told = -_SECONDS_BETWEEN_STEPS

    def on_step(step: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if step >= total or now - told >= _SECONDS_BETWEEN_STEPS:
            told = now
            pipe.send(Step(step, total))

    def note(text: str) -> None:
        print(text, flush=True)
        pipe.send(Note(text))

    return {"on_step": on_step, "note": note}


def _failure(error: Exception, *, is_fatal: bool = False) -> Failed:
    first = str(error).strip().partition("\n")[0]
    lines = traceback.format_exception(error)
    return Failed(f"{type(error).__name__}: {first}", "".join(lines), is_fatal)


def _imported(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def _print_to(log: Path) -> None:
    """Send this process's output to a file: it would run through the display of the grid."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    # Tests and notebooks put other objects there.
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8", errors="backslashreplace")
    sys.stderr = open(
        2, "w", closefd=False, buffering=1, encoding="utf-8", errors="backslashreplace"
    )
    with contextlib.suppress(RuntimeError, ValueError):
        faulthandler.enable()


def _end_with_the_parent() -> None:
    """A killed grid leaves nobody working: what is unfinished is lost, and never half written."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
