"""File locks that the operating system lets go of when their holder dies, however it dies.

Says nothing of what is locked. Processes on one machine, or on a file system with locks, share it.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, which is made where it is missing and stays.

    Args:
        path: of the file; what is in it plays no part.
        wait: until another holder lets go; False: give up at once.

    Yields:
        Whether the lock is held; without `wait` another may have it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        # Closing lets go. The file is never removed: another may have opened it and wait.
        yield True
