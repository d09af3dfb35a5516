"""The folder of a demo: what is in it, and whether a demo may write there.

    demo.json                     settings and state; says that the folder is a demo's
    world/                        corpora, ordinary text, probes
    base/                         the model that knows the old facts
    profile.json, profile.png     how its layers react
    plan-<method>.json            what each method trains
    models/<method>/              the model after the first run of each method
    results.json, report.html     what came out

Measures nothing and knows no model.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from gradloc.demo.methods import METHODS
from gradloc.files import check_writable, read_json, write_json

MARKER = "demo.json"
_SCHEMA = "gradloc.demo"
_VERSION = 1
_FILES = ("profile.json", "profile.png", "results.json", "report.html")
_METHODS = tuple(method.name for method in METHODS)


def open_folder(output: Path) -> None:
    """Check that a demo may write to `output`; nothing is changed but that the folder exists.

    Raises:
        ValueError: the folder holds something and no demo wrote it.
        OSError: it is a file, or cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise OSError(f"output={str(output)!r} is a file, not a folder: choose another name")
    check_writable(output / MARKER)
    if not any(output.iterdir()):
        return
    try:
        read_json(output / MARKER, schema=_SCHEMA, version=_VERSION)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"output={str(output)!r} holds files and no earlier demo, so nothing is written there: "
            "choose another folder or a new name"
        ) from error


def clear_folder(output: Path) -> None:
    """Remove what an earlier demo wrote, and nothing else: no old report beside a new world.

    The world's files stay until new ones replace them under the same names. The marker goes last,
    so that a removal that is cut short can be repeated.
    """
    ours = [output / "base", *(output / "models" / name for name in _METHODS)]
    ours += [output / f"plan-{name}.json" for name in _METHODS]
    ours += [output / name for name in _FILES] + [*output.glob(".runs-*"), output / MARKER]
    for path in ours:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_marker(output: Path, status: str, settings: dict[str, Any]) -> None:
    """Say in `demo.json` that the folder is a demo's, and how far it is."""
    write_json(
        output / MARKER,
        {"status": status, "settings": settings},
        schema=_SCHEMA,
        version=_VERSION,
    )
