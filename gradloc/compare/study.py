"""The base model and the material of one seed: made once, traced once, shared by every method.

`prepare` makes RUN/bases/seed-N, `open_study` reads it. Which worlds there are is decided here;
what is in them stands in their own files.
"""

from __future__ import annotations

import fcntl
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradloc.compare.grid import base_key
from gradloc.compare.machine import machine, work_device
from gradloc.compare.material import LEARN_KINDS, Material, read_material, write_material
from gradloc.compare.scoring import Scorer
from gradloc.files import read_json, remove_leftovers, replacing_folder, write_json
from gradloc.layers import LayerMap
from gradloc.measurement import REFERENCE_LOSSES
from gradloc.models import load_model
from gradloc.probes import even_batches
from gradloc.profile import GradientProfile
from gradloc.trace import trace_gradients
from gradloc.training.corpus import pack_documents

if TYPE_CHECKING:
    from gradloc.compare.config import CompareConfig

OnStep = Callable[[int, int], None]
Note = Callable[[str], None]

_SCHEMA = "gradloc.compare.base"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the runs of one seed share.

    Args:
        folder: RUN/bases/seed-N.
        model_folder: the base model, for `load_model`.
        tokenizer: its tokenizer.
        material: texts and probes.
        profile: of the base model, against both references.
        trace_tokens: reference -> tokens that a trace against it sends through the model, padding
            included: each counts as a training token, as each takes a forward and a backward pass.
        trace_seconds: reference -> how long that takes.
    """

    folder: Path
    model_folder: Path
    tokenizer: Any
    material: Material
    profile: GradientProfile
    trace_tokens: Mapping[str, int]
    trace_seconds: Mapping[str, float]


def check_world(kind: str, options: Mapping[str, Any]) -> None:
    """Check a world's name and options.

    Raises:
        ValueError: an unknown world or option, or a value out of range.
    """
    _world(kind).check(options)


def check_places(
    kind: str, options: Mapping[str, Any], places: Mapping[str, str], *, folder: Path
) -> None:
    """Check, before anything is made, that a world finds what it needs.

    Args:
        kind: the world's name.
        options: its options, as `check_world` takes them.
        places: "model", "data" -> where they lie on this machine.
        folder: RUN, which may not be there yet.

    Raises:
        ValueError: a place is not given, or RUN was made with another model.
        OSError: nothing is there.
    """
    _world(kind).check_places(options, places, shared=_shared_folder(folder))


def prepare(
    config: CompareConfig,
    seed: int,
    folder: Path,
    *,
    places: Mapping[str, str],
    on_step: OnStep,
    note: Note,
) -> dict[str, Any]:
    """Make the base of a seed where it is missing: model, material, profile, scores.

    Several processes may ask at once: one makes it, the others wait.

    Args:
        config: of the comparison.
        seed: which world.
        folder: RUN.
        places: "model", "data" -> where they lie on this machine.
        on_step: called with (steps done, steps in all).
        note: takes a sentence for the user.

    Returns:
        The base's record.

    Raises:
        ValueError: the world cannot be made, such as one whose facts the model does not know.
    """
    target = base_folder(folder, seed)
    with _locked(folder / "locks" / f"base-{seed}"):
        remove_leftovers(target)
        if not (target / "base.json").is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing_folder(target) as temporary:
                _make(config, seed, folder, temporary, places=places, on_step=on_step, note=note)
    record = read_json(target / "base.json", schema=_SCHEMA, version=_VERSION)
    return dict(record["record"])


def open_study(config: CompareConfig, seed: int, folder: Path) -> Study:
    """Read the base of a seed that `prepare` made.

    Raises:
        FileNotFoundError: it did not.
    """
    return _opened(base_folder(folder, seed))


def base_folder(folder: Path, seed: int) -> Path:
    """Where the base of a seed lies in RUN."""
    return _shared_folder(folder) / f"seed-{seed}"


def _shared_folder(folder: Path) -> Path:
    """Where a world may keep what its seeds have in common."""
    return folder / "bases"


@functools.lru_cache(maxsize=2)
def _opened(folder: Path) -> Study:
    content = read_json(folder / "base.json", schema=_SCHEMA, version=_VERSION)
    model_folder = (folder / content["model"]).resolve()
    from transformers import AutoTokenizer

    return Study(
        folder=folder,
        model_folder=model_folder,
        tokenizer=AutoTokenizer.from_pretrained(model_folder),
        material=read_material(folder),
        profile=GradientProfile.load(folder / "profile.json"),
        trace_tokens=content["trace_tokens"],
        trace_seconds=content["trace_seconds"],
    )


def _make(
    config: CompareConfig,
    seed: int,
    folder: Path,
    target: Path,
    *,
    places: Mapping[str, str],
    on_step: OnStep,
    note: Note,
) -> None:
    world = _world(config.world.kind)
    started = time.perf_counter()
    made = world.make(
        config.world.options, seed, target, shared=_shared_folder(folder), places=places,
        block_size=config.training.block_size, on_step=on_step, note=note,
    )  # fmt: skip
    write_material(target, made.material)
    model, tokenizer = load_model((target / made.model).resolve())
    model.to(work_device())
    note("tracing the base model")
    profile, tokens, seconds = _trace(config, seed, model, tokenizer, made.material)
    profile.save(target / "profile.json")
    scorer = Scorer(tokenizer, made.material, config.training.block_size)
    record = {
        "kind": "base",
        "seed": seed,
        "key": base_key(config, seed),
        "scores": {"1": scorer.measured(model)},
        "validation": {"1": scorer.validation(model)},
        "relative": {
            loss: profile.with_reference(loss).relative_by_kind for loss in REFERENCE_LOSSES
        },
        "about": dict(made.about),
        "seconds": {"total": round(time.perf_counter() - started, 3)},
        "machine": machine(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    content = {
        "model": made.model,
        "trace_tokens": tokens,
        "trace_seconds": seconds,
        "record": record,
    }
    write_json(target / "base.json", content, schema=_SCHEMA, version=_VERSION)


def _trace(
    config: CompareConfig, seed: int, model: torch.nn.Module, tokenizer: Any, material: Material
) -> tuple[GradientProfile, dict[str, int], dict[str, float]]:
    """Trace against both references; and the tokens and seconds that each of them takes."""
    trace, block_size = config.trace, config.training.block_size
    layers = LayerMap.from_model(model)
    by_kind = {
        kind: [probe for probe in material.trace if probe.kind == kind][: trace.num_probes]
        for kind in LEARN_KINDS
    }

    def reference_batches(size: int) -> list[dict[str, torch.Tensor]]:
        rows = pack_documents(material.reference, tokenizer, block_size=block_size)
        count = min(len(rows), trace.num_probes) // size * size
        ids = torch.tensor([list(rows[index]["input_ids"]) for index in range(count)])
        return [
            {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part.clone()}
            for part in torch.split(ids, size)
        ]

    probes, reference, _ = even_batches(
        by_kind,
        reference_batches,
        tokenizer,
        batch_size=trace.batch_size,
        max_length=block_size,
    )
    num_probe_tokens = sum(
        batch["input_ids"].numel() for batches in probes.values() for batch in batches
    )
    num_reference_tokens = sum(batch["input_ids"].numel() for batch in reference)
    started = time.perf_counter()
    profile = trace_gradients(
        model,
        probes,
        reference,
        layers=layers,
        reference_loss=REFERENCE_LOSSES,
        seed=seed,
        progress=False,
    )
    elapsed = time.perf_counter() - started
    # Every kind has matched spans of its own, so that reference is read once a kind.
    num_readings = {"all": 1, "matched-spans": len(probes)}
    tokens = {
        loss: num_probe_tokens + num_readings[loss] * num_reference_tokens
        for loss in REFERENCE_LOSSES
    }
    per_token = elapsed / (num_probe_tokens + sum(num_readings.values()) * num_reference_tokens)
    seconds = {loss: round(per_token * tokens[loss], 3) for loss in REFERENCE_LOSSES}
    return profile, tokens, seconds


def _world(kind: str) -> Any:
    """The module of a world: `check`, `check_places`, and `make`, which gives a `MadeWorld`."""
    if kind == "toy":
        from gradloc.compare import toy_world

        return toy_world
    if kind == "english":
        from gradloc.compare import english_world

        return english_world
    raise ValueError(f"world kind={kind!r}: 'toy' or 'english'")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock; the operating system lets go of it when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
