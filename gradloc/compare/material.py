"""Material: the texts and probes of one seed of a world, and the files that hold them.

What is trained on, replayed, traced, validated and measured is kept apart here, once, for every
method. Trains and scores nothing; the worlds (`toy_world`, `english_world`, `files_world`) fill it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradloc.files import write_text
from gradloc.probes import Probe
from gradloc.probes.spans import read_spans, write_spans

LEARN_KINDS = ("updated", "new")
"""Kinds of probes whose mean nll is what a method *learns*."""
FORGET_KIND = "unchanged"
"""The kind whose nll shows what it *forgets*."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """Texts are documents, probes have one of the kinds above or a name of their own.

    The facts behind `trace` and `validation` are other facts than those behind `measured`, and so
    is the text of `reference` and `keep` than that of `text`.

    Args:
        new: what every method continues on.
        keep: old text and old facts that a method may replay; may be empty.
        reference: ordinary old text to trace against.
        text: "old" and perhaps "new" -> ordinary text to measure on.
        trace: probes of the kinds "updated" and "new".
        validation: probes of all three kinds, for choices such as an interpolation weight.
        measured: probes of all three kinds and perhaps of others.
        prompts: beginnings of sentences about old facts, for a model that generates its own replay.
    """

    new: Sequence[str]
    keep: Sequence[str]
    reference: Sequence[str]
    text: Mapping[str, Sequence[str]]
    trace: Sequence[Probe]
    validation: Sequence[Probe]
    measured: Sequence[Probe]
    prompts: Sequence[str] = ()

    def __post_init__(self) -> None:
        if "old" not in self.text:
            raise ValueError("text has no 'old': ordinary old text shows what is forgotten")
        for name, needed in (
            ("trace", LEARN_KINDS),
            ("validation", (*LEARN_KINDS, FORGET_KIND)),
            ("measured", (*LEARN_KINDS, FORGET_KIND)),
        ):
            found = {probe.kind for probe in getattr(self, name)}
            if missing := [kind for kind in needed if kind not in found]:
                raise ValueError(f"{name} has no probes of kind {', '.join(missing)}")
        known = {probe.text for probe in self.measured}
        for name in ("trace", "validation"):
            if shared := known.intersection(probe.text for probe in getattr(self, name)):
                raise ValueError(
                    f"{name} and measured share {len(shared)} probes, such as "
                    f"{sorted(shared)[0]!r}: what shapes a choice may not judge it"
                )


def write_material(folder: Path, material: Material) -> None:
    """Write a file a part into a folder that exists."""
    for name in ("new", "keep", "reference", "prompts"):
        _write_lines(folder / f"{name}.txt", getattr(material, name))
    for name, documents in material.text.items():
        _write_lines(folder / f"text_{name}.txt", documents)
    for name in ("trace", "validation", "measured"):
        write_spans(folder / f"{name}.jsonl", getattr(material, name))


def read_material(folder: Path) -> Material:
    """Read what `write_material` wrote."""
    lines = {
        path.stem: tuple(path.read_text(encoding="utf-8").splitlines())
        for path in folder.glob("*.txt")
    }
    probes = {
        name: tuple(read_spans(folder / f"{name}.jsonl"))
        for name in ("trace", "validation", "measured")
    }
    text = {
        name.removeprefix("text_"): documents
        for name, documents in sorted(lines.items())
        if name.startswith("text_")
    }
    return Material(
        new=lines["new"],
        keep=lines["keep"],
        reference=lines["reference"],
        prompts=lines["prompts"],
        text=text,
        **probes,
    )


def split_by_source(probes: Sequence[Probe], parts: int) -> list[list[Probe]]:
    """Deal facts out: every probe of a fact (`Probe.source`) goes to the same of `parts` lists.

    Dealt in a random order, which depends on the facts alone: worlds list their facts relation by
    relation or entity by entity, and every part should have some of each.
    """
    facts = list(dict.fromkeys(probe.source for probe in probes))
    random.Random(f"gradloc split {len(facts)}").shuffle(facts)
    place = {source: index % parts for index, source in enumerate(facts)}
    split: list[list[Probe]] = [[] for _ in range(parts)]
    for probe in probes:
        split[place[probe.source]].append(probe)
    return split


def _write_lines(path: Path, documents: Iterable[str]) -> None:
    """A document a line: line ends inside become spaces."""
    write_text(path, "".join(" ".join(text.split()) + "\n" for text in documents))
