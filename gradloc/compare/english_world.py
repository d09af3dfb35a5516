"""The English world of a comparison: a pretrained model, facts that it knows, facts that change.

The model is asked first; only facts that it answers right may be forgotten, which other sentences
than those asked then measure. TempLAMA and ECBD join unless their options are 0, and the text that
may be replayed comes from another source than the text to measure on. Compares nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gradloc.compare.machine import work_device
from gradloc.compare.made_world import MadeWorld
from gradloc.compare.material import FORGET_KIND, LEARN_KINDS, Material, split_by_source
from gradloc.compare.world_options import read_options
from gradloc.files import read_json, remove_leftovers, replacing_folder, write_json
from gradloc.models import load_model
from gradloc.probes import EnglishWorld, Probe, ask, read_templama
from gradloc.probes.ecbd import defined_probes

_SCHEMA = "gradloc.compare.known"
_VERSION = 2  # 1 did not say which model had been asked, and asked it in every template
_TEXT_FILE = "wikitext2/valid.txt"
_TEMPLAMA_FILE = "templama/dynamic_templama_p54.jsonl"
_ECBD_FILES = ("ecbd/ecbd_2020_2021_np.jsonl", "ecbd/ecbd_popular.jsonl")
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
        keep_words: at most that many words of other text in that corpus: the sentences that
            introduce entities of ECBD which are neither trained on nor measured. Only without ECBD
            it is that many words of ordinary text, other lines of the file that is measured on.
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


def check_places(options: Mapping[str, Any], places: Mapping[str, str], *, shared: Path) -> None:
    """Check that model and data are there, and the model is the one of earlier runs.

    Raises:
        ValueError: the data's folder is not given, the place of the model holds none, or `shared`
            was made with another.
        OSError: no such folder or file.
    """
    settings = read_options(EnglishOptions, options, world="english")
    if "data" not in places:
        raise ValueError(
            "the English world measures on ordinary text: give --data FOLDER, which holds "
            f"{_TEXT_FILE} (and, unless their options are 0, templama/ and ecbd/)"
        )
    data = Path(places["data"]).expanduser()
    if not data.is_dir():
        raise FileNotFoundError(f"data={str(data)!r}: no such folder")
    for option, names in (
        ("text_words", (_TEXT_FILE,)),
        ("templama_facts", (_TEMPLAMA_FILE,)),
        ("ecbd_entities", _ECBD_FILES),
    ):
        for name in names:
            if getattr(settings, option) and not (data / name).is_file():
                remedy = "" if option == "text_words" else f", or set the world's {option} to 0"
                raise FileNotFoundError(
                    f"data={str(data)!r} has no file {name}: put it there{remedy}"
                )
    name = places.get("model", settings.model)
    if (shared / "model/known.json").is_file():
        _check_same_model(shared / "model", name)
    else:
        _check_model_place(name)


def _check_model_place(name: str) -> None:
    """Raise what loading would, as far as a look tells; an id is left to the hub."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"model={name!r}: the folder has no config.json, so it holds no model")
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise ValueError(f"model={name!r} is a file, but not a .gguf file")
    reads_as_path = name.startswith((".", "~", "/")) or name.count("/") > 1
    if not path.exists() and (reads_as_path or path.suffix.lower() == ".gguf"):
        raise FileNotFoundError(f"model={name!r}: no such file or folder")


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

    Each fact is asked for in its first template only, and forgetting is measured in the others:
    facts picked for being answered right would else look forgotten wherever the model was lucky.

    Raises:
        ValueError: the model knows too few facts, another model was asked before, or the data's
            folder is not given.
        OSError: model or data cannot be read.
    """
    check_places(options, places, shared=shared)
    settings = read_options(EnglishOptions, options, world="english")
    data = Path(places["data"]).expanduser()
    found = _asked(settings, shared, places, note)
    known = {(entity, relation) for entity, relation in found["known"]}
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
    about = {
        "known_facts": len(known),
        "facts_asked": len(world.real_facts),
        "model": found["model"],
        "model_digest": found["model_digest"],
    }
    return MadeWorld(material=material, model="../model", about=about)


def _asked(
    settings: EnglishOptions,
    shared: Path,
    places: Mapping[str, str],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Which model it was and what it answers right; both are kept beside the seeds."""
    target = shared / "model"
    name = places.get("model", settings.model)
    shared.mkdir(parents=True, exist_ok=True)
    with (shared / "model.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        remove_leftovers(target)
        if not (target / "known.json").is_file():
            note("loading the model and asking what it knows")
            model, tokenizer = load_model(name)
            digest = model_digest(model)
            questions, _ = _by_template(EnglishWorld().old_probes())
            known = ask(model.to(work_device()), tokenizer, questions)
            with replacing_folder(target) as temporary:
                model.save_pretrained(temporary)  # type: ignore[operator]
                tokenizer.save_pretrained(temporary)
                path = Path(name).expanduser()
                content = {
                    # Where it lies on this machine is nobody's business, and differs on the next.
                    "model": path.name if path.exists() else name,
                    "model_digest": digest,
                    "known": [list(key) for key in sorted(known)],
                }
                write_json(temporary / "known.json", content, schema=_SCHEMA, version=_VERSION)
    # Once more: another process may have made it, of another model, while this one waited.
    _check_same_model(target, name)
    return read_json(target / "known.json", schema=_SCHEMA, version=_VERSION)


def _check_same_model(target: Path, name: str) -> None:
    """Raise ValueError if the model kept there is another; it may have moved under its name."""
    found = read_json(target / "known.json", schema=_SCHEMA, version=_VERSION)
    run = str(target.parents[1])
    if found["version"] < _VERSION:
        raise ValueError(
            f"output={run!r} was begun by an earlier gradloc, which asked its model otherwise: "
            "choose another --output"
        )
    if found["model"] != name and Path(found["model"]).name != Path(name).name:
        raise ValueError(
            f"model={name!r}: output={run!r} was made with {found['model']!r}. Give that with "
            "--model, or choose another --output"
        )


def model_digest(model: torch.nn.Module) -> str:
    """Digest what a model is: the names, types, shapes and bytes of its parameters.

    Returns:
        SHA-256 in hexadecimal: the same for equal models, wherever they lie.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        content = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()


def _by_template(probes: Sequence[Probe]) -> tuple[list[Probe], list[Probe]]:
    """Each fact's first probe, and all its others."""
    first: dict[str, Probe] = {}
    others = []
    for probe in probes:
        if probe.source in first:
            others.append(probe)
        else:
            first[probe.source] = probe
    return list(first.values()), others


def _material(world: EnglishWorld, settings: EnglishOptions, data: Path, seed: int) -> Material:
    draw = random.Random(f"gradloc english {seed}")
    probes = world.probes()
    trace: list[Probe] = []
    measured: list[Probe] = []
    for kind in LEARN_KINDS:
        first, second = split_by_source(probes[kind], 2)
        trace += first
        measured += second
    # The first template chose the facts that count as known.
    _, validation = _by_template(probes["validation"])
    _, unchanged = _by_template(probes[FORGET_KIND])
    joined = _joined(settings, data, draw)
    new = [*world.new_corpus(settings.sentences, seed=seed), *joined.new]
    draw.shuffle(new)
    text = _ordinary_text(data, settings)
    keep = [
        *world.keep_corpus(settings.keep_sentences, seed=seed),
        *(joined.keep if settings.ecbd_entities else text["keep"]),
    ]
    draw.shuffle(keep)
    return Material(
        new=new,
        keep=keep,
        reference=text["reference"],
        text={"old": text["measured"]},
        trace=trace,
        validation=[*trace, *(replace(probe, kind=FORGET_KIND) for probe in validation)],
        measured=[*measured, *unchanged, *joined.probes],
        prompts=world.prompts(),
    )


@dataclass(frozen=True, kw_only=True)
class _Joined:
    """What TempLAMA and ECBD give: sentences to train on and to replay, probes to measure."""

    new: list[str]
    keep: list[str]
    probes: list[Probe]


def _joined(settings: EnglishOptions, data: Path, draw: random.Random) -> _Joined:
    text: list[str] = []
    keep: list[str] = []
    probes: list[Probe] = []
    if settings.templama_facts:
        old_date, new_date = settings.templama_dates.split()
        path = data / _TEMPLAMA_FILE
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
        entities = defined_probes(data / _ECBD_FILES[0], kind="ecbd-new")
        popular = defined_probes(data / _ECBD_FILES[1], kind="ecbd-popular")
        # What is measured as long known is neither taught nor replayed.
        unused = sorted(entities.keys() - popular.keys())
        names = draw.sample(unused, min(settings.ecbd_entities, len(unused)))
        text += names * settings.passes
        probes += [entities[name][0] for name in names]
        probes += [members[0] for members in popular.values()]
        others = [name for name in unused if name not in names]
        draw.shuffle(others)
        keep = _at_most(others, settings.keep_words)
        if not keep:
            raise ValueError(
                f"ecbd_entities={settings.ecbd_entities}, keep_words={settings.keep_words}: no "
                f"sentence of the {len(entities)} entities is left to replay: choose fewer "
                "entities or more words"
            )
    return _Joined(new=text, keep=keep, probes=probes)


def _at_most(documents: Sequence[str], num_words: int) -> list[str]:
    """As many of the first documents as have no more words together."""
    taken = []
    for document in documents:
        num_words -= len(document.split())
        if num_words < 0:
            break
        taken.append(document)
    return taken


def _ordinary_text(data: Path, settings: EnglishOptions) -> dict[str, Sequence[str]]:
    """Parts of WikiText that share no line, the same for every seed."""
    lines = [
        line.strip()
        for line in (data / _TEXT_FILE).read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.strip().startswith("=")
    ]
    sizes = {"measured": settings.text_words, "reference": settings.reference_words}
    if not settings.ecbd_entities:
        sizes["keep"] = settings.keep_words
    parts: dict[str, Sequence[str]] = {}
    start = 0
    for name, wanted in sizes.items():
        count, end = 0, start
        while count < wanted:
            if end == len(lines):
                raise ValueError(
                    f"{_TEXT_FILE} has too few words for text_words={settings.text_words}, "
                    f"reference_words={settings.reference_words} and, without ECBD, "
                    f"keep_words={settings.keep_words}: ask for fewer"
                )
            count += len(lines[end].split())
            end += 1
        parts[name] = lines[start:end]
        start = end
    return parts
