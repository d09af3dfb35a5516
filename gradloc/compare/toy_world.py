"""The toy world of a comparison: a `TemporalWorld` a seed, and a small GPT-2 pretrained on it.

Everything in it is invented, so that what is known before is known exactly. Compares nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradloc.compare.made_world import MadeWorld
from gradloc.compare.material import FORGET_KIND, LEARN_KINDS, Material, split_by_source
from gradloc.compare.world_options import read_options
from gradloc.demo.pretrain import make_base
from gradloc.demo.settings import WorldSettings
from gradloc.files import write_text
from gradloc.probes import Probe, TemporalWorld


@dataclass(frozen=True, kw_only=True)
class ToyOptions(WorldSettings):
    """Sizes of the world and its model; the block size is that of the comparison.

    Args:
        share_changed: the share of old facts that change at the date.
        keep_tokens: words of old text and facts that a method may replay.
        share_keep_facts: the share of them in sentences about facts.
    """

    share_changed: float = 0.3
    keep_tokens: int = 40_000
    share_keep_facts: float = 0.5


def check(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that the world does not have, or out of its range."""
    settings = read_options(ToyOptions, options, world="toy", without=("block_size",))
    _world(settings, seed=0)


def check_places(options: Mapping[str, Any], places: Mapping[str, str], *, shared: Path) -> None:
    """Check nothing: this world makes all that it needs."""


def make(
    options: Mapping[str, Any],
    seed: int,
    folder: Path,
    *,
    shared: Path,
    places: Mapping[str, str],
    block_size: int,
    on_step: Callable[[int, int], None],
    note: Callable[[str], None],
) -> MadeWorld:
    """Draw the world of a seed, and pretrain its model into `folder / "model"`.

    Raises:
        ValueError: the model knows too few of the old facts.
    """
    settings = read_options(ToyOptions, {**options, "block_size": block_size}, world="toy")
    world = _world(settings, seed)
    tokenizer = world.tokenizer()
    documents = world.old_corpus(settings.old_tokens, share_facts=settings.share_facts)
    work = folder / "pretraining"
    (work / "world").mkdir(parents=True)
    write_text(work / "world/old.txt", "".join(text + "\n" for text in documents))
    num_steps = 0

    def advance() -> None:
        nonlocal num_steps
        num_steps += 1
        on_step(num_steps, settings.base_steps)

    note("pretraining the base model")
    _, accuracy, base_steps = make_base(
        world, tokenizer, settings, work, note=note, advance=advance, device="auto"
    )
    (work / "base").rename(folder / "model")
    shutil.rmtree(work)
    about = {"accuracy_on_old_facts": accuracy, "pretraining_steps": base_steps}
    return MadeWorld(material=_material(world, settings), model="model", about=about)


def _world(settings: ToyOptions, seed: int) -> TemporalWorld:
    return TemporalWorld(
        seed,
        num_entities=settings.num_entities,
        num_new_entities=settings.num_new_entities,
        num_objects=settings.num_objects,
        share_changed=settings.share_changed,
    )


def _material(world: TemporalWorld, settings: ToyOptions) -> Material:
    """Facts to learn: one half is traced and validated on, one measured; old facts: in thirds."""
    probes = world.probes()
    trace: list[Probe] = []
    measured: list[Probe] = []
    for kind in LEARN_KINDS:
        first, second = split_by_source(probes[kind], 2)
        trace += first
        measured += second
    keep, validation, unchanged = split_by_source(probes[FORGET_KIND], 3)
    kept = {probe.source for probe in keep}
    keep_facts = [fact for fact in world.facts if world.source_of(fact) in kept]
    count = settings.text_documents
    return Material(
        new=world.new_corpus(settings.new_tokens),
        keep=world.old_corpus(
            settings.keep_tokens, share_facts=settings.share_keep_facts, seed=1, facts=keep_facts
        ),
        # Apart from the text that forgetting is measured on, by their seeds.
        reference=world.text("old", 2 * count, seed=1),
        text={"old": world.text("old", count), "new": world.text("new", count)},
        trace=trace,
        validation=[*trace, *validation],
        measured=[*measured, *unchanged],
        prompts=world.prompts(keep_facts),
    )
