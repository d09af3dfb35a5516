"""LocalizedTrainer: Hugging Face Trainer that steps with LocalizedAdamW. The loop stays Trainer's.

Overrides how the optimizer is made and which gradient norm is logged, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from gradloc.layers import LayerMap
from gradloc.optim import LocalizedAdamW
from gradloc.plan import LayerPlan
from gradloc.training.callback import LocalizationCallback


class LocalizedTrainer(Trainer):  # type: ignore[misc]  # transformers has no types
    """Trainer with a layer plan.

    Args:
        localization: holds the layers and the plan; becomes one of the callbacks.
        max_grad_norm: clip the norm over the active layers' gradients to it; None: don't.
        freeze_requires_grad: set requires_grad=False for frozen layers once the optimizer exists.
            Ignored with a policy that chooses again: Trainer's groups, DDP and compiled graphs do
            not follow a requires_grad that changes.
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
        **kwargs: Any,
    ) -> None:
        own = kwargs["args"].max_grad_norm
        if own != 0:
            raise ValueError(
                f"args.max_grad_norm={own!r}: set it to 0, and give max_grad_norm to "
                "LocalizedTrainer, which clips over the active layers only"
            )
        self.localization = localization
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

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> None:
        """Do without: newer Trainers read every gradient for a norm, even with no clipping."""


def freeze_layers(model: torch.nn.Module, layers: LayerMap, plan: LayerPlan) -> None:
    """Set requires_grad=False for the parameters of the plan's frozen layers."""
    frozen = set(plan.frozen)
    for _, parameter, layer in layers.parameters(model):
        if layers.names[layer] in frozen:
            parameter.requires_grad_(False)
