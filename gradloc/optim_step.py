"""One step of LocalizedAdamW: gradients in, norms, clipping, the update, proof of the plan.

What is set up once and what is saved stand in `optim.py`; the arithmetic is the backends'.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from gradloc import ops, optim_report, sharding
from gradloc.optim_anchor import check_pull, in_effect
from gradloc.optim_checks import check_lr
from gradloc.optim_device import DeviceControl, Rule, scaler_value
from gradloc.optim_freeze import bring_back, put_away
from gradloc.optim_norms import StepNorms
from gradloc.optim_release import GradientRelease
from gradloc.optim_selection import Selection
from gradloc.optim_work import Active, Part, StepWork
from gradloc.recadam import RecAdam
from gradloc.reference import AdamWGroup, clip_coefficient


class PlannedSteps(torch.optim.Optimizer):
    """The part of LocalizedAdamW that runs steps."""

    # torch.amp.GradScaler hands scale and overflow flag over instead of rewriting all gradients.
    _step_supports_amp_scaling = True

    _selection: Selection
    _max_grad_norm: float | None
    _on_nonfinite: str
    _on_freeze: str
    _state_dtype: torch.dtype | None
    _stochastic_rounding: bool
    _seed: int
    _release_gradients: bool
    _num_skipped_steps: int
    _recadam: RecAdam | None = None
    _control: DeviceControl | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step over the active layers.

        Args:
            closure: re-evaluates the model and returns the loss, as for every torch optimizer.

        Raises:
            ValueError: a sparse gradient, or one of another shape or device, or a learning rate
                that is out of range or too large for RecAdam's pull; nothing has been changed then.
            FloatingPointError: a non-finite gradient with on_nonfinite="raise"; nothing has been
                changed then.
            RuntimeError: the first step of a plan, and nothing that it trains has a gradient;
                nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_amp()
        if self._release is not None:
            return self._finish_release(self._release, loss)
        self._check_lrs()
        work, parts = self._gathered()
        measured = work.layers_with_grad()
        on_device = bool(parts) and all(part.work.on_device for part, _ in parts)
        try:
            if on_device and self._on_nonfinite != "raise":  # to raise is to wait
                self._prove(measured)
                self._update_on_device(parts, measured)
            elif not self._update_on_host(parts, measured):
                work.drop_fresh()
                return loss
        except Exception:  # such as a launch that failed
            work.drop_fresh()
            raise
        if not self._said:
            self._say()
        return loss

    def _update_on_host(self, parts: list[tuple[Part, Any]], measured: Set[int]) -> bool:
        """Decide here whether the step happens and how far it is clipped; False if it does not."""
        unscale = self._amp_unscale()
        if unscale is None:
            self.num_skipped_steps += 1
            return False
        coef, scales = unscale, self._selection.scales()
        norms_first = self._max_grad_norm is not None or self._on_nonfinite != "ignore"
        if norms_first:
            norm_sqs = [part.reduced(part.work.norm_sq(grads, scales)) for part, grads in parts]
            norm_sq = self._norms.record(norm_sqs, measured, unscale)
            total = math.sqrt(float(norm_sq.sum()))
            if not math.isfinite(total) and self._on_nonfinite != "ignore":
                self._nonfinite(norm_sq)
                return False
            if self._max_grad_norm is not None:
                coef *= float(clip_coefficient(total, self._max_grad_norm))
        self._prove(measured)
        norm_sqs = self._update(parts, [coef] * len(parts), with_norms=not norms_first)
        if not norms_first:
            self._norms.record(norm_sqs, measured, unscale)
        return True

    def _update_on_device(self, parts: list[tuple[Part, Any]], measured: Set[int]) -> None:
        """The same without waiting: what is decided stays on the device."""
        devices = [part.work.slots[0].param.device for part, _ in parts]
        found_inf = scaler_value(getattr(self, "found_inf", None), devices[0])
        grad_scale = scaler_value(getattr(self, "grad_scale", None), devices[0])
        rule = Rule(self._max_grad_norm, self._on_nonfinite == "skip", found_inf, grad_scale)
        unscale = 1.0 if grad_scale is None else 1.0 / grad_scale
        for part, grads in parts if len(parts) > 1 else ():
            part.work.prepare(grads, self._selection.scales())  # before the first is changed
        coefs: list[float | Tensor] = [1.0] * len(parts)
        norm_sqs: list[Tensor] = []
        if rule.decides:
            if self._control is None or self._control.values.device != devices[0]:
                self._move_control(devices[0])
            assert self._control is not None
            norm_sqs = self._control.decide(parts, self._selection.scales(), rule)
            coefs = [self._control.on(device) for device in devices]
        updated = self._update(parts, coefs, with_norms=not rule.needs_norms)
        self._norms.record(norm_sqs if rule.needs_norms else updated, measured, unscale)

    def _update(
        self, parts: list[tuple[Part, Any]], coefs: Sequence[float | Tensor], *, with_norms: bool
    ) -> list[Tensor]:
        """Update all parts; return their sums of squares by layer if asked."""
        on_device = all(part.work.on_device for part, _ in parts)
        groups = [_hyperparameters(group, wait=not on_device) for group in self.param_groups]
        norm_sqs = []
        for (part, grads), coef in zip(parts, coefs, strict=True):
            norm_sq = part.work.step(
                grads,
                groups,
                self._selection.scales(),
                coef,
                with_norms=with_norms,
                rounding_seed=self._rounding_seed,
                recadam=in_effect(self._recadam),
            )
            norm_sqs.append(norm_sq)
            if self._work is not None:  # from here on a failure is not as if nothing had been
                self._work.keep_fresh()
        found = zip(parts, norm_sqs, strict=True)
        return [part.reduced(norm_sq) for (part, _), norm_sq in found if norm_sq is not None]

    @property
    def num_skipped_steps(self) -> int:
        """Steps left out because a gradient was not finite; waits for the device."""
        on_device = 0 if self._control is None else self._control.num_skipped()
        return self._num_skipped_steps + on_device

    @num_skipped_steps.setter
    def num_skipped_steps(self, count: int) -> None:
        self._num_skipped_steps = count
        if self._control is not None:
            self._control.values[2] = 0.0

    def _move_control(self, device: torch.device) -> None:
        self.num_skipped_steps = self.num_skipped_steps  # from the old device to here
        self._control = DeviceControl(device)

    def _start_afresh(self) -> None:
        """Forget what is derived from parameters, state and plan."""
        release: GradientRelease | None = self.__dict__.get("_release")
        if release is not None:
            release.remove()
        self._release = GradientRelease(self._update_one) if self._release_gradients else None
        self._came_between = False  # a plan between a backward pass with releases and its step
        self._away: set[Tensor] = set()  # parameters whose moments are offloaded
        self._norms = StepNorms(len(self._selection.names))
        self._said = self._selection.layers is None  # that the plan is in force
        self._forget_work()

    def _forget_work(self) -> None:
        self._largest_scales: list[float] | None = None
        self._work: StepWork | None = None
        self._single: dict[Tensor, tuple[int, StepWork]] = {}  # with release_gradients

    def _settle(self) -> None:
        """Put the plan in force: state where it belongs, work prepared anew, proof to come."""
        self._said = self._selection.layers is None
        self._forget_work()
        self._watch()
        active, frozen = self._selection.divide(self.param_groups)
        self._away = {param for param in self._away if param in self.state}
        # State that inference mode makes could not be updated later.
        with torch.inference_mode(False), torch.no_grad():
            put_away(self._on_freeze, frozen, self.state, self._away)
            bring_back((one.param for one in active), self.state, self._away)

    def _watch(self) -> None:
        if self._release is not None:
            self._release.watch(param for param, _ in self._selection.params(self.param_groups))

    @property
    def _rounding_seed(self) -> int | None:
        return self._seed if self._stochastic_rounding else None

    def _gathered(self) -> tuple[StepWork, list[tuple[Part, Any]]]:
        if self._work is not None:
            parts = self._work.gather_unchanged(self.param_groups, self.state)
            if parts is not None:
                return self._work, parts
        work = self._step_work()
        return work, work.gather()

    def _step_work(self) -> StepWork:
        stale = self._work is not None and not self._work.is_over(self.param_groups, self.state)
        if self._work is None or stale:
            active = self._selection.divide(self.param_groups)[0]
            self._work = self._work_over(active, watched=True)
        return self._work

    def _work_over(self, active: list[Active], *, watched: bool) -> StepWork:
        return StepWork(
            active,
            self.param_groups,
            self.state,
            len(self._selection.names),
            state_dtype=self._state_dtype,
            rounding=self._stochastic_rounding,
            recadam=self._recadam,
            watched=watched,
        )

    def _prove(self, measured: Set[int]) -> None:
        """At the first step of a plan: check that what it trains has gradients."""
        chosen = self._selection
        if not self._said:
            optim_report.check_in_force(
                chosen.in_force(),
                present={chosen.names[layer] for layer in chosen.present()},
                with_grad={chosen.names[layer] for layer in measured},
                in_part=chosen.in_part(self.param_groups),
            )

    def _say(self) -> None:
        """At the first step of a plan: say in one line that it is in force."""
        self._said = True
        if optim_report.logger.isEnabledFor(logging.INFO):
            line = optim_report.in_force_line(self._selection.in_force().policy, self._rows())
            optim_report.logger.info(line)

    def _rows(self) -> list[optim_report.LayerRow]:
        chosen = self._selection
        params = chosen.params(self.param_groups)
        return optim_report.layer_rows(
            chosen.names, chosen.scales(), chosen.num_elements(), params, self.state, self._away
        )

    def _check_lrs(self) -> None:
        for group in self.param_groups:
            check_lr(group["lr"])
        if self._recadam is not None:
            if self._largest_scales is None:  # kept while the plan and the groups are the same
                self._largest_scales = self._selection.largest_scales(self._selection.plan)
            check_pull(self._recadam, self.param_groups, self._largest_scales)

    def _check_amp(self) -> None:
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if self._release is not None and (found_inf is not None or scale is not None):
            raise RuntimeError(
                "release_gradients=True with GradScaler: the scaled gradients were applied before "
                "the scaler could look at them, so the parameters are wrong now; train in bfloat16 "
                "without a scaler, or use release_gradients=False"
            )

    def _amp_unscale(self) -> float | None:
        """What undoes GradScaler's scale; None when it found an overflow and there is no step."""
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and _number(found_inf):
            return None
        return 1.0 if scale is None else 1.0 / _number(scale)

    def _nonfinite(self, norm_sq: Tensor) -> None:
        self.num_skipped_steps += 1
        if self._on_nonfinite == "raise":
            names = self._selection.names
            bad = [names[at] for at in (~torch.isfinite(norm_sq)).nonzero().flatten().tolist()]
            raise FloatingPointError(
                f"non-finite gradient in {', '.join(bad[:4])}{' ...' if len(bad) > 4 else ''}: "
                "nothing was changed. Lower the learning rate or look at the batch, or use "
                "on_nonfinite='skip'"
            )

    def _update_one(self, param: Tensor) -> tuple[Part, Tensor, int] | None:
        """Update one parameter whose gradient has just come (release_gradients)."""
        assert self._release is not None
        if not self._single or (not self._release.in_step and self._single_is_stale()):
            active = self._selection.divide(self.param_groups)[0]
            self._single = {
                one.param: (one.layer, self._work_over([one], watched=False)) for one in active
            }
        if param not in self._single:
            return None  # frozen
        self._check_lrs()
        layer, work = self._single[param]
        ((part, grads),) = work.gather()
        (norm_sq,) = self._update([(part, grads)], [1.0], with_norms=True)
        return part, norm_sq, layer

    def _finish_release(self, release: GradientRelease, loss: Any) -> Any:
        """End a step whose updates happened in backward; do those of gradients set by hand."""
        for param, _ in self._selection.params(self.param_groups):
            if param.grad is not None:
                release.release(param)
        norm_sqs, measured = release.finish_step()
        self._watch()  # Accelerate may have exchanged the parameters since the optimizer was made
        if not self._came_between:
            self._prove(measured)
        self._norms.record(norm_sqs, measured, 1.0)
        if not self._said and not self._came_between:
            self._say()
        self._came_between = False
        return loss

    def _single_is_stale(self) -> bool:
        _, work = next(iter(self._single.values()))
        return not work.is_over(self.param_groups, self.state)


def _number(value: Any) -> float:
    """A one-element tensor's value, also of a DTensor."""
    return float(value.full_tensor() if sharding.is_sharded(value) else value)


def _hyperparameters(group: dict[str, Any], *, wait: bool) -> AdamWGroup:
    """A param group's hyperparameters; a learning rate on a device is read there unless `wait`."""
    lr = group["lr"]
    stays = not wait and isinstance(lr, Tensor) and ops.counts_on_device(lr)
    beta1, beta2 = group["betas"]
    return AdamWGroup(
        lr=math.nan if stays else float(lr),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        maximize=bool(group["maximize"]),
        lr_tensor=lr.detach() if stays else None,
    )
