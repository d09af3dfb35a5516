"""LocalizedTrainer: what `gradloc.training.train` needs beyond a plain Trainer with our callback.

It spares the pass over all gradients that newer Trainers make for a norm to log, saves a tokenizer
that Trainer does not know of, restores a finished run, and works with Trainers that have neither
`optimizer_cls_and_kwargs` nor `train_sampling_strategy` yet. All else is `LocalizationCallback`'s
and Trainer's.
"""

from __future__ import annotations

import codecs
import logging
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import Trainer, TrainerState, TrainingArguments

from gradloc.training.callback import LocalizationCallback
from gradloc.training.config import TrainConfig

_log = logging.getLogger("gradloc")


class LocalizedTrainer(Trainer):  # type: ignore[misc]  # transformers has no types
    """Trainer with a layer plan.

    Args:
        localization: chooses and keeps the plan; becomes the first of the callbacks.
        options: keyword arguments of LocalizedAdamW beside Trainer's settings.
        tokenizer: saved beside the weights in each checkpoint. Trainer's own `processing_class` is
            left empty, as Trainer would write its special tokens into the model's configuration.
        kwargs: Trainer's own.

    Raises:
        ValueError: as for `LocalizationCallback.optimizer`.
    """

    def __init__(
        self,
        *,
        localization: LocalizationCallback,
        options: dict[str, Any] | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self.localization = localization
        self.localized_adamw = localization.optimizer(kwargs["args"], **(options or {}))
        self.tokenizer_to_save = tokenizer
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), localization]
        super().__init__(**kwargs)
        localization.log_first(self)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:
        """LocalizedAdamW, also where Trainer has no `optimizer_cls_and_kwargs` yet (before 4.47).

        A static method there; it is called through the instance.
        """
        return self.localized_adamw

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the dataset's own order where asked to; older Trainers only know a random one.

        Newer ones hand over the dataset as an argument.
        """
        if getattr(self.args, "train_sampling_strategy", None) == "sequential":
            return torch.utils.data.SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(*args, **kwargs)

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
        optimizer = self.create_optimizer()
        optimizer.load_state_dict(saved)
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        # Which process this is was not the checkpoint's to say.
        self.state.is_world_process_zero = self.is_world_process_zero()
        events = (self.args, self.state, self.control)
        self.localization.on_train_begin(*events, optimizer=optimizer)
        self.localization.on_train_end(*events)

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
    """What Trainer is told: the settings of a run, on one device a process."""
    cuda = config.device == "auto" and torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(config.output),
        max_steps=-1 if config.max_steps is None else config.max_steps,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_epsilon=config.eps,
        max_grad_norm=config.max_grad_norm or 0.0,  # taken over by LocalizationCallback
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.lr_scheduler,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        bf16=config.bf16,
        seed=config.seed,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=config.save_total_limit,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not finite should be seen
        disable_tqdm=not config.progress,
        report_to="none",
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
    )
    if not config.shuffle:
        # Set and not passed: older Trainers have no such field, and LocalizedTrainer reads it.
        arguments.train_sampling_strategy = "sequential"
    use_one_device(arguments)
    return arguments


def use_one_device(arguments: TrainingArguments) -> None:
    """Keep Trainer from torch.nn.DataParallel, into which it falls with several GPUs in a process.

    DataParallel is slower than one process a GPU, and the batch would grow with the machine. Says
    what to do for the others.
    """
    count = arguments.n_gpu
    if count > 1:
        arguments._n_gpu = 1  # as Trainer itself does for models that are spread over GPUs
        _log.warning(
            "%d GPUs are visible and this process trains on one. To use all of them: torchrun "
            "--nproc-per-node %d -m gradloc.cli train ... (or accelerate launch)",
            count,
            count,
        )
