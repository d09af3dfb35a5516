"""Reads the documents of text, JSON-lines and parquet files, one after another.

Says where a malformed file is wrong. Does not tokenise; `gradloc.training.corpus` does.

A document is one line of a .txt file (`documents="paragraph"`: what stands between blank lines;
`"file"`: the whole file), or one row of a .jsonl or .parquet file. Blank documents are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_SAMPLE_BY = {"line": "line", "paragraph": "paragraph", "file": "document"}
_ROWS_AT_ONCE = 1000

DOCUMENT_UNITS = tuple(_SAMPLE_BY)
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def checked_files(paths: Paths) -> list[Path]:
    """The files as paths, once they are known to exist, to be of a known kind, and not empty.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: there are none, or one is a folder, empty, or has an unknown suffix.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise ValueError("paths is empty: give at least one file of text")
    files = [Path(path).expanduser() for path in given]
    for file in files:
        if file.is_dir():
            raise ValueError(f"corpus path={str(file)!r} is a folder: give its files")
        if not file.is_file():
            raise FileNotFoundError(f"no such corpus file: {str(file)!r}")
        if file.suffix.lower() not in _BUILDERS:
            raise ValueError(
                f"corpus file {str(file)!r} has the unknown suffix {file.suffix!r}: "
                f"known are {', '.join(_BUILDERS)}"
            )
        if file.stat().st_size == 0:
            raise ValueError(f"corpus file {str(file)!r} is empty")
    return files


def read_documents(file: Path, text_field: str, documents: str, folder: Path) -> Iterator[str]:
    """The documents of one file that are not blank.

    Args:
        file: one that `checked_files` has let pass.
        text_field: the field of a JSON or parquet row that holds the text.
        documents: what a document of a .txt file is: "line", "paragraph" or "file".
        folder: where datasets may put its Arrow files while they are read.

    Raises:
        ValueError: the file is malformed (with its line), or lacks `text_field`.
    """
    from datasets import load_dataset

    builder = _BUILDERS[file.suffix.lower()]
    options: dict[str, Any] = {"sample_by": _SAMPLE_BY[documents]} if builder == "text" else {}
    field = "text" if builder == "text" else text_field
    with _quiet():
        try:
            rows = load_dataset(
                builder, data_files=[str(file)], split="train", cache_dir=str(folder), **options
            )
        except Exception as error:  # datasets raises many kinds; all become one line of ours
            raise ValueError(
                f"cannot read corpus file {_place_of_error(file, builder, error)}"
            ) from error
    if field not in rows.column_names:
        raise ValueError(
            f"corpus file {str(file)!r} has no field {field!r}, "
            f"only {', '.join(rows.column_names) or 'none'}: "
            "name the one that holds the text (text_field, --text-field)"
        )
    row = 0
    for batch in rows.select_columns([field]).iter(_ROWS_AT_ONCE):
        for text in batch[field]:
            row += 1
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"corpus file {str(file)!r}, row {row}: field {field!r} is "
                    f"{type(text).__name__}, not text"
                )
            if text is not None and text.strip():
                yield text


def _place_of_error(file: Path, builder: str, error: Exception) -> str:
    """`file:line: reason` where a line can be blamed, else the innermost reason."""
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if builder == "json" and line.strip():
                    try:
                        parsed = json.loads(line)
                    except json.JSONDecodeError as reason:
                        return f"{file}:{number}: {reason.msg} (column {reason.colno})"
                    if not isinstance(parsed, dict):
                        return f"{file}:{number}: a {type(parsed).__name__}, not an object"
    except UnicodeDecodeError as reason:
        return f"{file}: not UTF-8 text ({reason.reason} at byte {reason.start})"
    innermost: BaseException = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    return (
        f"{file}: {str(innermost).splitlines()[0] if str(innermost) else type(innermost).__name__}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no log of an error that we raise ourselves."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
