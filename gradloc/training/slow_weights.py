"""Slow weights in a Hugging Face Trainer: every few steps the weights move part of the way back.

Reptile over replay, as in MER (Riemer et al., ICLR 2019; for language models arXiv 2508.01908):
what the batches of an interval agree on survives the move best. Mixes no replay into the data, and
neither reads nor changes the optimizer's state.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from gradloc.files import replacing
from gradloc.optim import LocalizedAdamW
from gradloc.sharding import is_sharded
from gradloc.training.trainer_optimizer import localized_optimizer
from gradloc.wording import quoted

SLOW_WEIGHTS_FILE = "slow_weights.safetensors"


@dataclass(frozen=True)
class SlowWeights:
    """How far the weights move back, and how often.

    Args:
        every: optimizer steps between two moves, >= 1.
        strength: share of the way back, in [0, 1]. 0 turns the moves off, 1 undoes every step.

    Raises:
        ValueError: a setting out of range.
    """

    every: int = 10
    strength: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(
                f"every={self.every!r}: give the optimizer steps between two moves, at least 1"
            )
        number = isinstance(self.strength, (int, float)) and not isinstance(self.strength, bool)
        if not number or not (math.isfinite(self.strength) and 0 <= self.strength <= 1):
            raise ValueError(
                f"strength={self.strength!r}: a number in [0, 1]; 0 changes nothing, 1 goes all "
                "the way back"
            )


class SlowWeightsCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Moves the weights θ back towards slow copies of them, every `every` optimizer steps.

    θ ← slow + (1 − strength)(θ − slow), and the slow copy becomes that. Steps are counted from the
    beginning of the run; what the last `every` steps of a run leave unfinished stays as it is. The
    moments of the optimizer are left alone: they go on as if nothing had moved.

    Only what trains has a slow copy: parameters in the optimizer that require a gradient and, with
    LocalizedAdamW, are in active layers of its plan. A layer that the plan freezes loses its copy
    and no longer moves; one that it takes up begins with a copy of what it is then. Copies have the
    dtype and device of their parameters. All ranks of DDP do the same, each with its own copies.

    Each checkpoint gets the copies in `slow_weights.safetensors`, before Trainer writes the rest of
    it, so that a checkpoint which is complete has them; a run that resumes goes on with the same
    bits. Strength 0 holds and writes nothing.

    Args:
        settings: how far and how often.

    Attributes:
        settings: the same.
        extra_bytes: of the slow copies, the most that the last run held at a time.
    """

    def __init__(self, settings: SlowWeights) -> None:
        self.settings = settings
        self.extra_bytes = 0
        self._slow: dict[str, Tensor] = {}
        self._parameters: dict[str, torch.nn.Parameter] = {}  # all of the optimizer's
        self._layers: dict[str, str] = {}  # their layers, where the optimizer has a map
        self._localized: LocalizedAdamW | None = None
        self._saved_step = -1

    # ---- Trainer's events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look up what can train; of a resumed run, read the copies.

        Raises:
            ValueError: parameters are sharded over processes; the checkpoint has no copies, or
                those of other settings or of another model.
        """
        self._forget()
        self.extra_bytes = 0
        if self.settings.strength:
            self._look_up(kwargs["model"], kwargs["optimizer"])
        if state.global_step:
            self._read(_checkpoint(args, state), state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin copies of what trains from now on, and drop those of what does not."""
        self._follow()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same, if the plan was changed by a callback that comes after this one."""
        self._follow()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the weights, if it is time, before a checkpoint takes them."""
        if self.settings.strength and state.global_step % self.settings.every == 0:
            self._move()
        if control.should_save:
            self._write(args, state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the copies, if there will be a checkpoint."""
        if control.should_save:
            self._write(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the copies, where a callback asked for a checkpoint after this one was called."""
        if self._saved_step != state.global_step:
            self._write(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Free the copies."""
        self._forget()

    # ---- The parts ----

    def _forget(self) -> None:
        self._slow, self._parameters, self._layers = {}, {}, {}
        self._localized, self._saved_step = None, -1

    def _look_up(self, model: torch.nn.Module, optimizer: Any) -> None:
        known = {id(param) for group in optimizer.param_groups for param in group["params"]}
        self._parameters = {
            name: param for name, param in model.named_parameters() if id(param) in known
        }
        if sharded := [name for name, param in self._parameters.items() if is_sharded(param)]:
            raise ValueError(
                f"parameters {quoted(sharded)} are sharded over processes (FSDP2), which slow "
                "weights do not support: train with DDP or in one process, or leave "
                "SlowWeightsCallback out"
            )
        try:
            self._localized = localized_optimizer(optimizer)
        except TypeError:  # some other optimizer, which updates all that requires a gradient
            return
        if (layers := self._localized.layers) is not None:
            self._layers = {name: layers.names[layers.index(name)] for name in self._parameters}

    def _follow(self) -> None:
        plan = None if self._localized is None else self._localized.plan
        training = [
            name
            for name, param in self._parameters.items()
            if param.requires_grad and (plan is None or plan.scales[self._layers[name]] > 0)
        ]
        if len(training) == len(self._slow) and all(name in self._slow for name in training):
            return
        self._slow = {
            name: self._slow[name]
            if name in self._slow
            else self._parameters[name].detach().clone()
            for name in training
        }
        held = sum(slow.numel() * slow.element_size() for slow in self._slow.values())
        self.extra_bytes = max(self.extra_bytes, held)

    @torch.no_grad()
    def _move(self) -> None:
        strength = self.settings.strength
        for name, slow in self._slow.items():
            parameter = self._parameters[name]
            if strength < 1:  # of a difference that is not finite, 0 times is not 0
                slow.lerp_(parameter, 1 - strength)
            parameter.copy_(slow)

    def _write(self, args: Any, state: Any) -> None:
        self._saved_step = state.global_step
        if not self._slow or not args.should_save:
            return
        from safetensors.torch import save_file

        content = {name: slow.contiguous() for name, slow in self._slow.items()}
        about = {"step": str(state.global_step), "settings": json.dumps(asdict(self.settings))}
        with replacing(_checkpoint(args, state) / SLOW_WEIGHTS_FILE) as temporary:
            save_file(content, temporary, about)

    def _read(self, checkpoint: Path, step: int) -> None:
        path = checkpoint / SLOW_WEIGHTS_FILE
        if not path.is_file():
            if not self.settings.strength:
                return
            raise ValueError(
                f"the run to resume has no slow weights: {str(path)!r} is missing. Resume without "
                "SlowWeightsCallback, or begin another run from the model in the checkpoint"
            )
        from safetensors import SafetensorError, safe_open

        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} is not a whole safetensors file ({error}): resume from an earlier "
                "checkpoint"
            ) from error
        with opened as file:
            about = file.metadata() or {}
            before, now = json.loads(about.get("settings", "{}")), asdict(self.settings)
            if before != now or about.get("step") != str(step):
                raise ValueError(
                    f"{str(path)!r} was written at step {about.get('step')} with {before}, not at "
                    f"{step} with {now}: resume with the same settings of SlowWeights, or begin "
                    "another run from the model in the checkpoint"
                )
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            other = [
                name
                for name, shape in shapes.items()
                if name not in self._parameters or shape != tuple(self._parameters[name].shape)
            ]
            if other:
                raise ValueError(
                    f"{str(path)!r} is of another model or plan: the optimizer has no parameters "
                    f"{quoted(other)} of these shapes. Resume with the model and plan of the run"
                )
            self._slow = {
                name: torch.empty_like(self._parameters[name], requires_grad=False).copy_(
                    file.get_tensor(name)
                )
                for name in names
            }
        held = sum(slow.numel() * slow.element_size() for slow in self._slow.values())
        self.extra_bytes = max(self.extra_bytes, held)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
