"""Which checkpoints of a Trainer are whole, so that a run killed at any moment can be resumed.

transformers' `get_last_checkpoint` takes the folder with the highest number, also one whose writing
was cut short. Here each file that resuming reads is checked for its end: by the directory at the
end of torch's files, the sizes in the header of safetensors, and JSON that parses. Reads no tensor
and changes no file but for `remove_later_checkpoints`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_0",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")


def last_complete_checkpoint(output: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the highest step that has all its parts, each of them whole.

    Args:
        output: Trainer's `output_dir`.

    Returns:
        Its folder, for `trainer.train(resume_from_checkpoint=str(...))`; None without any.
    """
    # From the highest on, as a look at a large checkpoint takes its time.
    ordered = sorted(checkpoints(Path(output)), key=step_of, reverse=True)
    return next((folder for folder in ordered if is_complete(folder)), None)


def is_finished(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether a complete checkpoint is the end of its run, with nothing left to train."""
    state = _trainer_state(Path(checkpoint))
    return bool(state["global_step"] >= state["max_steps"])


def is_complete(checkpoint: Path) -> bool:
    """Whether all that resuming reads is there, each file with its end.

    Trainer writes weights, optimizer, scheduler, random state and its own state in this order, and
    `LocalizationCallback` plan.json after them. One process needs no plan.json, as the plan is in
    the optimizer's state. Of several processes each writes its random state when it comes to it;
    plan.json is written when all have.
    """
    try:
        step = _trainer_state(checkpoint).get("global_step")
    except (OSError, ValueError):
        return False
    present = {path.name for path in checkpoint.iterdir()}
    if step != step_of(checkpoint) or "scheduler.pt" not in present:
        return False
    if not (present & set(_WEIGHTS) and present & set(_OPTIMIZERS)):
        return False
    alone = "rng_state.pth" in present
    if not alone and not {"rng_state_0.pth", "plan.json"} <= present:
        return False
    return all(_is_whole(path) for path in checkpoint.iterdir())


def remove_later_checkpoints(checkpoint: Path) -> None:
    """Remove checkpoints with a higher step than `checkpoint`: they were never finished."""
    for path in checkpoints(checkpoint.parent):
        if step_of(path) > step_of(checkpoint):
            shutil.rmtree(path)


def checkpoints(output: Path) -> list[Path]:
    """The folders that have a checkpoint's name, in no order."""
    if not output.is_dir():
        return []
    return [p for p in output.iterdir() if p.is_dir() and _CHECKPOINT.fullmatch(p.name)]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError(f"{str(checkpoint)!r}: trainer_state.json is not an object")
    return state


def _is_whole(path: Path) -> bool:
    if path.is_dir():
        # Of torch.distributed.checkpoint, which writes .metadata last; other folders are not read.
        written_by_dcp = path.name.startswith(("optimizer_", "pytorch_model_fsdp_"))
        return not written_by_dcp or (path / ".metadata").is_file()
    if path.suffix == ".safetensors":
        return _is_whole_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return zipfile.is_zipfile(path)
    if path.suffix == ".json":
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return False
        if path.name.endswith(".index.json"):
            return all((path.parent / name).is_file() for name in body["weight_map"].values())
    return True


def _is_whole_safetensors(path: Path) -> bool:
    """Eight bytes with the header's length, the header as JSON, then the tensors without gaps."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length == 0 or 8 + length > size:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return bool(size == 8 + length + max(ends, default=0))
