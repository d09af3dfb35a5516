"""LocalizationCallback: the whole method in a Hugging Face Trainer, by two arguments of it.

    method = LocalizationCallback(model, policy=TracedGradientPolicy(), tracing=tracing)
    trainer = Trainer(model=model, args=args, train_dataset=dataset,
                      optimizer_cls_and_kwargs=method.optimizer(args), callbacks=[method])

Chooses the plan (or takes it from a file or a checkpoint), chooses again where the policy wants
that, keeps clipping in one place, logs the gradient norms and writes the plan into each checkpoint.
The loop, and saving and loading the optimizer's state with the plan in it, are Trainer's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from gradloc.files import write_text
from gradloc.layers import LayerMap
from gradloc.optim import LocalizedAdamW
from gradloc.plan import LayerPlan
from gradloc.policies import Policy, needs_profile, retrace_every
from gradloc.profile import GradientProfile
from gradloc.training.policy_name import policy_name
from gradloc.training.ranks import agreed, is_distributed, wait_for_all
from gradloc.training.tracing import Tracing, check_choice, checked_plan
from gradloc.training.trainer_checks import check_arguments, recomputes_reentrantly
from gradloc.training.trainer_optimizer import check_optimizer, localized_optimizer, refuse_steps

PLAN_FILE = "plan.json"
PROFILE_FILE = "profile.json"
POLICY_FILE = "policy.txt"

_log = logging.getLogger("gradloc")


class LocalizationCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Layer selection for a Trainer; see `docs/trainer.md`.

    Args:
        model: the model that is trained, before anything wraps it.
        plan: a plan that stays, or the path of a plan file.
        policy: chooses the plan, when training begins and, if its `retrace_every` is set, again
            during it; not together with `plan`.
        profile: for the first choice of the policy; None: traced where the policy needs one.
        tracing: what to trace with.
        layers: the model's layers; None: `LayerMap.from_model(model)`.
        log_layer_norms: log the gradient norm of every layer too.
        freeze_requires_grad: with a plan that never changes, set requires_grad=False for frozen
            layers during the run, once the optimizer knows them. Left undone where it would break
            something: with reentrant activation checkpointing, and in several processes with a
            plan that is traced only after the model was wrapped (see `choose`).

    Raises:
        ValueError: neither plan nor policy or both; a plan or profile that does not fit; a plan
            that trains nothing; a policy that needs a profile where nothing is there to trace with.
        FileNotFoundError: no plan file of that name.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        plan: LayerPlan | str | os.PathLike[str] | None = None,
        policy: Policy | None = None,
        profile: GradientProfile | None = None,
        tracing: Tracing | None = None,
        layers: LayerMap | None = None,
        log_layer_norms: bool = False,
        freeze_requires_grad: bool = True,
    ) -> None:
        self.model = model
        self.layers = LayerMap.from_model(model) if layers is None else layers
        given = plan if plan is None or isinstance(plan, LayerPlan) else LayerPlan.load(plan)
        check_choice(self.layers, given, policy, profile, tracing)
        self.policy = policy
        self.every = None if policy is None else retrace_every(policy)
        self.tracing = tracing
        self.profile = profile
        self.log_layer_norms = log_layer_norms
        self.freeze_requires_grad = freeze_requires_grad
        self._given = given, profile
        self._plan = given
        self._used = False  # the plan is that of a run that has begun
        self._guard: Any = None  # the hook that refuses steps before training begins
        self._frozen: list[torch.nn.Parameter] = []  # whose requires_grad is ours to put back
        self._left_out: frozenset[str] = frozenset()  # layers that DDP was not shown
        self._trainers_limit: float | None = None  # args.max_grad_norm while it is taken over

    @property
    def plan(self) -> LayerPlan:
        """The plan in force, or that a run has ended with.

        Raises:
            ValueError: it is not chosen yet.
        """
        if self._plan is None:
            raise ValueError("no plan yet: it is chosen when training begins, or by choose(args)")
        return self._plan

    def optimizer(self, args: Any, **options: Any) -> tuple[type[LocalizedAdamW], dict[str, Any]]:
        """What Trainer's `optimizer_cls_and_kwargs` takes: LocalizedAdamW with Trainer's settings.

        Args:
            args: TrainingArguments. `max_grad_norm` becomes LocalizedAdamW's, which clips by the
                norm over the active layers; Trainer's own clipping is off during training. `seed`
                also becomes that of stochastic rounding.
            options: more keyword arguments of LocalizedAdamW, such as `on_freeze`.

        Raises:
            ValueError: settings that cannot work: DeepSpeed, FSDP1, and `release_gradients` with
                gradient accumulation, clipping or tracing during training.
        """
        self._give_back_clipping(args)
        self._unfreeze()  # after a run that was interrupted: frozen, they would be in no group
        retraces = self.every is not None and needs_profile(self._policy())
        check_arguments(args, options, retraces=retraces)
        usual = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "max_grad_norm": args.max_grad_norm or None,
            "seed": args.seed,
        }

        # A class, because newer Trainers call anything else with the model and not with groups.
        class LocalizedAdamWForTrainer(LocalizedAdamW):
            """Makes a LocalizedAdamW, not one of itself: that pickles like any other."""

            def __new__(cls, params: Iterable[Any], **kwargs: Any) -> LocalizedAdamW:  # type: ignore[misc]
                return self._make_optimizer(args, params, kwargs)

        return LocalizedAdamWForTrainer, {**usual, **options}

    def choose(self, args: Any) -> LayerPlan:
        """Choose the plan now, tracing if need be, and not only when training begins.

        For a look at the plan before training, and for several processes: frozen layers can then
        get requires_grad=False before DDP wraps the model. A resumed run takes the plan of its
        checkpoint in any case. After a run, chooses for the next one.
        """
        self._forget_earlier_run()
        if self._plan is None:
            self._plan = self._chosen(args, step=0)
        return self._plan

    def log_first(self, trainer: Any) -> None:
        """Go before the reporters of `args.report_to`, so that they get our norms as well.

        Trainer calls them before the callbacks that it is given.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    # ---- Trainer's events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the plan that the optimizer loaded, or choose one."""
        if self._guard is not None:
            self._guard.remove()
            self._guard = None
        localized = localized_optimizer(kwargs["optimizer"])
        check_optimizer(localized, self.layers, args)
        self._forget_earlier_run()
        loaded, given = localized.plan, self._given[0]
        if given is not None:
            if loaded is not None and dict(loaded.scales) != dict(given.scales):
                raise ValueError(
                    f"the optimizer came with another plan ({loaded.policy}) than the one given "
                    f"({given.policy}): resume with the same one, or begin another run from "
                    "the model in the checkpoint"
                )
            chosen = given
        elif loaded is not None and state.global_step:
            chosen = checked_plan(loaded, self.layers)
        else:  # at step 0 the optimizer's can only be ours, or that of an earlier run
            chosen = self._plan or self._chosen(args, step=state.global_step)
        if lost := sorted(self._left_out.intersection(chosen.active)):
            raise ValueError(
                f"the plan ({chosen.policy}) trains {', '.join(lost)}, frozen by requires_grad "
                "before the model was wrapped for several processes, whose gradients would not be "
                "averaged: use freeze_requires_grad=False (and a new Trainer), or resume with the "
                "policy of the checkpoint"
            )
        self._plan, self._used = chosen, True
        if loaded != chosen:
            localized.set_plan(chosen)
        if state.global_step:
            self._mend_checkpoint(args, state)
        elif self.profile is not None and state.is_world_process_zero:
            self.profile.save(Path(args.output_dir) / PROFILE_FILE)
        if not is_distributed():  # DDP does not follow: there it was done before wrapping, or not
            self._unfreeze()
            self._freeze(args)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose again where it is time, and take clipping over.

        At the beginning of a step and not at the end of the one before, so that the norms of the
        last step are still there to be logged; a checkpoint holds the plan that led to it, and a
        run that resumes from it chooses again, which gives the same plan.

        Raises:
            ValueError: the run was resumed at its end, where Trainer would take a step too many.
        """
        step = state.global_step
        if step >= state.max_steps > 0:
            raise ValueError(
                f"the checkpoint at step {step} is the end of its run (max_steps="
                f"{state.max_steps}): nothing is left to train; load the model from it"
            )
        if self.every is not None and step and step % self.every == 0:
            self._plan = self._chosen(args, step)
            if needs_profile(self._policy()) and state.is_world_process_zero:
                assert self.profile is not None
                self.profile.save(Path(args.output_dir) / PROFILE_FILE)
            localized_optimizer(kwargs["optimizer"]).set_plan(self._plan)
        # Off only while Trainer would clip, so that training_args.bin says what the user said.
        if self._trainers_limit is None and args.max_grad_norm:
            self._trainers_limit, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer has passed the place where it clips."""
        self._give_back_clipping(args)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add our norms to the lines that have a loss: the only place that waits for the device."""
        if logs is None or "loss" not in logs:
            return
        ours = self.norms(kwargs["optimizer"])
        logs.update(ours)
        if state.log_history:  # Trainer has put a copy there already
            state.log_history[-1].update(ours)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the plan, and the profile of the last trace, into the checkpoint just saved."""
        wait_for_all()  # plan.json says that every process has written its part
        if state.is_world_process_zero:
            self._save_choice(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put back what the run changed beside the parameters."""
        self._give_back_clipping(args)
        self._unfreeze()

    # ---- The parts ----

    def norms(self, optimizer: Any) -> dict[str, float]:
        """What to log of the last step: waits for the device.

        Returns:
            "grad_norm", over the active layers and before clipping, and with `log_layer_norms` also
            "grad_norm/<layer>" for each layer that had a gradient; "skipped_steps" if there were
            any.
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

    def _make_optimizer(
        self, args: Any, params: Iterable[Any], kwargs: dict[str, Any]
    ) -> LocalizedAdamW:
        """The optimizer, when Trainer asks for it: the model is in place and not wrapped yet."""
        self._forget_earlier_run()
        # Tracing waits for training to begin, when a resumed run has its plan, unless the optimizer
        # puts hooks on the parameters that tracing would run.
        early = bool(kwargs.get("release_gradients"))
        if self._plan is None and (early or not needs_profile(self._policy())):
            self._plan = self._chosen(args, step=0)
        groups = [group for group in params if not isinstance(group, dict) or group["params"]]
        optimizer = LocalizedAdamW(groups, layers=self.layers, plan=self._plan, **kwargs)
        if self._plan is not None:
            # Only now: a parameter that is frozen when Trainer makes its groups is in none.
            self._freeze(args)
        if is_distributed():
            self._left_out = frozenset(self.plan.frozen) if self._frozen else frozenset()
        self._guard = refuse_steps(optimizer)
        return optimizer

    def _forget_earlier_run(self) -> None:
        """Let another run begin as the first did: its policy chooses from step 0 on."""
        if self._used:
            (self._plan, self.profile), self._used = self._given, False

    def _policy(self) -> Policy:
        assert self.policy is not None
        return self.policy

    def _chosen(self, args: Any, step: int) -> LayerPlan:
        policy = self._policy()
        source: Any = self.layers
        if needs_profile(policy):
            # A profile that was given serves the first choice only.
            if step or self.profile is None:
                assert self.tracing is not None
                self.profile = self.tracing.trace(self.model, self.layers, args, step)
            source = self.profile
        return agreed(checked_plan(policy(source, step=step), self.layers))

    def _give_back_clipping(self, args: Any) -> None:
        if self._trainers_limit is not None:
            args.max_grad_norm, self._trainers_limit = self._trainers_limit, None

    def _freeze(self, args: Any) -> None:
        if not self.freeze_requires_grad or self.every is not None:
            return
        if recomputes_reentrantly(args, self.model):
            return
        frozen = set(self.plan.frozen)
        for _, parameter, layer in self.layers.parameters(self.model):
            if self.layers.names[layer] in frozen and parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def _unfreeze(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def _mend_checkpoint(self, args: Any, state: Any) -> None:
        """Find the profile again, and write what a kill kept `on_save` from writing."""
        output = Path(args.output_dir)
        checkpoint = output / f"checkpoint-{state.global_step}"
        if self.policy is not None and (checkpoint / POLICY_FILE).is_file():
            before = (checkpoint / POLICY_FILE).read_text(encoding="utf-8").strip()
            if before != (now := policy_name(self.policy)):
                _log.warning(
                    "%s was written with another policy (%s) than that given (%s): its plan stays "
                    "in force until the policy chooses again, if ever",
                    *(checkpoint, before, now),
                )
        if self.policy is not None and needs_profile(self.policy):
            for folder in (checkpoint, output):
                if (folder / PROFILE_FILE).is_file():
                    found = GradientProfile.load(folder / PROFILE_FILE)
                    # One of a later step is of the part of the run that the kill undid.
                    if found.step <= state.global_step:
                        found.check(self.layers)
                        self.profile = found
                        break
        whole = (checkpoint / PLAN_FILE).is_file()
        if state.is_world_process_zero and checkpoint.is_dir() and not whole:
            self._save_choice(checkpoint)

    def _save_choice(self, folder: Path) -> None:
        if self.profile is not None:
            self.profile.save(folder / PROFILE_FILE)
        if self.policy is not None:
            write_text(folder / POLICY_FILE, policy_name(self.policy) + "\n")
        self.plan.save(folder / PLAN_FILE)
