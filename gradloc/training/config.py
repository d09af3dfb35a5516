"""TrainConfig: the settings of a training run. Checks them; starts nothing."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from gradloc.recadam import RecAdam

# What may differ between a run and its continuation, as it does not change the parameters.
_FREE = frozenset(
    {"output", "save_steps", "save_total_limit", "logging_steps", "log_layer_norms", "progress"}
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run.

    Args:
        output: the run's folder: checkpoints, plan.json, profile.json, training.json, and in
            `final` the trained model.
        max_steps: optimizer steps; None: as many as `epochs` takes.
        epochs: passes over the corpus, where `max_steps` is None.
        learning_rate: of a layer with scale 1.
        weight_decay: decoupled; biases and norm weights get none, as Trainer has it.
        betas: of AdamW.
        eps: of AdamW.
        max_grad_norm: the norm over the active layers' gradients is clipped to it; None: not
            clipped. Trainer's own clipping is off.
        warmup_steps: steps in which the learning rate rises from 0.
        lr_scheduler: Trainer's name of the schedule after that: "linear", "cosine", "constant" or
            "constant_with_warmup", among others.
        batch_size: blocks a forward pass and device.
        gradient_accumulation_steps: forward passes an optimizer step.
        bf16: forward and backward in bfloat16 by autocast; parameters stay as they are.
        seed: of the order of the blocks, dropout, and what tracing draws.
        shuffle: train on the rows in a random order, another one each epoch; False: in the
            dataset's own order, as a dataset of `gradloc.training.mixing` needs it.
        freeze_requires_grad: with a plan that never changes, set requires_grad=False for frozen
            layers once the optimizer knows them, so that backward computes and stores no gradients
            for them. What takes no part in the plan is as before when the run ends.
        on_freeze: what happens to the moments of a layer that freezes: "keep", "offload" (off the
            device) or "drop" (deleted; they begin at zero when the layer returns).
        state_dtype: of the moments: "float32", "bfloat16", or None as LocalizedAdamW chooses.
        stochastic_rounding: round what is stored in bfloat16 stochastically, keyed by `seed`.
        recadam: RecAdam's pull to the weights before training, where it is wanted.
        save_steps: optimizer steps between checkpoints; the end of the run is always one. None:
            no checkpoints and no `final` folder, for runs whose model is used at once and not kept.
        save_total_limit: checkpoints kept, at least 2: a kill while one is written leaves another.
            None keeps all.
        logging_steps: optimizer steps between log lines.
        log_layer_norms: log every layer's gradient norm as well.
        device: "auto" is a CUDA device where there is one and else the processor; or "cpu".
        progress: Trainer's progress bar and log lines.

    Raises:
        ValueError: a setting out of range.
    """

    output: str | os.PathLike[str]
    max_steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 3e-5
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    warmup_steps: int = 0
    lr_scheduler: str = "linear"
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    bf16: bool = False
    seed: int = 0
    shuffle: bool = True
    freeze_requires_grad: bool = True
    on_freeze: str = "keep"
    state_dtype: str | None = None
    stochastic_rounding: bool = False
    recadam: RecAdam | None = None
    save_steps: int | None = 500
    save_total_limit: int | None = 2
    logging_steps: int = 10
    log_layer_norms: bool = False
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        self._at_least(1, "max_steps", "save_steps", "logging_steps")
        self._at_least(1, "batch_size", "gradient_accumulation_steps")
        self._at_least(0, "warmup_steps", "weight_decay", "seed")
        self._above(0, "epochs", "learning_rate", "eps", "max_grad_norm")
        if self.save_total_limit is not None and self.save_total_limit < 2:
            raise ValueError(
                f"save_total_limit={self.save_total_limit}: keep at least 2 checkpoints, so that a "
                "kill while one is written leaves another (None keeps all)"
            )
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"device={self.device!r}: 'auto' or 'cpu'")
        if self.on_freeze not in ("keep", "offload", "drop"):
            raise ValueError(f"on_freeze={self.on_freeze!r}: 'keep', 'offload' or 'drop'")
        if self.state_dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"state_dtype={self.state_dtype!r}: 'float32', 'bfloat16' or None")
        if self.recadam is not None and not isinstance(self.recadam, RecAdam):
            raise ValueError(f"recadam={self.recadam!r}: a gradloc.RecAdam, or None")

    def _at_least(self, low: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= low):
                raise ValueError(f"{name}={value!r}: at least {low}")

    def _above(self, low: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > low):
                raise ValueError(f"{name}={value!r}: above {low}")

    def optimizer_options(self) -> dict[str, Any]:
        """Keyword arguments of LocalizedAdamW that Trainer has no setting for."""
        return {
            "on_freeze": self.on_freeze,
            "state_dtype": None if self.state_dtype is None else getattr(torch, self.state_dtype),
            "stochastic_rounding": self.stochastic_rounding,
            "seed": self.seed,
            "recadam": self.recadam,
        }

    def decisive(self) -> dict[str, Any]:
        """The settings that a continued run must share with its beginning, ready for JSON."""
        settings = {field.name: asdict(self)[field.name] for field in fields(self)}
        settings["betas"] = list(self.betas)
        return {name: value for name, value in settings.items() if name not in _FREE}
