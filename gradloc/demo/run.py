"""run_demo: the whole job on a synthetic world, from nothing to a report.

Makes the world, pretrains, traces, continues in several ways, and writes everything down; each part
is in the file named after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from gradloc.compare.machine import machine
from gradloc.demo.compare import compare_methods, measuring, trace_base
from gradloc.demo.findings import findings
from gradloc.demo.folder import clear_folder, open_folder, write_marker
from gradloc.demo.methods import FREEZE, METHODS, make_plan
from gradloc.demo.outcome import DemoResult, Outcome
from gradloc.demo.pretrain import make_base
from gradloc.demo.progress import Stages, step_bar
from gradloc.demo.report import write_report
from gradloc.demo.settings import FULL, QUICK, DemoSettings
from gradloc.demo.table import rich_table
from gradloc.files import write_json, write_text
from gradloc.layers import LayerMap
from gradloc.probes import TemporalWorld
from gradloc.training.model_guard import without_saving_bars

_NUM_STAGES = 5


def run_demo(output: Path, seed: int = 0, quick: bool = False) -> DemoResult:
    """Run the demo and print its table. It needs no network and uses the processor only.

    Args:
        output: the folder for everything that comes out (`gradloc.demo.folder` lists it). What an
            earlier demo wrote there is replaced, other files stay.
        seed: of the world, the model and the tracing.
        quick: some seconds instead of minutes, to see that everything runs; the numbers then mean
            nothing, and the report says so.

    Returns:
        Where the files are, and the numbers.

    Raises:
        ValueError: seed is negative; the folder holds files of something else; the base model did
            not learn its facts.
        OSError: the folder cannot be written.
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: at least 0")
    output = Path(output)
    open_folder(output)
    settings = QUICK if quick else FULL
    stages = Stages(Console(), _NUM_STAGES)
    clear_folder(output)
    about = {"seed": seed, "quick": quick, **asdict(settings)}
    write_marker(output, "running", about)
    with _one_thread(), without_saving_bars():
        outcome = _work(output, seed, quick, settings, stages)
        stages.begin("Writing the report")
        outcome.profile.save(output / "profile.json")
        outcome.profile.plot(output / "profile.png")
        write_json(output / "results.json", outcome.to_json(), schema="gradloc.results", version=1)
        report = output / "report.html"
        write_report(report, outcome, output / "profile.png")
    write_marker(output, "finished", about)
    console = stages.console
    console.print()
    console.print(rich_table(outcome))
    console.print()
    if quick:
        console.print("The quick form: the model knows next to nothing, the numbers mean nothing.")
    else:
        for sentence in findings(outcome):
            console.print(f"• {sentence}", highlight=False)
    console.print(
        f"\nReport: {report} (all of it in {math.ceil(stages.seconds)} s)",
        highlight=False,
        soft_wrap=True,
    )
    return DemoResult(output, report, outcome)


def _work(output: Path, seed: int, quick: bool, settings: DemoSettings, stages: Stages) -> Outcome:
    world = TemporalWorld(
        seed,
        num_entities=settings.num_entities,
        num_new_entities=settings.num_new_entities,
        num_objects=settings.num_objects,
    )
    stages.begin("Making a world whose facts change at a date")
    world.write(
        output / "world",
        old_tokens=1,  # written anew below, with another share of facts
        new_tokens=settings.new_tokens,
        text_documents=settings.text_documents,
    )
    texts = {
        "old": world.old_corpus(settings.old_tokens, share_facts=settings.share_facts),
        # Apart from the text that forgetting is measured on.
        "reference": world.text("old", 2 * settings.text_documents, seed=1),
    }
    for name, documents in texts.items():
        write_text(output / f"world/{name}.txt", "".join(text + "\n" for text in documents))
    num_old_facts = sum(fact.old is not None for fact in world.facts)
    changed = sum(fact.kind == "updated" for fact in world.facts)
    stages.note(
        f"{num_old_facts} facts, of which {changed} change; {len(world.facts) - num_old_facts} "
        "facts about people who appear"
    )

    stages.begin("Training a small GPT-2 on the old corpus until it knows the old facts")
    tokenizer = world.tokenizer()
    with step_bar(stages.console, "pretraining", settings.base_steps) as advance:
        base, accuracy, base_steps = make_base(
            world, tokenizer, settings, output, note=stages.note, advance=advance
        )

    stages.begin("Tracing: which layers react to new and changed facts")
    layers = LayerMap.from_model(base)
    profile = trace_base(base, layers, world, tokenizer, settings, output)
    chosen = make_plan(FREEZE, layers, profile, seed=0).active
    stages.note(f"{len(chosen)} of {len(layers)} layers react more than the mean")

    stages.begin(f"Continuing on the new corpus, in {len(METHODS)} ways")
    measure = measuring(world, tokenizer, settings, output)
    before = measure.scores(base)
    runs = compare_methods(base, layers, profile, measure, settings, output, stages)
    return Outcome(
        seed=seed,
        quick=quick,
        base=before,
        base_accuracy=accuracy,
        base_steps=base_steps,
        num_old_facts=num_old_facts,
        runs=tuple(runs),
        profile=profile,
        settings=asdict(settings),
        machine=machine(),
        seconds=stages.seconds,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Work on one thread: more gain little on so small a model, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
