"""LocalizedAdamW: AdamW that updates the layers of a plan and leaves the others as they are.

Here are options, param groups, plans and what is saved; a step is in `optim_step.py`, the
arithmetic in the backends. Without a plan it is `torch.optim.AdamW`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradloc import backends, optim_report, sharding
from gradloc.layers import LayerMap
from gradloc.optim_anchor import check_pull, warn_unanchored
from gradloc.optim_checks import (
    check_capturable,
    check_group,
    check_loadable,
    check_options,
    check_parameters,
    parameter_name,
)
from gradloc.optim_freeze import check_offload
from gradloc.optim_record import KEY, Record, recadam_after, take_record
from gradloc.optim_release import check_release
from gradloc.optim_selection import Selection
from gradloc.optim_state import mend_step, restore, state_bytes
from gradloc.optim_step import PlannedSteps
from gradloc.plan import LayerPlan
from gradloc.recadam import RecAdam

# What says how the update is computed, not what it is.
_OWN_KEYS = ("foreach", "capturable", "differentiable", "fused")


class LocalizedAdamW(PlannedSteps):
    """AdamW (Loshchilov & Hutter, 2019) over the layers that a plan names.

    A layer with scale s trains exactly as `torch.optim.AdamW` with learning rate lr·s; with s = 0
    neither its parameters nor its moments nor its step count change, gradients or not. Steps are
    counted for each tensor, so a layer that returns continues with the right bias correction.
    DTensor parameters (FSDP2) are updated shard by shard; their layers' norms are those over all
    ranks, added in every step.

    Args:
        params: parameters, named parameters, or param groups, as for `torch.optim.AdamW`.
        lr: learning rate; a float or a tensor with one element.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: use the running maximum of the second moment.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility; has no effect.
        capturable: a step on CUDA devices can be captured in a CUDA graph either way; True makes
            sure that all parameters are updated there.
        differentiable: only False.
        fused: None updates with the compiled core where it can (dense float32, bfloat16 and float16
            tensors on the CPU and, in builds with CUDA, on CUDA devices) and with plain torch
            elsewhere; True insists on the core; False is plain torch throughout.
        layers: the layers of the model that `params` come from. Unnamed parameters are found by
            identity.
        plan: learning-rate scales by layer; needs `layers`. None trains everything at scale 1.
        max_grad_norm: clip the gradients of the active layers to this total 2-norm (as
            `torch.nn.utils.clip_grad_norm_`, but without a pass that rewrites them; `p.grad` is
            left as it is). Turn other clipping off, such as the Trainer's: it would come on top.
        on_nonfinite: what a step does when an active gradient has an infinity or NaN: "ignore" (as
            torch does), "skip" (everything stays as it was; counted in `num_skipped_steps`),
            "raise" (FloatingPointError, everything stays as it was). Default: "skip" with
            `max_grad_norm`, which computes the norms anyway, else "ignore".
        on_freeze: what happens to the moments of a layer that a plan freezes: "keep", "offload"
            (to host memory from an accelerator, to a temporary file from host memory; they come
            back bit for bit) or "drop" (with the step count: a layer that returns starts afresh).
        state_dtype: dtype of the moments. None: float32 for float32, bfloat16 and float16
            parameters, float64 for float64. torch.bfloat16 halves them; use it with
            `stochastic_rounding`, as rounded to nearest a second moment with beta2 = 0.999 can
            grow but hardly decay.
        stochastic_rounding: round what is stored in bfloat16, parameters and moments, up or down
            at random with the nearer value likelier, so that small updates are right on average
            instead of lost. The same on every backend, sharding and number of threads.
        seed: of the rounding; a bit depends on seed, step, tensor and element alone.
        release_gradients: update each parameter as backward produces its gradient, and free that.
            `step()` then only ends the step. Excludes clipping, `on_nonfinite`, accumulation,
            GradScaler and DDP.
        recadam: pull what trains to the weights that it had when it first trained; these anchors
            are kept in the state.

    Raises:
        ValueError: a bad option or one that excludes another, no parameters, overlapping
            parameters, parameters of FSDP1 or ZeRO-3, a plan that does not fit or that trains
            what is not among the parameters, a parameter in no layer, a pull that would diverge
            (lr·scale·gamma above 2); nothing has been changed then.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        layers: LayerMap | None = None,
        plan: LayerPlan | None = None,
        max_grad_norm: float | None = None,
        on_nonfinite: str | None = None,
        on_freeze: str = "keep",
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        release_gradients: bool = False,
        recadam: RecAdam | None = None,
    ) -> None:
        check_options(
            layers,
            plan,
            max_grad_norm=max_grad_norm,
            on_nonfinite=on_nonfinite,
            on_freeze=on_freeze,
            state_dtype=state_dtype,
            seed=seed,
            recadam=recadam,
        )
        self._selection = Selection(layers)
        self._max_grad_norm = max_grad_norm
        self._on_nonfinite = on_nonfinite or ("ignore" if max_grad_norm is None else "skip")
        self._on_freeze = on_freeze
        self._state_dtype = state_dtype
        self._stochastic_rounding = bool(stochastic_rounding)
        self._seed = seed
        self._release_gradients = bool(release_gradients)
        self._recadam = recadam
        if release_gradients:
            check_release(self._max_grad_norm, self._on_nonfinite)
        self.num_skipped_steps = 0
        self._start_afresh()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,  # a key of AdamW's state dict since torch 2.7
        }
        check_group(defaults)
        params = params if isinstance(params, Tensor) else list(params)
        if not isinstance(params, Tensor) and not params:
            raise ValueError(
                "optimizer got an empty parameter list: pass model.named_parameters(), and make "
                "sure that a generator was not used up before"
            )
        super().__init__(params, defaults)
        self.set_plan(plan)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as every torch optimizer does; its layers are looked up.

        Raises:
            ValueError: as for the constructor; the optimizer is as before then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            check_parameters(self.param_groups, stochastic_rounding=self._stochastic_rounding)
            for i, param in enumerate(group["params"]):
                name = parameter_name(group, len(self.param_groups) - 1, i)
                if self._on_freeze == "offload":
                    check_offload(param, name)
                on_device = backends.runs_on_device(sharding.local(param), group["fused"], name)
                if group["capturable"]:
                    check_capturable(param, name, on_device=on_device)
            self._selection.add_group(group)
        except BaseException:
            self.param_groups.pop()
            raise
        self._forget_work()

    @property
    def plan(self) -> LayerPlan | None:
        """The plan in force; None when everything trains at scale 1."""
        return self._selection.plan

    @property
    def layers(self) -> LayerMap | None:
        """The layers that plans and norms refer to."""
        return self._selection.layers

    @property
    def max_grad_norm(self) -> float | None:
        """The norm to which the gradients of the active layers are clipped; None: not clipped."""
        return self._max_grad_norm

    @property
    def recadam(self) -> RecAdam | None:
        """The settings of the pull to the pretrained weights; None: there is none."""
        return self._recadam

    def set_plan(self, plan: LayerPlan | None) -> None:
        """Put another plan in force from the next step on; None trains everything at scale 1.

        State of layers that freeze is treated as `on_freeze` says. The first step checks that what
        the plan trains has gradients.

        Raises:
            ValueError: the plan names unknown layers, leaves layers out, trains nothing, trains
                layers without a parameter in this optimizer, has scales too large for `recadam`, or
                the optimizer was made without `layers`. The old plan stays in force then.
            OSError: there is no room to offload moments to. The old plan stays in force then.
        """
        self._selection.check(plan)
        check_pull(self._recadam, self.param_groups, self._selection.largest_scales(plan))
        before, self._selection.plan = self.plan, plan
        try:
            self._settle()
        except BaseException:  # no room to offload to, no memory to bring moments back to
            self._selection.plan = before
            self._settle()
            raise
        self._came_between = self._release is not None and self._release.in_step

    def grad_norms(self) -> Tensor:
        """2-norm of each layer's gradient in the last step, before clipping.

        Returns:
            float32 tensor [len(layers)], in the order of `layers.names` (one value for all
            parameters when the optimizer has no layers). NaN where nothing was measured: the layer
            was frozen or had no gradient.

        Raises:
            ValueError: there has been no step yet.
        """
        return self._norms.norms()

    def state_bytes(self) -> int:
        """Bytes of moments and anchors now on the parameters' devices; of a shard this rank's."""
        here = (state for param, state in self.state.items() if param not in self._away)
        return sum(state_bytes(state) for state in here)

    def offloaded_bytes(self) -> int:
        """Bytes of moments and anchors that on_freeze="offload" has moved away."""
        return sum(state_bytes(self.state.get(param, {})) for param in self._away)

    def report(self) -> str:
        """A table of the layers: scale, parameters, steps, bytes of moments, last gradient norm.

        Waits for the device, as it shows norms.
        """
        rows = self._rows()
        if self._norms.known:
            for row, norm in zip(rows, self.grad_norms().tolist(), strict=True):
                row.norm = None if math.isnan(norm) else norm
        headline = optim_report.in_force_line(self._selection.in_force().policy, rows)
        return optim_report.report_table(headline, rows)

    def state_dict(self) -> dict[str, Any]:
        """The state, in the shape of `torch.optim.AdamW`'s.

        Where there is something of ours to carry, the first param group has one more key, a string:
        plan, clipping, seed of the rounding, settings of RecAdam and count of skipped steps.
        torch.optim.AdamW loads it all the same.
        """
        state_dict: dict[str, Any] = super().state_dict()
        clips = self._max_grad_norm is not None or self._on_nonfinite != "ignore"
        adds = self._stochastic_rounding or self._recadam is not None
        if self.layers is not None or clips or adds or self.num_skipped_steps:
            record = Record(
                plan=self.plan,
                max_grad_norm=self._max_grad_norm,
                on_nonfinite=self._on_nonfinite,
                stochastic_rounding=self._stochastic_rounding,
                seed=self._seed,
                num_skipped_steps=self.num_skipped_steps,
                num_states=sum(bool(state) for state in state_dict["state"].values()),
                recadam=self._recadam,
            )
            state_dict["param_groups"][0][KEY] = record.to_text()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of `torch.optim.AdamW`.

        Plan, clipping, rounding and its seed come from the state, as the learning rate does; call
        `set_plan` afterwards to go on with another plan. torch casts moments to the dtype of their
        parameter, which would round the float32 moments of a bfloat16 model; here they, and
        RecAdam's anchors, come back as they were saved. How the update is computed (`fused`,
        `foreach`, `state_dtype`, `on_freeze`) stays as this optimizer was made: it is no part of
        the state. A state without RecAdam leaves this optimizer its own settings, and a
        RuntimeWarning says to what its parameters will be anchored then.

        Raises:
            ValueError: the state is that of other parameters, its plan does not fit the layers, or
                its hyperparameters are out of range; nothing has been changed then.
        """
        own = [{key: group[key] for key in _OWN_KEYS} for group in self.param_groups]
        seen: dict[str, Any] = {}

        def check(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            """Runs after the user's own hooks, on what torch will load."""
            loadable, record = take_record(incoming)
            seen.update(state_dict=loadable, record=record)
            if record is not None:
                self._check_record(record)
            check_loadable(loadable, self.param_groups, self.defaults, own)
            scales = self._selection.largest_scales(record.plan if record else self.plan)
            recadam = recadam_after(record, self._recadam)
            check_pull(recadam, loadable["param_groups"], scales)
            return loadable

        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._take_over(seen["record"])
        saved_groups, saved_state = seen["state_dict"]["param_groups"], seen["state_dict"]["state"]
        for group, saved, kept in zip(self.param_groups, saved_groups, own, strict=True):
            group.update(kept)
            for param, saved_id in zip(group["params"], saved["params"], strict=True):
                if saved_id in saved_state:
                    both = self.state[param], saved_state[saved_id]
                    restore(*both, param, self._state_dtype, self._recadam)
        self._settle()
        warn_unanchored(self.state.values(), self._recadam)

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "_selection",
            "_max_grad_norm",
            "_on_nonfinite",
            "_on_freeze",
            "_state_dtype",
            "_stochastic_rounding",
            "_seed",
            "_release_gradients",
            "_recadam",
        )
        kept = {name: self.__dict__[name] for name in own}
        return {**super().__getstate__(), **kept, "_num_skipped_steps": self.num_skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)  # older state dicts lack some
        for param_state in self.state.values():
            if "step" in param_state:
                mend_step(param_state)
        if "_selection" in state:
            self._selection = self._selection.copy()
        self._start_afresh()
        if "_selection" in state:  # a copy or a pickle; load_state_dict settles by itself
            self._settle()

    def _check_record(self, record: Record) -> None:
        if record.plan is not None and self.layers is None:
            raise ValueError(
                "state_dict: it carries a plan, and this optimizer was made without layers: make "
                "it with layers=LayerMap.from_model(model), or remove 'localization' from the "
                "first param group to load without plan, clipping and rounding"
            )
        check_options(
            self.layers,
            record.plan,
            max_grad_norm=record.max_grad_norm,
            on_nonfinite=record.on_nonfinite,
            on_freeze=self._on_freeze,
            state_dtype=self._state_dtype,
            seed=record.seed,
            recadam=record.recadam,
        )
        self._selection.check(record.plan)
        if self._release_gradients:
            check_release(record.max_grad_norm, record.on_nonfinite)
        check_parameters(self.param_groups, stochastic_rounding=record.stochastic_rounding)

    def _take_over(self, record: Record | None) -> None:
        if record is None:
            return
        self._selection.plan = record.plan
        self._max_grad_norm = record.max_grad_norm
        self._on_nonfinite = record.on_nonfinite
        self._stochastic_rounding = record.stochastic_rounding
        self._seed = record.seed
        self.num_skipped_steps = record.num_skipped_steps
        self._recadam = recadam_after(record, self._recadam)
