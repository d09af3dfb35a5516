"""Models, probes and text for `profiles.py`: real ones, facts about countries, and toy worlds.

Reads only; what is made of them is decided there.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradloc.files import read_json, write_json
from gradloc.models import load_model
from gradloc.probes import EnglishWorld, Probe, ask, read_ecbd, read_spans, read_templama

DATES = ("2019-Q2", "2022-Q2")
KNOWN_SCHEMA = "gradloc.experiments.known"
# Of what lies beside a base, which may be more.
KINDS = ("updated", "new", "unchanged", "outdated")


@dataclass(frozen=True, kw_only=True)
class World:
    """What is traced for one seed.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        probes: kind -> probes about distinct facts or entities.
        text_files: ordinary text.
    """

    model: torch.nn.Module
    tokenizer: Any
    probes: Mapping[str, Sequence[Probe]]
    text_files: Sequence[Path]


def real_world(model_name: str, data: Path, seed: int) -> World:
    """A pretrained model with TempLAMA, ECBD (one probe an entity) and WikiText."""
    path = data / "templama/dynamic_templama_p54.jsonl"
    by_kind: dict[str, list[Probe]] = {
        kind: [] for kind in ("updated", "new", "outdated", "unchanged", "new-facts", "popular")
    }
    for probe in read_templama(path, *DATES, include_outdated=True):
        # ECBD's entities are what the paper calls new; TempLAMA's new facts are another thing.
        by_kind["new-facts" if probe.kind == "new" else probe.kind].append(probe)
    for kind, name in (("new", "ecbd_2020_2021_np"), ("popular", "ecbd_popular")):
        file = data / f"ecbd/{name}.jsonl"
        by_kind[kind] = _one_an_entity(file, read_ecbd(file, kind), seed)
    model, tokenizer = load_model(model_name)
    return World(
        model=model,
        tokenizer=tokenizer,
        probes=by_kind,
        text_files=[data / "wikitext2/valid.txt"],
    )


def _one_an_entity(path: Path, probes: Sequence[Probe], seed: int) -> list[Probe]:
    """Probes of one entity are no independent draws: one of each is kept."""
    lines = path.read_text(encoding="utf-8").splitlines()
    order = list(probes)
    random.Random(f"profiles {seed} {path.name}").shuffle(order)
    chosen: dict[str, Probe] = {}
    for probe in order:
        line = int(probe.source.rsplit(":", 1)[1])
        chosen.setdefault(json.loads(lines[line - 1])["ent_str"], probe)
    return list(chosen.values())


def english_world(model_name: str, data: Path, known_file: Path, seed: int) -> World:
    """A pretrained model with facts about countries that it answers right, changed and invented.

    Updated facts are traced with their new and, as "outdated", with their old objects. The kinds
    differ in what the model knows and in little else: the templates are the same, and all objects
    are real ones of the same relations.

    Args:
        model_name: as `load_model` takes it.
        data: the folder that holds WikiText.
        known_file: where the model's answers are kept, which do not depend on the seed.
        seed: of the world.
    """
    model, tokenizer = load_model(model_name)
    countries = dict.fromkeys(("num_updated", "num_new", "num_unchanged"), 50)
    nobody = {"num_keep": 0, "num_validation": 0}
    if not known_file.is_file():
        everything = EnglishWorld(seed, **dict.fromkeys([*countries, *nobody], 0)).old_probes()
        known = sorted(ask(model, tokenizer, everything))
        content = {"known": [list(key) for key in known]}
        write_json(known_file, content, schema=KNOWN_SCHEMA, version=1)
    known = [tuple(key) for key in read_json(known_file, schema=KNOWN_SCHEMA, version=1)["known"]]
    world = EnglishWorld(seed, known=known, **countries, **nobody)
    draw = random.Random(f"profiles {seed} facts")
    facts: dict[str, list[list[Probe]]] = {}
    for kind, probes in world.probes().items():
        by_country: dict[str, list[list[Probe]]] = {}
        for source, members in itertools.groupby(probes, lambda probe: probe.source):
            by_country.setdefault(source.split("/")[0], []).append(list(members))
        if by_country:
            # One fact a country: its facts are no independent draws.
            facts[kind] = [draw.choice(of_country) for of_country in by_country.values()]
    return World(
        model=model,
        tokenizer=tokenizer,
        probes=_same_sentences(facts, draw),
        text_files=[data / "wikitext2/valid.txt"],
    )


def base_world(folder: Path, seed: int) -> World:
    """A base model that `gradloc compare` made, with the probes and the text that lie beside it."""
    base = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    model, tokenizer = load_model((folder / base["model"]).resolve())
    facts: dict[str, list[list[Probe]]] = {}
    seen: set[str] = set()
    for name in ("trace", "validation", "measured"):
        rows = [probe for probe in read_spans(folder / f"{name}.jsonl") if probe.kind in KINDS]
        # The templates of one fact follow one another.
        for _, members in itertools.groupby(rows, lambda probe: (probe.kind, probe.span_texts)):
            fact = list(members)
            if not seen.intersection(probe.text for probe in fact):
                facts.setdefault(fact[0].kind, []).append(fact)
            seen.update(probe.text for probe in fact)
    probes = _same_sentences(facts, random.Random(f"profiles {seed} facts"))
    return World(
        model=model,
        tokenizer=tokenizer,
        probes=probes,
        text_files=[folder / "reference.txt", folder / "text_old.txt"],
    )


def _same_sentences(
    facts: Mapping[str, Sequence[Sequence[Probe]]], draw: random.Random
) -> dict[str, list[Probe]]:
    """One probe a fact, so that probes are independent draws, in the same templates in each kind.

    Else a kind with more facts of one relation would have that relation's profile.
    """
    by_frame: dict[str, dict[tuple[str, ...], list[Sequence[Probe]]]] = {}
    for kind, members in facts.items():
        for fact in members:
            frames = tuple(_frame(probe) for probe in fact)
            by_frame.setdefault(kind, {}).setdefault(frames, []).append(fact)
    shared = [
        frames
        for frames in next(iter(by_frame.values()))
        if all(frames in groups for groups in by_frame.values())
    ]
    chosen: dict[str, list[Probe]] = {kind: [] for kind in by_frame}
    for frames in shared:
        count = min(len(groups[frames]) for groups in by_frame.values())
        for kind, groups in by_frame.items():
            for number, fact in enumerate(draw.sample(groups[frames], count)):
                chosen[kind].append(fact[number % len(fact)])
    return chosen


def _frame(probe: Probe) -> str:
    """The template, as far as it can be told: the words that are no names."""
    return " ".join(word for word in (probe.query or probe.text).split() if word.islower())
