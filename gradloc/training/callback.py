"""LocalizationCallback: keeps a layer plan in force while a Hugging Face Trainer runs.

Chooses again every so many steps if the policy wants that, writes the plan into each checkpoint,
and gives the gradient norms to log. Makes no optimizer; `LocalizedTrainer` does, or your own code:

    Trainer(..., optimizers=(LocalizedAdamW(..., layers=layers, plan=plan), None),
            callbacks=[LocalizationCallback(layers, plan)])
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from gradloc.layers import LayerMap
from gradloc.optim import LocalizedAdamW
from gradloc.plan import LayerPlan
from gradloc.policies import Policy, needs_profile, retrace_every
from gradloc.profile import GradientProfile

PLAN_FILE = "plan.json"
PROFILE_FILE = "profile.json"


class LocalizationCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Keeps a plan in force during a Trainer run.

    Args:
        layers: the model's layers.
        plan: the plan at the start, which the optimizer must have already.
        policy: chooses again if its `retrace_every` says so; None: the plan stays.
        trace: (model, step) -> profile, for a policy that needs one. Must leave the model as it
            was, as `trace_gradients` does.
        log_layer_norms: log the gradient norm of every layer too.

    Raises:
        ValueError: the plan does not fit the layers, freezes all of them, or the policy re-traces
            and there is nothing to trace with.
    """

    def __init__(
        self,
        layers: LayerMap,
        plan: LayerPlan,
        *,
        policy: Policy | None = None,
        trace: Callable[[torch.nn.Module, int], GradientProfile] | None = None,
        log_layer_norms: bool = False,
    ) -> None:
        every = None if policy is None else retrace_every(policy)
        if every is not None and policy is not None and needs_profile(policy) and trace is None:
            raise ValueError(
                f"the policy chooses again every {every} steps, which needs probes and reference "
                "batches to trace with: give both"
            )
        self.layers = layers
        self.policy = policy
        self.every = every
        self.trace = trace
        self.log_layer_norms = log_layer_norms
        self.profile: GradientProfile | None = None
        self.plan = self._checked(plan)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose again where it is time.

        At the beginning of a step and not at the end of the one before, so that the norms of the
        last step are still there to be logged; a checkpoint holds the plan that led to it, and a
        run that resumes from it chooses again, which gives the same plan.
        """
        step = state.global_step
        if self.every is None or self.policy is None or step == 0 or step % self.every:
            return
        source: Any = self.layers
        if needs_profile(self.policy):
            assert self.trace is not None
            source = self.profile = self.trace(kwargs["model"], step)
        self.plan = self._checked(self.policy(source, step=step))
        localized_optimizer(kwargs["optimizer"]).set_plan(self.plan)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the plan, and the profile of the last trace, into the checkpoint just saved."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if self.profile is not None:
                self.profile.save(folder / PROFILE_FILE)
            self.plan.save(folder / PLAN_FILE)

    def norms(self, optimizer: Any) -> dict[str, float]:
        """What to log of the last step: waits for the device.

        Returns:
            "grad_norm", over the active layers and before clipping, and with `log_layer_norms` also
            "grad_norm/<layer>" for each layer that had a gradient.
        """
        localized = localized_optimizer(optimizer)
        values = localized.grad_norms().double().cpu()
        logs = {"grad_norm": float(values.square().nansum().sqrt())}
        if localized.num_skipped_steps:
            logs["skipped_steps"] = float(localized.num_skipped_steps)
        if self.log_layer_norms:
            pairs = zip(self.layers.names, values.tolist(), strict=True)
            logs |= {f"grad_norm/{name}": value for name, value in pairs if value == value}
        return logs

    def _checked(self, plan: LayerPlan) -> LayerPlan:
        plan.check(self.layers.names)
        if not plan.active:
            raise ValueError(
                f"the plan ({plan.policy}) freezes all {len(plan.scales)} layers: nothing would "
                "train; lower the threshold or choose another policy"
            )
        return plan


def localized_optimizer(optimizer: Any) -> LocalizedAdamW:
    """The LocalizedAdamW inside the wrappers that Accelerate puts around an optimizer.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not isinstance(inner, LocalizedAdamW):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"the optimizer is a {type(optimizer).__name__}, not LocalizedAdamW: pass one to "
                "Trainer(optimizers=(optimizer, None)), or use LocalizedTrainer"
            )
    return inner
