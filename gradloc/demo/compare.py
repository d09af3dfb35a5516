"""Traces the base model, continues it on the new corpus in every way, and scores each result.

What is traced and what is scored are kept apart: of every kind, every other fact is traced and the
rest scored, so that no method chooses its layers by what it is judged on.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradloc.compare.material import split_by_source
from gradloc.demo.methods import METHODS, Method, make_plan
from gradloc.demo.outcome import KINDS, PERIODS, Run, Scores
from gradloc.demo.pretrain import SCORE_BATCH
from gradloc.demo.progress import Stages, StepCallback, step_bar
from gradloc.demo.settings import DemoSettings
from gradloc.evaluate import evaluate_probes, evaluate_text
from gradloc.files import replacing_folder
from gradloc.layers import LayerMap
from gradloc.plan import LayerPlan
from gradloc.probes import Probe, TemporalWorld, even_batches
from gradloc.profile import GradientProfile
from gradloc.trace import trace_gradients
from gradloc.training.config import TrainConfig
from gradloc.training.corpus import packed_corpus, text_batches
from gradloc.training.train import train


@dataclass(frozen=True)
class Measuring:
    """What models are scored on.

    Args:
        tokenizer: the world's.
        probes: those that are not traced, of all kinds.
        text: "old", "new" -> batches of ordinary text.
        block_size: tokens a sequence.
    """

    tokenizer: Any
    probes: Sequence[Probe]
    text: Mapping[str, Sequence[Mapping[str, torch.Tensor]]]
    block_size: int

    def scores(self, model: torch.nn.Module) -> Scores:
        """Score a model; it stays as it is."""
        probes = evaluate_probes(
            model,
            self.tokenizer,
            self.probes,
            batch_size=SCORE_BATCH,
            max_length=self.block_size,
        )
        text = {period: evaluate_text(model, batches) for period, batches in self.text.items()}
        return Scores(probes, text)


def measuring(
    world: TemporalWorld, tokenizer: Any, settings: DemoSettings, output: Path
) -> Measuring:
    """Read what models are scored on."""
    return Measuring(
        tokenizer,
        [probe for kind in KINDS for probe in split_by_source(world.probes()[kind], 2)[1]],
        {
            period: text_batches(
                output / f"world/text_{period}.txt",
                tokenizer,
                block_size=settings.block_size,
                batch_size=settings.batch_size,
            )
            for period in PERIODS
        },
        settings.block_size,
    )


def trace_base(
    model: torch.nn.Module,
    layers: LayerMap,
    world: TemporalWorld,
    tokenizer: Any,
    settings: DemoSettings,
    output: Path,
) -> GradientProfile:
    """Trace the facts' kinds against ordinary text from before the date, by both references.

    Says on stderr what fills no batch and is left out.
    """
    probes, reference, notes = even_batches(
        {
            kind: split_by_source(world.probes()[kind], 2)[0][: settings.max_probes]
            for kind in KINDS
        },
        lambda size: text_batches(
            output / "world/reference.txt",
            tokenizer,
            block_size=settings.block_size,
            batch_size=size,
        ),
        tokenizer,
        batch_size=settings.trace_batch_size,
        max_length=settings.block_size,
    )
    for note in notes:
        print(f"tracing: {note}", file=sys.stderr)
    return trace_gradients(
        model,
        probes,
        reference,
        layers=layers,
        reference_loss=("all", "matched-spans"),
        seed=world.seed,
        progress=False,
    )


def compare_methods(
    base: torch.nn.Module,
    layers: LayerMap,
    profile: GradientProfile,
    measure: Measuring,
    settings: DemoSettings,
    output: Path,
    stages: Stages,
) -> list[Run]:
    """Continue a copy of the base model with every method, `settings.num_repeats` times.

    The methods take turns, so that a machine that slows down slows all of them. The plan and the
    model of each method's first run are saved.
    """
    corpus = packed_corpus(
        output / "world/new.txt", measure.tokenizer, block_size=settings.block_size
    )
    total = len(METHODS) * settings.num_repeats * settings.steps
    runs = []
    with (
        tempfile.TemporaryDirectory(prefix=".runs-", dir=output) as folder,
        step_bar(stages.console, "continuing", total) as advance,
    ):
        for repeat in range(settings.num_repeats):
            for method in METHODS:
                plan = make_plan(method, layers, profile, seed=repeat)
                model = copy.deepcopy(base)
                steps = StepCallback(advance)
                config = TrainConfig(
                    output=Path(folder) / f"{method.name}-{repeat}",
                    max_steps=settings.steps,
                    learning_rate=settings.learning_rate * method.lr_factor,
                    betas=(0.9, 0.99),
                    lr_scheduler="constant_with_warmup",
                    warmup_steps=max(1, settings.steps // 10),
                    batch_size=settings.batch_size,
                    seed=repeat,
                    save_steps=settings.steps,
                    device="cpu",
                    progress=False,
                )
                # A map knows the parameters of its own model; the copy has the same names.
                result = train(model, None, corpus, config, plan=plan, callbacks=[steps])
                run = Run(
                    method.name,
                    repeat,
                    plan.active,
                    _share(layers, plan),
                    result.optimizer_bytes,
                    steps.seconds,
                    measure.scores(model),
                )
                runs.append(run)
                stages.note(_line(method, run, settings.num_repeats))
                if repeat == 0:
                    plan.save(output / f"plan-{method.name}.json")
                    with replacing_folder(output / "models" / method.name) as target:
                        model.save_pretrained(target)  # type: ignore[operator]
                        measure.tokenizer.save_pretrained(target)
    return runs


def _share(layers: LayerMap, plan: LayerPlan) -> float:
    active = set(plan.active)
    total = sum(layer.num_elements for layer in layers)
    return sum(layer.num_elements for layer in layers if layer.name in active) / total


def _line(method: Method, run: Run, num_repeats: int) -> str:
    probes = run.scores.probes
    shares = ", ".join(f"{kind} {probes[kind].exact_match:.0%}" for kind in KINDS)
    return f"{method.title} {run.repeat + 1}/{num_repeats}: {shares} ({run.seconds:.0f} s)"
