"""LocalizedTrainer: Hugging Face Trainer that steps with LocalizedAdamW. The loop stays Trainer's.

Overrides how the optimizer is made and which gradient norm is logged, and nothing else.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import Trainer, TrainerState, TrainingArguments

from gradloc.layers import LayerMap
from gradloc.optim import LocalizedAdamW
from gradloc.plan import LayerPlan
from gradloc.training.callback import LocalizationCallback
from gradloc.training.config import TrainConfig


class LocalizedTrainer(Trainer):  # type: ignore[misc]  # transformers has no types
    """Trainer with a layer plan.

    Args:
        localization: holds the layers and the plan; becomes one of the callbacks.
        max_grad_norm: clip the norm over the active layers' gradients to it; None: don't.
        freeze_requires_grad: set requires_grad=False for frozen layers once the optimizer exists.
            Ignored with a policy that chooses again: Trainer's groups, DDP and compiled graphs do
            not follow a requires_grad that changes.
        tokenizer: saved beside the weights in each checkpoint. Trainer's own `processing_class` is
            left empty, as Trainer would write its special tokens into the model's configuration.
        kwargs: Trainer's own.

    Raises:
        ValueError: `args.max_grad_norm` is not 0. Trainer would clip by a norm that counts frozen
            layers, and the optimizer would clip again.
    """

    def __init__(
        self,
        *,
        localization: LocalizationCallback,
        max_grad_norm: float | None = 1.0,
        freeze_requires_grad: bool = True,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        own = kwargs["args"].max_grad_norm
        if own != 0:
            raise ValueError(
                f"args.max_grad_norm={own!r}: set it to 0, and give max_grad_norm to "
                "LocalizedTrainer, which clips over the active layers only"
            )
        self.localization = localization
        self.tokenizer_to_save = tokenizer
        self.active_max_grad_norm = max_grad_norm
        self.freezes = freeze_requires_grad and localization.every is None
        self.optimizer: torch.optim.Optimizer | None
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), localization]
        super().__init__(**kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Make LocalizedAdamW over Trainer's two groups, with and without decay."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            decaying = set(self.get_decay_parameter_names(trained))
            with_decay: list[torch.nn.Parameter] = []
            without: list[torch.nn.Parameter] = []
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    (with_decay if name in decaying else without).append(parameter)
            groups = [
                {"params": parameters, "weight_decay": decay}
                for parameters, decay in ((with_decay, self.args.weight_decay), (without, 0.0))
                if parameters
            ]
            self.optimizer = LocalizedAdamW(
                groups,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                layers=self.localization.layers,
                plan=self.localization.plan,
                max_grad_norm=self.active_max_grad_norm,
            )
            if self.freezes:
                # Only now: a parameter that is frozen when Trainer makes its groups is in none.
                freeze_layers(trained, self.localization.layers, self.localization.plan)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add our gradient norm to the lines that have a loss."""
        if "loss" in logs and self.optimizer is not None:
            logs.update(self.localization.norms(self.optimizer))
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the tokenizer too."""
        super().save_model(output_dir, _internal_call)
        if self.tokenizer_to_save is not None and self.args.should_save:
            self.tokenizer_to_save.save_pretrained(output_dir or self.args.output_dir)

    def restore_finished(self, checkpoint: Path) -> None:
        """Bring model, optimizer and state to where a finished run's last checkpoint left them.

        `train(resume_from_checkpoint=...)` would take one step too many there, as Trainer asks only
        after a step whether it was the last.
        """
        self._load_from_checkpoint(str(checkpoint))
        saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        self.create_optimizer().load_state_dict(saved)
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        # Which process this is was not the checkpoint's to say.
        self.state.is_world_process_zero = self.is_world_process_zero()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Let torch >= 2.6 read numpy's random state, which older Trainers do not ask for."""
        rebuild: Any = numpy.zeros(0).__reduce__()[0]
        kinds = [numpy.ndarray, numpy.dtype, type(numpy.dtype(numpy.uint32))]
        with torch.serialization.safe_globals([rebuild, codecs.encode, *kinds]):
            super()._load_rng_state(checkpoint)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> None:
        """Do without: newer Trainers read every gradient for it, even without clipping."""


def collate_blocks(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack packed blocks into a batch, int64 [blocks, block_size].

    The first token of a block is predicted by nothing. It gets the label -100 so that no version of
    Trainer counts it among the tokens that it divides the loss by.
    """
    ids = torch.tensor([row["input_ids"] for row in rows], dtype=torch.int64)
    labels = torch.tensor([row["labels"] for row in rows], dtype=torch.int64)
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels}


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """What Trainer is told: the settings of a run, with Trainer's own clipping off."""
    cuda = config.device == "auto" and torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(config.output),
        max_steps=-1 if config.max_steps is None else config.max_steps,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_epsilon=config.eps,
        max_grad_norm=0.0,  # LocalizedAdamW clips, over the active layers
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.lr_scheduler,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        bf16=config.bf16,
        seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not finite should be seen
        disable_tqdm=not config.progress,
        report_to="none",
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
    )


def freeze_layers(model: torch.nn.Module, layers: LayerMap, plan: LayerPlan) -> None:
    """Set requires_grad=False for the parameters of the plan's frozen layers."""
    frozen = set(plan.frozen)
    for _, parameter, layer in layers.parameters(model):
        if layers.names[layer] in frozen:
            parameter.requires_grad_(False)
