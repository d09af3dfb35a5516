"""Reads files of one JSON object a line and reports malformed lines by file and number.

Knows no probe format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from gradloc.probes.probe import ProbeFormatError

T = TypeVar("T")

_MOST_ERRORS_SHOWN = 5


def parse_lines(path: str | os.PathLike[str], parse: Callable[[dict[str, Any], str], T]) -> list[T]:
    """Apply `parse(row, "path:line")` to every line that is not blank.

    Args:
        path: a UTF-8 file, a JSON object a line. A byte order mark and Windows line ends are
            accepted.
        parse: turns a row into what is wanted; raises ValueError with the reason for a malformed
            one.

    Raises:
        FileNotFoundError: no such file.
        ProbeFormatError: lines are malformed (the first five are listed) or the file holds none.
    """
    results = []
    errors = []
    for source, line in _lines(path):
        try:
            results.append(parse(_row(line), source))
        except ValueError as error:
            errors.append(f"{source}: {error}")
    if errors:
        shown = errors[:_MOST_ERRORS_SHOWN]
        if len(errors) > len(shown):
            shown.append(f"and {len(errors) - len(shown)} more malformed lines")
        raise ProbeFormatError("\n".join(shown))
    if not results:
        raise ProbeFormatError(
            f"{os.fspath(path)}: the file is empty; a probe file holds one JSON object a line"
        )
    return results


def first_row(path: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """The first row that is not blank, and its "path:line".

    Raises:
        FileNotFoundError: no such file.
        ProbeFormatError: that line is malformed, or the file is empty.
    """
    for source, line in _lines(path):
        try:
            return _row(line), source
        except ValueError as error:
            raise ProbeFormatError(f"{source}: {error}") from error
    raise ProbeFormatError(
        f"{os.fspath(path)}: the file is empty; a probe file holds one JSON object a line"
    )


def text_field(row: dict[str, Any], name: str) -> str:
    """`row[name]`, checked to be a string that is not blank.

    Raises:
        ValueError: it is missing, of another type, or blank.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} is {_shown(value)}, expected text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        # JSON escapes can spell half of a character, which no tokenizer takes.
        raise ValueError(f"field {name!r} holds half of a surrogate pair: write the file as UTF-8")
    return value


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, bytes]]:
    """Give ("path:line", bytes) for lines that are not blank.

    Bytes are split, not text: JSON strings may hold U+2028 and others at which str.splitlines would
    cut, and a line that is not UTF-8 must not hide the lines after it.
    """
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder: name the probe file in it")
    if not file.is_file():
        raise FileNotFoundError(f"no such probe file: {os.fspath(path)!r}")
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{os.fspath(path)}:{number}", line


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte {error.start + 1} of the line): save it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, expected one object a line")
    return row


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]
