"""Files that are written whole or not at all.

Everything gradloc writes goes through here: the content goes to a temporary name beside the target
and is renamed over it at the end, so that a crash, a full disk or a kill leaves the old file as it
was. Says nothing about what the files mean; `GradientProfile` and `LayerPlan` do.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it over `path` if the block ends well.

    Args:
        path: the file to write. Missing parent folders are made. The temporary name keeps the
            suffix, because writers such as matplotlib choose the format by it.

    Raises:
        OSError: the folder cannot be made or written, or `path` is a folder; with what to do
            about it.
    """
    target = Path(path)
    check_writable(target)
    handle, name = tempfile.mkstemp(
        prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes the file private; a file that a user asked for has the rights that open()
        # would give it.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for a folder: it appears under its name complete, in place of an older one.

    Raises:
        OSError: the parent cannot be written, or `path` is a file.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise OSError(
            f"path={str(target)!r} is a file, not a folder: remove it or choose another name"
        )
    _check_folder(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        if target.exists():
            # Two renames: between them the old content has another name, but it is never gone
            # before the new is there.
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.replace(old / target.name)
            try:
                temporary.replace(target)
            except OSError:
                (old / target.name).replace(target)
                old.rmdir()
                raise
            shutil.rmtree(old)
        else:
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what a kill inside `replacing_folder(path)` left beside `path`.

    An old folder that was moved aside, with nothing yet in its place, goes back under its name. The
    caller holds a lock, or knows otherwise that nobody is writing the folder at this moment.

    Raises:
        OSError: something cannot be removed.
    """
    target = Path(path)
    if not target.parent.is_dir():
        return
    begun = f".{target.name}."
    for folder in sorted(target.parent.iterdir()):
        if folder.is_dir() and folder.name.startswith(begun):
            if (folder / target.name).is_dir() and folder.name.startswith(f"{begun}old."):
                if not target.exists():
                    (folder / target.name).replace(target)
            shutil.rmtree(folder)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise now what writing the file `path` would raise later, for use before hours of work.

    Raises:
        OSError: `path` is a folder, or its folder cannot be made or written.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"path={str(path)!r} is a folder: add a file name")
    _check_folder(Path(path).parent)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot make the folder {str(folder)!r} ({error.strerror}): choose another path"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"cannot write in {str(folder)!r}: choose another path or change its permissions"
        )


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(
    path: str | os.PathLike[str], content: dict[str, Any], *, schema: str, version: int
) -> None:
    """Write a JSON object headed by `schema` and `version`, whole or not at all."""
    body = {"schema": schema, "version": version, **content}
    write_text(path, json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str], *, schema: str, version: int) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, of another schema, or of a newer version than this gradloc reads.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {str(source)!r}")
    try:
        body = json.loads(source.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(source)!r} is not a JSON file ({error})") from error
    found = body.get("schema") if isinstance(body, dict) else None
    if found != schema:
        raise ValueError(
            f"{str(source)!r} holds schema={found!r}, not {schema!r}: is it the right file?"
        )
    if not isinstance(body.get("version"), int) or body["version"] > version:
        raise ValueError(
            f"{str(source)!r} has version={body.get('version')!r}; this gradloc reads up to "
            f"{version}: upgrade gradloc"
        )
    return dict(body)
