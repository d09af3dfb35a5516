"""Records in a file of JSON lines that survives a kill: one line each, appended whole.

A line that a kill or a full disk cut short costs that record only. What is in a record is up to
`run_cell` and `study`; only the measures that everything is judged by are read here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

RESULTS_FILE = "results.jsonl"
FAILURES_FILE = "failures.jsonl"


class Measures(NamedTuple):
    """What a model is judged by, in nats a token; lower is better; None where not measured.

    Args:
        learn: mean nll of the probes of updated facts and of new entities.
        forget: nll of the probes of facts that hold as before.
        text: nll of ordinary text from before the date.
    """

    learn: float | None
    forget: float | None
    text: float | None


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record and wait until it is on the disk.

    Processes that append at once take turns. What is not finite is written as null. A line that
    an earlier append left unfinished is ended first, so that it spoils no other.

    Args:
        path: of the file, made where it is missing.
        record: ready for JSON, with a text "key".

    Raises:
        ValueError: the record has no key.
        OSError: it cannot be written (a full disk, for one); the file is then as it was, where
            the system allows it.
    """
    if not isinstance(record.get("key"), str):
        raise ValueError(f"key={record.get('key')!r}: a record is found by its key, a text")
    text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)
    line = text.encode("utf-8", "backslashreplace") + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            while line:
                line = line[os.write(handle, line) :]
            os.fsync(handle)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)  # and lets go of the lock


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read all records; of those with the same key the last.

    A line that is no record is left out, with a warning that names its number.

    Args:
        path: of the file; none gives no records.
    """
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH)  # no line that is being written
            lines = handle.read().split(b"\n")
    except FileNotFoundError:
        return []
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            key = record["key"]
            if not isinstance(key, str):
                raise TypeError(key)
        except (ValueError, KeyError, TypeError):
            warnings.warn(
                f"{path}, line {number}: no record, perhaps cut short by a kill; left out",
                stacklevel=2,
            )
            continue
        found.pop(key, None)  # the order is that of the last lines
        found[key] = record
    return list(found.values())


def measures(scores: Mapping[str, Any]) -> Measures:
    """The measures of one entry of a record's "scores", such as record["scores"]["1"]."""
    probes = scores.get("probes") or {}
    updated, new, unchanged = (_nll(probes, kind) for kind in ("updated", "new", "unchanged"))
    learn = None if updated is None or new is None else (updated + new) / 2
    return Measures(learn, unchanged, _nll(scores.get("text") or {}, "old"))


def _nll(scores: Mapping[str, Any], name: str) -> float | None:
    value = (scores.get(name) or {}).get("nll")
    return None if value is None else float(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
