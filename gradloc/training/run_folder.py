"""The folder of a training run: what is in it, whether it may be used, and where to go on from.

    output/checkpoint-100/   Trainer's, with the plan in force in plan.json
    output/plan.json         the plan in force at the end (at the start, until then)
    output/profile.json      the profile that it came from, if any
    output/training.json     settings, then results
    output/final/            the trained model and tokenizer, for from_pretrained

Trains nothing and knows no Trainer: a checkpoint is complete when all that resuming reads is there.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradloc.files import check_writable, read_json, write_json

SCHEMA = "gradloc.training"
VERSION = 1
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_NEEDED = ("plan.json", "optimizer.pt", "scheduler.pt", "trainer_state.json")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)


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


def remove_later_checkpoints(checkpoint: Path) -> None:
    """Remove checkpoints with a higher step than `checkpoint`: they were never finished."""
    step = _step(checkpoint)
    for path in _checkpoints(checkpoint.parent):
        if _step(path) > step:
            shutil.rmtree(path)


def last_complete_checkpoint(output: Path) -> Path | None:
    """The checkpoint with the highest step that has all its parts, or None."""
    whole = [path for path in _checkpoints(output) if _is_complete(path)]
    return max(whole, key=_step, default=None)


def is_finished(checkpoint: Path) -> bool:
    """Whether a complete checkpoint is the end of its run."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"])


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
    return [path for name in names if (path := output / name).exists()] + _checkpoints(output)


def _checkpoints(output: Path) -> list[Path]:
    if not output.is_dir():
        return []
    return [p for p in output.iterdir() if p.is_dir() and _CHECKPOINT.fullmatch(p.name)]


def _step(checkpoint: Path) -> int:
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def _is_complete(checkpoint: Path) -> bool:
    """Trainer writes weights, optimizer, scheduler and its state in this order, and we the plan."""
    if not all((checkpoint / name).is_file() for name in _NEEDED):
        return False
    if not any((checkpoint / name).is_file() for name in _WEIGHTS):
        return False
    if not any(checkpoint.glob("rng_state*.pth")):
        return False
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return bool(state.get("global_step") == _step(checkpoint))
