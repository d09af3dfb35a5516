"""The English world of a comparison: a pretrained model, facts that it knows, facts that change.

The model is asked first; only facts that it answers right may be forgotten. TempLAMA, ECBD and
WikiText join where their files are given. Compares nothing.
"""

from __future__ import annotations

import fcntl
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradloc.compare.machine import work_device
from gradloc.compare.made_world import MadeWorld
from gradloc.compare.material import FORGET_KIND, LEARN_KINDS, Material, split_by_source
from gradloc.compare.world_options import read_options
from gradloc.files import read_json, replacing_folder, write_json
from gradloc.models import load_model
from gradloc.probes import EnglishWorld, Probe, ask, read_templama
from gradloc.probes.ecbd import defined_probes
from gradloc.probes.english_facts import FactKey

_SCHEMA = "gradloc.compare.known"
_TEAM_TEMPLATES = (
    "{player} has signed for {team}.",
    "{player} is now a player of {team}.",
    "The club of {player} is {team}.",
)
_PLAYS_FOR = " plays for _X_."


@dataclass(frozen=True, kw_only=True)
class EnglishOptions:
    """Sizes of the world, in countries, and of what joins it.

    Args:
        model: Hugging Face id of the base model, where `--model` does not say where it lies.
        num_updated: known countries whose facts change.
        num_new: invented countries.
        num_keep: known countries about which a method may replay sentences.
        num_validation: known countries for choices such as an interpolation weight.
        num_unchanged: known countries that are only measured.
        sentences: about changed and new facts, in the new corpus.
        keep_sentences: about kept facts, in the old corpus that may be replayed.
        keep_words: words of ordinary text in that corpus.
        reference_words: words of ordinary text to trace against.
        text_words: words of ordinary text to measure on.
        templama_facts: facts of TempLAMA, updated and unchanged each; 0 leaves it out.
        templama_dates: two dates of the file.
        ecbd_entities: new entities of ECBD; 0 leaves it out.
        passes: how often the corpus says what TempLAMA's and ECBD's probes ask, each time in
            another template where there is one.
    """

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    num_updated: int = 30
    num_new: int = 30
    num_keep: int = 20
    num_validation: int = 10
    num_unchanged: int = 30
    sentences: int = 800
    keep_sentences: int = 400
    keep_words: int = 12_000
    reference_words: int = 12_000
    text_words: int = 4_000
    templama_facts: int = 40
    templama_dates: str = "2019-Q2 2022-Q2"
    ecbd_entities: int = 40
    passes: int = 3


def check(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that the world does not have, or out of its range."""
    settings = read_options(EnglishOptions, options, world="english")
    for name in ("keep_words", "reference_words", "text_words", "passes", "sentences"):
        if getattr(settings, name) < 1:
            raise ValueError(f"world option {name}={getattr(settings, name)}: at least 1")
    if len(settings.templama_dates.split()) != 2:
        raise ValueError(
            f"world option templama_dates={settings.templama_dates!r}: two dates with a space "
            "between, such as '2019-Q2 2022-Q2'"
        )


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
    """Ask the model what it knows, once for all seeds, and draw the world of this one.

    Raises:
        ValueError: the model knows too few facts, or the data's folder is not given.
        OSError: model or data cannot be read.
    """
    settings = read_options(EnglishOptions, options, world="english")
    if "data" not in places:
        raise ValueError(
            "the English world measures on ordinary text: give --data FOLDER, which holds "
            "wikitext2/valid.txt (and, unless their options are 0, templama/ and ecbd/)"
        )
    data = Path(places["data"])
    known = _asked(settings, shared, places, note)
    world = EnglishWorld(
        seed,
        num_updated=settings.num_updated,
        num_new=settings.num_new,
        num_keep=settings.num_keep,
        num_validation=settings.num_validation,
        num_unchanged=settings.num_unchanged,
        known=known,
    )
    material = _material(world, settings, data, seed)
    about = {"known_facts": len(known), "facts_asked": len(world.real_facts)}
    return MadeWorld(material=material, model="../model", about=about)


def _asked(
    settings: EnglishOptions,
    shared: Path,
    places: Mapping[str, str],
    note: Callable[[str], None],
) -> set[FactKey]:
    """The facts that the model answers right; model and answers are kept beside the seeds."""
    target = shared / "model"
    shared.mkdir(parents=True, exist_ok=True)
    with (shared / "model.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if not (target / "known.json").is_file():
            note("loading the model and asking what it knows")
            model, tokenizer = load_model(places.get("model", settings.model))
            known = ask(model.to(work_device()), tokenizer, EnglishWorld().old_probes())
            with replacing_folder(target) as temporary:
                model.save_pretrained(temporary)  # type: ignore[operator]
                tokenizer.save_pretrained(temporary)
                content = {"known": [list(key) for key in sorted(known)]}
                write_json(temporary / "known.json", content, schema=_SCHEMA, version=1)
    found = read_json(target / "known.json", schema=_SCHEMA, version=1)["known"]
    return {(entity, relation) for entity, relation in found}


def _material(world: EnglishWorld, settings: EnglishOptions, data: Path, seed: int) -> Material:
    draw = random.Random(f"gradloc english {seed}")
    probes = world.probes()
    trace: list[Probe] = []
    measured: list[Probe] = []
    for kind in LEARN_KINDS:
        first, second = split_by_source(probes[kind], 2)
        trace += first
        measured += second
    validation = [replace(probe, kind=FORGET_KIND) for probe in probes["validation"]]
    more_text, more_probes = _joined(settings, data, draw)
    new = [*world.new_corpus(settings.sentences, seed=seed), *more_text]
    draw.shuffle(new)
    text = _ordinary_text(data, settings)
    keep = [*world.keep_corpus(settings.keep_sentences, seed=seed), *text["keep"]]
    draw.shuffle(keep)
    return Material(
        new=new,
        keep=keep,
        reference=text["reference"],
        text={"old": text["measured"]},
        trace=trace,
        validation=[*trace, *validation],
        measured=[*measured, *probes[FORGET_KIND], *more_probes],
        prompts=world.prompts(),
    )


def _joined(
    settings: EnglishOptions, data: Path, draw: random.Random
) -> tuple[list[str], list[Probe]]:
    """Training sentences and probes of TempLAMA and ECBD."""
    text: list[str] = []
    probes: list[Probe] = []
    if settings.templama_facts:
        old_date, new_date = settings.templama_dates.split()
        path = data / "templama/dynamic_templama_p54.jsonl"
        found = [
            probe
            for probe in read_templama(path, old_date, new_date)
            if probe.query is not None and probe.query.endswith(_PLAYS_FOR)
        ]
        for kind in ("updated", "unchanged"):
            members = [probe for probe in found if probe.kind == kind]
            chosen = draw.sample(members, min(settings.templama_facts, len(members)))
            probes += [replace(probe, kind=f"templama-{kind}") for probe in chosen]
            if kind == "updated":
                for probe in chosen:
                    assert probe.query is not None
                    words = {
                        "player": probe.query.removesuffix(_PLAYS_FOR),
                        "team": probe.span_texts[0],
                    }
                    templates = (
                        _TEAM_TEMPLATES[number % len(_TEAM_TEMPLATES)]
                        for number in range(settings.passes)
                    )
                    text += [template.format(**words) for template in templates]
    if settings.ecbd_entities:
        entities = defined_probes(data / "ecbd/ecbd_2020_2021_np.jsonl", kind="ecbd-new")
        names = draw.sample(sorted(entities), min(settings.ecbd_entities, len(entities)))
        text += names * settings.passes
        probes += [entities[name][0] for name in names]
        popular = defined_probes(data / "ecbd/ecbd_popular.jsonl", kind="ecbd-popular")
        probes += [members[0] for members in popular.values()]
    return text, probes


def _ordinary_text(data: Path, settings: EnglishOptions) -> dict[str, Sequence[str]]:
    """Three parts of WikiText that share no line, the same for every seed."""
    lines = [
        line.strip()
        for line in (data / "wikitext2/valid.txt").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.strip().startswith("=")
    ]
    parts: dict[str, Sequence[str]] = {}
    start = 0
    for name, wanted in (
        ("measured", settings.text_words),
        ("reference", settings.reference_words),
        ("keep", settings.keep_words),
    ):
        count, end = 0, start
        while count < wanted:
            if end == len(lines):
                raise ValueError(
                    f"{name}: the text has too few words for text_words={settings.text_words}, "
                    f"reference_words={settings.reference_words} and "
                    f"keep_words={settings.keep_words}: ask for fewer"
                )
            count += len(lines[end].split())
            end += 1
        parts[name] = lines[start:end]
        start = end
    return parts
