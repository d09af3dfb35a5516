"""The folder of a training run: what is in it, whether it may be used, and where to go on from.

    output/checkpoint-100/   Trainer's, with the plan in force in plan.json
    output/plan.json         the plan in force at the end (at the start, until then)
    output/profile.json      the last profile traced, if any
    output/training.json     settings, then results
    output/final/            the trained model and tokenizer, for from_pretrained

Trains nothing and knows no Trainer. Which checkpoints are whole is in
`gradloc.training.checkpoints`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradloc.files import check_writable, read_json, write_json
from gradloc.training.checkpoints import checkpoints, last_complete_checkpoint

SCHEMA = "gradloc.training"
VERSION = 1


def open_run_folder(output: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Check that a run may write here; nothing is removed yet.

    Returns:
        The checkpoint to go on from, or None for a new run.

    Raises:
        ValueError: there is a run already, or with `resume` there is none to go on with, or both
            `resume` and `overwrite`.
        OSError: the folder cannot be written.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite: the one goes on with a run, the other removes it")
    if output.exists() and not output.is_dir():
        raise OSError(f"output={str(output)!r} is a file, not a folder: choose another name")
    check_writable(output / "training.json")
    if resume:
        checkpoint = last_complete_checkpoint(output)
        if checkpoint is None:
            raise ValueError(
                f"output={str(output)!r} has no complete checkpoint to resume from: start the run "
                "without --resume (with --overwrite if the folder holds an unfinished one)"
            )
        return checkpoint
    found = _of_a_run(output)
    if found and not overwrite:
        raise ValueError(
            f"output={str(output)!r} holds a run already ({found[0].name}): choose another folder, "
            "go on with it (--resume), or replace it (--overwrite)"
        )
    return None


def clear_run_folder(output: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    for path in _of_a_run(output):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def start_record(output: Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write training.json for a run that begins."""
    content = {"status": "running", "settings": dict(settings), "about": dict(about)}
    write_json(output / "training.json", content, schema=SCHEMA, version=VERSION)


def check_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Check that a run goes on with the settings that it began with.

    Raises:
        FileNotFoundError: training.json is missing.
        ValueError: settings differ; each is named with both values.
    """
    earlier = read_json(output / "training.json", schema=SCHEMA, version=VERSION).get(
        "settings", {}
    )
    # Through JSON, as the earlier ones went: tuples become lists.
    now = json.loads(json.dumps(dict(settings)))
    differ = [
        f"{name}={now.get(name)!r} (was {earlier.get(name)!r})"
        for name in sorted({*earlier, *now})
        if earlier.get(name) != now.get(name)
    ]
    if differ:
        raise ValueError(
            "a resumed run goes on with the settings that it began with, but these differ: "
            f"{', '.join(differ)}. Give the earlier values, or begin another run from the model "
            "in the last checkpoint"
        )


def _of_a_run(output: Path) -> list[Path]:
    names = ("training.json", "plan.json", "profile.json", "final")
    return [path for name in names if (path := output / name).exists()] + checkpoints(output)
