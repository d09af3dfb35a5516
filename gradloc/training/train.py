"""train: continue the training of a causal language model on the layers of a plan.

Hugging Face Trainer runs the loop, the checkpoints and the resuming; this file chooses the plan,
starts the Trainer and saves what came out. Reading corpora is in `gradloc.training.corpus`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradloc.files import replacing_folder, write_json
from gradloc.layers import LayerMap
from gradloc.plan import LayerPlan
from gradloc.policies import Policy
from gradloc.profile import GradientProfile
from gradloc.training import run_folder
from gradloc.training.checkpoints import is_finished, remove_later_checkpoints
from gradloc.training.config import TrainConfig
from gradloc.training.model_guard import keeping_flags, keeping_use_cache, without_saving_bars
from gradloc.training.policy_name import policy_name
from gradloc.training.ranks import wait_for_all
from gradloc.training.tracing import Tracing, check_choice

if TYPE_CHECKING:
    from gradloc.training.callback import LocalizationCallback

__all__ = ["Tracing", "TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run produced.

    Args:
        folder: the trained model and tokenizer, for `from_pretrained`; not there with
            `save_steps=None`.
        plan: the plan in force at the end.
        profile: the profile that it came from, if the run had or traced one.
        num_steps: optimizer steps of the whole run, resumed parts included.
        num_skipped_steps: steps left out because a gradient was not finite, in the whole run.
        final_loss: the training loss of the last log line, in nats a token; None without any.
        optimizer_bytes: bytes of AdamW's moments at the end.
        seconds: of training in this process, with tracing and checkpoints.
    """

    folder: Path
    plan: LayerPlan
    profile: GradientProfile | None
    num_steps: int
    num_skipped_steps: int
    final_loss: float | None
    optimizer_bytes: int
    seconds: float


def train(
    model: torch.nn.Module,
    tokenizer: Any,
    dataset: Any,
    config: TrainConfig,
    *,
    layers: LayerMap | None = None,
    plan: LayerPlan | None = None,
    policy: Policy | None = None,
    profile: GradientProfile | None = None,
    tracing: Tracing | None = None,
    resume: bool = False,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
    callbacks: Iterable[Any] = (),
) -> TrainResult:
    """Train the layers of a plan.

    The plan is `plan`, or what `policy` makes of `profile`, or of a profile that is traced first.
    A policy whose `retrace_every` is set chooses again during the run, and traces again if it needs
    a profile. The model is trained in place, on the device that the Trainer chooses.

    Args:
        model: a causal language model of transformers.
        tokenizer: saved beside the model; None: not.
        dataset: rows of `input_ids` and `labels` of one length, such as `packed_corpus` makes.
        config: settings of the run.
        layers: the model's layers; None: `LayerMap.from_model(model)`.
        plan: a plan that stays.
        policy: chooses the plan; not together with `plan`.
        profile: for the policy; None: traced where the policy needs one.
        tracing: what to trace with, where something is traced.
        resume: go on from the last complete checkpoint in `config.output`, with its plan. The
            settings must be the earlier ones; the parameters at the end are those of a run that was
            never interrupted.
        overwrite: remove an earlier run in `config.output` first.
        about: what training.json should also say, such as the name of the model.
        callbacks: more callbacks for the Trainer.

    Returns:
        What came out; the files are described in `gradloc.training.run_folder`.

    Raises:
        ValueError: neither plan nor policy or both; a plan, profile or policy that does not fit;
            `config.output` holds a run already, or nothing to resume; settings that differ from
            those of the run to resume. Nothing has been changed then.
        OSError: `config.output` cannot be written.
    """
    layer_map = LayerMap.from_model(model) if layers is None else layers
    check_choice(layer_map, plan, policy, profile, tracing)
    output = Path(config.output)
    checkpoint = run_folder.open_run_folder(output, resume=resume, overwrite=overwrite)
    settings = {
        **config.decisive(),
        "choice": policy_name(policy) if plan is None else f"plan: {plan.policy}",
        "layers": _digest("\n".join(layer_map.names).encode()),
        "corpus": _dataset_digest(dataset),
    }
    if checkpoint is not None:
        run_folder.check_settings(output, settings)

    from gradloc.training.callback import PLAN_FILE, LocalizationCallback
    from gradloc.training.localized_trainer import training_arguments

    started = time.monotonic()
    localization = LocalizationCallback(
        model,
        plan=plan,
        policy=policy,
        profile=profile,
        tracing=tracing,
        layers=layer_map,
        log_layer_norms=config.log_layer_norms,
        freeze_requires_grad=config.freeze_requires_grad,
    )
    arguments = training_arguments(config)
    model.to(arguments.device)
    if checkpoint is None:
        localization.choose(arguments)
    elif plan is not None and (checkpoint / PLAN_FILE).is_file():
        saved = LayerPlan.load(checkpoint / PLAN_FILE)
        if dict(plan.scales) != dict(saved.scales):
            raise ValueError(
                f"the plan given differs from that of {str(checkpoint)!r}: resume with the same one"
            )

    with keeping_flags(model), without_saving_bars():
        with keeping_use_cache(model):
            trainer = _make_trainer(
                model, tokenizer, dataset, config, arguments, localization, callbacks
            )
            # From here on files change; what was wrong with the arguments has been said, in every
            # process: none may find the files of this run where it looks for those of another.
            wait_for_all()
            if arguments.should_save:
                if checkpoint is not None:
                    remove_later_checkpoints(checkpoint)
                else:
                    if overwrite:
                        run_folder.clear_run_folder(output)
                    run_folder.start_record(output, settings, about or {})
                    _save_choice(output, localization)
            if checkpoint is not None and is_finished(checkpoint):
                trainer.restore_finished(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        seconds = time.monotonic() - started
        return _finish(trainer, tokenizer, output, settings, about or {}, seconds)


def _make_trainer(
    model: torch.nn.Module,
    tokenizer: Any,
    dataset: Any,
    config: TrainConfig,
    arguments: Any,
    localization: LocalizationCallback,
    callbacks: Iterable[Any],
) -> Any:
    from transformers import PrinterCallback

    from gradloc.training.localized_trainer import LocalizedTrainer, collate_blocks

    trainer = LocalizedTrainer(
        localization=localization,
        options=config.optimizer_options(),
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate_blocks,
        tokenizer=tokenizer,
        callbacks=list(callbacks),
    )
    if not config.progress:
        trainer.remove_callback(PrinterCallback)
    return trainer


def _finish(
    trainer: Any,
    tokenizer: Any,
    output: Path,
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
    seconds: float,
) -> TrainResult:
    from gradloc.training.trainer_optimizer import localized_optimizer

    localization = trainer.localization
    optimizer = localized_optimizer(trainer.optimizer)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = TrainResult(
        folder=output / "final",
        plan=localization.plan,
        profile=localization.profile,
        num_steps=trainer.state.global_step,
        num_skipped_steps=optimizer.num_skipped_steps,
        final_loss=log[-1]["loss"] if log else None,
        optimizer_bytes=optimizer.state_bytes(),
        seconds=seconds,
    )
    if not trainer.is_world_process_zero():
        return result
    _save_choice(output, localization)
    if trainer.args.save_strategy != "no":
        with replacing_folder(result.folder) as folder:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    content = {
        "status": "finished",
        "settings": dict(settings),
        "about": dict(about),
        "num_steps": result.num_steps,
        "num_skipped_steps": result.num_skipped_steps,
        "num_layers": len(result.plan.scales),
        "active_layers": list(result.plan.active),
        "optimizer_bytes": result.optimizer_bytes,
        "seconds": round(seconds, 3),
        # JSON has neither nan nor inf: null says that a value was not finite.
        "log": [
            {key: value if abs(value) < float("inf") else None for key, value in entry.items()}
            for entry in log
        ],
    }
    write_json(
        output / "training.json", content, schema=run_folder.SCHEMA, version=run_folder.VERSION
    )
    return result


def _save_choice(output: Path, localization: LocalizationCallback) -> None:
    localization.plan.save(output / "plan.json")
    if localization.profile is not None:
        localization.profile.save(output / "profile.json")


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:16]


def _dataset_digest(dataset: Any) -> str:
    """The size and up to 64 rows, evenly spread: enough to notice another corpus."""
    count = len(dataset)
    rows = [dataset[index]["input_ids"] for index in range(0, count, max(1, count // 64))]
    return f"{count} blocks, {_digest(repr([[int(t) for t in row] for row in rows]).encode())}"
