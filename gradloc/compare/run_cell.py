"""run_cell: one cell of the grid, from the base model to its record.

Every method has the same budget of tokens, and pays from it for all that goes through the model:
new rows, old rows, traces, what it generates. What it is scored on, and the choice of an
interpolation weight on the validation probes, cost no training tokens and are charged to nobody.
"""

from __future__ import annotations

import gc
import math
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradloc.compare.choose_plan import choose_plan
from gradloc.compare.machine import machine, work_device
from gradloc.compare.scoring import Scorer
from gradloc.compare.study import Note, OnStep, Study, open_study
from gradloc.layers import LayerMap
from gradloc.models import load_model
from gradloc.plan import LayerPlan
from gradloc.training.config import TrainConfig
from gradloc.training.corpus import pack_documents
from gradloc.training.interpolation import choose_alpha, weights_of
from gradloc.training.lora import add_lora, merge_lora
from gradloc.training.mixing import MixedRows, MixReview, Replay, mixed_rows
from gradloc.training.self_replay import SelfReplay, generate_replay
from gradloc.training.slow_weights import SlowWeightsCallback
from gradloc.training.train import TrainResult, train

if TYPE_CHECKING:
    from gradloc.compare.config import CompareConfig
    from gradloc.compare.grid import Cell
    from gradloc.compare.run_watch import RunWatch

_LOG_LINES = 25


def run_cell(
    cell: Cell,
    config: CompareConfig,
    folder: Path,
    *,
    places: Mapping[str, str],
    on_step: OnStep,
    note: Note,
) -> dict[str, Any]:
    """Train and score one cell.

    Args:
        cell: method, learning rate, seed and draw.
        config: of the comparison.
        folder: RUN, in which `prepare` has made the base of the seed.
        places: not used; the base holds all that a cell needs.
        on_step: called with (steps done, steps in all).
        note: takes a sentence for the user.

    Returns:
        The record of the cell, ready for JSON.

    Raises:
        ValueError: a budget that buys no step, or settings that do not fit the model.
    """
    started = time.perf_counter()
    study = open_study(config, cell.seed, folder)
    model, _ = load_model(study.model_folder)
    model.to(work_device())
    if torch.cuda.is_available():
        gc.collect()  # of the cell before this one
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    layers = LayerMap.from_model(model)
    plan = choose_plan(cell, study.profile, layers, reference_loss=config.trace.reference_loss)
    data = _data(cell, config, study, model, note)
    base = weights_of(model) if len(config.alphas) > 1 else None
    work = folder / "work" / cell.key
    shutil.rmtree(work, ignore_errors=True)  # of an attempt that was killed; the claim is ours
    from gradloc.compare.run_watch import RunWatch

    watch = RunWatch(on_step, data.num_steps)
    try:
        model, result, extra_bytes = _trained(cell, config, model, layers, plan, data, watch, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)

    peak_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    note("scoring")
    scoring = time.perf_counter()
    scores, validation, alpha = _scored(config, study, model, base)
    now = time.perf_counter()
    tokens_a_row = config.training.block_size
    tokens = {
        "new": data.rows.num_new_rows * tokens_a_row,
        "keep": data.rows.num_keep_rows * tokens_a_row,
        "trace": data.trace_tokens,
        "generate": data.generated_tokens,
    }
    return {
        "kind": "run",
        "key": cell.key,
        "cell": cell.name,
        "method": cell.method.name,
        "title": cell.method.title,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "draw": cell.draw,
        "scores": scores,
        "validation": validation,
        "alpha": alpha,
        "tokens": {**tokens, "total": sum(tokens.values()), "budget": config.budget_tokens},
        "epochs": [[epoch.num_new, epoch.num_keep] for epoch in data.rows.epochs],
        "num_steps": result.num_steps,
        "num_skipped_steps": result.num_skipped_steps,
        "seconds": {
            "train": round(sum(watch.step_seconds), 3),
            "step": round(statistics.median(watch.step_seconds), 4),
            "trace": data.trace_seconds,
            "generate": round(data.generate_seconds, 3),
            "score": round(now - scoring, 3),
            "total": round(now - started, 3),
        },
        "memory": {
            "optimizer_bytes": result.optimizer_bytes,
            "extra_bytes": extra_bytes,
            "gradient_bytes": watch.gradient_bytes,
            "peak_bytes": peak_bytes,
        },
        "losses": watch.losses,
        "plan": dict(plan.scales),
        "share_of_parameters": watch.num_trained / sum(layer.num_elements for layer in layers),
        "machine": machine(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True, kw_only=True)
class _Data:
    """What a cell trains on, and what it cost to come by."""

    rows: MixedRows
    num_steps: int
    trace_tokens: int
    trace_seconds: float
    generated_tokens: int
    generate_seconds: float


def _data(
    cell: Cell, config: CompareConfig, study: Study, model: torch.nn.Module, note: Note
) -> _Data:
    training, method = config.training, cell.method
    reference = method.localize.reference_loss or config.trace.reference_loss
    trace_tokens = study.trace_tokens[reference] if method.localize.traced else 0
    left = config.budget_tokens - trace_tokens
    new = pack_documents(study.material.new, study.tokenizer, block_size=training.block_size)
    mix, documents = method.mix, study.material.keep
    generated_tokens, generate_seconds = 0, 0.0
    if isinstance(mix, SelfReplay) and mix.ratio == 0:
        mix = None
    if isinstance(mix, SelfReplay):
        note("generating its own replay")
        started = time.perf_counter()
        # Each old row is paid for twice: when it is generated, and when it is trained on.
        share = mix.ratio / (1 + mix.ratio)
        wanted = int(left * share / (1 + share))
        generated = generate_replay(
            model,
            study.tokenizer,
            num_tokens=max(wanted, training.block_size),
            prompts=study.material.prompts,
            share_prompts=mix.share_facts if study.material.prompts else 0.0,
            temperature=mix.temperature,
            block_size=training.block_size,
            seed=cell.seed,
        )
        documents, mix = generated.documents, Replay(mix.ratio)
        generated_tokens = generated.num_generated_tokens + generated.num_prompt_tokens
        generate_seconds = time.perf_counter() - started
        left -= generated_tokens
    tokens_a_step = training.batch_size * training.block_size
    num_steps = left // tokens_a_step
    if num_steps < 1:
        raise ValueError(
            f"{cell.name}: of budget_tokens={config.budget_tokens} only {left} are left after "
            f"traces and generated text, and a step takes {tokens_a_step}: raise the budget, or "
            "trace fewer probes"
        )
    keep = None
    if mix is not None and documents:
        keep = pack_documents(documents, study.tokenizer, block_size=training.block_size)
    rows = mixed_rows(new, keep, mix=mix, num_rows=num_steps * training.batch_size, seed=cell.seed)
    if isinstance(mix, MixReview) and mix.ratio and mix.decay < 1 and len(rows.epochs) == 1:
        raise ValueError(
            f"{cell.name}: the budget ends within the first epoch of Mix-review ({len(new)} new "
            f"rows with {mix.num_keep(0, len(new))} old ones; {len(rows)} rows are trained on), so "
            "its decay would never act: use a smaller new corpus, or a larger budget"
        )
    return _Data(
        rows=rows,
        num_steps=num_steps,
        trace_tokens=trace_tokens,
        trace_seconds=study.trace_seconds[reference] if method.localize.traced else 0.0,
        generated_tokens=generated_tokens,
        generate_seconds=generate_seconds,
    )


def _trained(
    cell: Cell,
    config: CompareConfig,
    model: torch.nn.Module,
    layers: LayerMap,
    plan: LayerPlan,
    data: _Data,
    watch: RunWatch,
    work: Path,
) -> tuple[torch.nn.Module, TrainResult, int]:
    """The trained model, and the bytes that the method holds beside the optimizer's state."""
    training, method = config.training, cell.method
    slow = None if method.slow_weights is None else SlowWeightsCallback(method.slow_weights)
    # The watch is last: what slow weights cost is a part of a step.
    callbacks = [watch] if slow is None else [slow, watch]
    if method.lora is not None:
        adapted = add_lora(model, method.lora, plan, layers, seed=cell.seed)
        model, layers, plan = adapted.model, adapted.layers, adapted.plan
    settings = TrainConfig(
        output=work,
        max_steps=data.num_steps,
        learning_rate=cell.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        lr_scheduler="constant_with_warmup",
        warmup_steps=round(training.warmup_share * data.num_steps),
        batch_size=training.batch_size,
        seed=cell.seed,
        shuffle=False,
        recadam=method.recadam,
        save_steps=None,
        logging_steps=max(1, data.num_steps // _LOG_LINES),
        device="auto",
        progress=False,
    )
    result = train(model, None, data.rows, settings, layers=layers, plan=plan, callbacks=callbacks)
    extra_bytes = 0 if slow is None else slow.extra_bytes
    if method.lora is not None:
        model = merge_lora(model)
    return model, result, extra_bytes


def _scored(
    config: CompareConfig, study: Study, model: torch.nn.Module, base: Any
) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Scores and validation for each interpolation weight, and the weight that validation likes."""
    scorer = Scorer(study.tokenizer, study.material, config.training.block_size)
    scores: dict[str, Any] = {}
    validation: dict[str, Any] = {}

    def objective() -> float:
        name = f"{config.alphas[len(scores)]:g}"
        scores[name] = scorer.measured(model)
        validation[name] = scorer.validation(model)
        total = float(validation[name]["learn"] + validation[name]["forget"])
        return total if math.isfinite(total) else math.inf  # a run that diverged has a record too

    if base is None:
        objective()
        return scores, validation, 1.0
    return scores, validation, choose_alpha(model, base, objective, config.alphas).alpha
