"""LocalizedAdamW: AdamW that updates the layers of a plan and leaves the others as they are.

The arithmetic is the backends'; here are param groups, state, the plan, clipping and what happens
to non-finite gradients. Without a plan it is `torch.optim.AdamW`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from gradloc import backends
from gradloc.layers import LayerMap
from gradloc.optim_checks import (
    check_grad,
    check_group,
    check_lr,
    check_options,
    check_parameters,
    check_plan,
    parameter_name,
)
from gradloc.optim_state import (
    check_saved,
    ensure_state,
    mend_step,
    restore_moments,
    state_bytes,
)
from gradloc.optim_work import Active, prepare_works, state_key
from gradloc.plan import LayerPlan
from gradloc.reference import AdamWGroup, clip_coefficient

# What says how the update is computed, not what it is.
_OWN_KEYS = ("foreach", "capturable", "differentiable", "fused")


class LocalizedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) over the layers that a plan names.

    A layer with scale s trains exactly as `torch.optim.AdamW` with learning rate lr·s; with s = 0
    neither its parameters nor its moments nor its step count change, gradients or not. Steps are
    counted for each tensor, so a layer that returns continues with the right bias correction.
    Moments are float32 for float32, bfloat16 and float16 parameters.

    Args:
        params: parameters, named parameters, or param groups, as for `torch.optim.AdamW`.
        lr: learning rate; a float or a tensor with one element.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: use the running maximum of the second moment.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility; has no effect.
        capturable: only False.
        differentiable: only False.
        fused: None updates with the compiled core where it can (dense float32, bfloat16 and float16
            CPU tensors) and with plain torch elsewhere; True insists on the core; False is plain
            torch throughout.
        layers: the layers of the model that `params` come from. Unnamed parameters are found by
            identity.
        plan: learning-rate scales by layer; needs `layers`. None trains everything at scale 1.
        max_grad_norm: clip the gradients of the active layers to this total 2-norm (as
            `torch.nn.utils.clip_grad_norm_`, but without a pass that rewrites them; `p.grad` is
            left as it is).
        on_nonfinite: what a step does when an active gradient has an infinity or NaN: "ignore" (as
            torch does), "skip" (everything stays as it was; counted in `num_skipped_steps`),
            "raise" (FloatingPointError, everything stays as it was). Default: "skip" with
            `max_grad_norm`, which computes the norms anyway, else "ignore".

    Raises:
        ValueError: a bad option, no parameters, overlapping parameters, parameters on several
            devices, a plan that does not fit, a parameter in no layer; nothing has been changed
            then.
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
    ) -> None:
        check_options(layers, plan, max_grad_norm, on_nonfinite)
        self._layers = layers
        self._max_grad_norm = max_grad_norm
        self._on_nonfinite = on_nonfinite or ("ignore" if max_grad_norm is None else "skip")
        self._plan: LayerPlan | None = None
        self._layer_ids: list[list[int]] = []  # by param group, then by parameter
        self.num_skipped_steps = 0
        self._forget_norms()
        self._forget_work()
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
        params = list(params) if not isinstance(params, Tensor) else [params]
        if not params:
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
            check_parameters(self.param_groups)
            for i, param in enumerate(group["params"]):
                name = parameter_name(group, len(self.param_groups) - 1, i)
                backends.choose(param, group["fused"], name)
            names = group.get("param_names", group["params"])
            self._layer_ids.append(
                [0 if self._layers is None else self._layers.index(name) for name in names]
            )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._forget_work()

    @property
    def plan(self) -> LayerPlan | None:
        """The plan in force; None when everything trains at scale 1."""
        return self._plan

    @property
    def layers(self) -> LayerMap | None:
        """The layers that plans and norms refer to."""
        return self._layers

    def set_plan(self, plan: LayerPlan | None) -> None:
        """Put another plan in force from the next step on; None trains everything at scale 1.

        State of layers that freeze is kept as it is and used again when they return.

        Raises:
            ValueError: the plan names unknown layers, leaves layers out, trains nothing, or the
                optimizer was made without `layers`. The old plan stays in force then.
        """
        if plan is not None:
            check_plan(plan, self._layers, self._layer_ids)
        self._plan = plan
        self._forget_work()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step over the active layers.

        Args:
            closure: re-evaluates the model and returns the loss, as for every torch optimizer.

        Raises:
            ValueError: a sparse gradient, or one of another shape or device; nothing has been
                changed then.
            FloatingPointError: a non-finite gradient with on_nonfinite="raise"; nothing has been
                changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [_hyperparameters(group) for group in self.param_groups]
        work_grads = self._gather()
        clip_coef = 1.0
        norms_first = self._max_grad_norm is not None or self._on_nonfinite != "ignore"
        if norms_first:
            self._record_norms([work.norm_sq(grads) for work, grads in work_grads])
            total = math.sqrt(float(cast(Tensor, self._norm_sq).sum()))
            if not math.isfinite(total) and self._on_nonfinite != "ignore":
                return self._nonfinite(loss)
            if self._max_grad_norm is not None:
                clip_coef = float(clip_coefficient(total, self._max_grad_norm))
        scales = self._scales()
        norms = [
            work.step(grads, groups, scales, clip_coef, with_norms=not norms_first)
            for work, grads in work_grads
        ]
        if not norms_first:
            self._record_norms([norm for norm in norms if norm is not None])
        return loss

    def grad_norms(self) -> Tensor:
        """2-norm of each layer's gradient in the last step, before clipping.

        Returns:
            float32 tensor [len(layers)], in the order of `layers.names` (one value for all
            parameters when the optimizer has no layers). NaN where nothing was measured: the layer
            was frozen or had no gradient.

        Raises:
            ValueError: there has been no step yet.
        """
        if self._norm_sq is None:
            raise ValueError("no norms yet: call grad_norms() after a step")
        norms = self._norm_sq.sqrt().float()
        unmeasured = torch.ones(norms.shape, dtype=torch.bool, device=norms.device)
        unmeasured[self._measured] = False
        return norms.masked_fill_(unmeasured, math.nan)

    def state_bytes(self) -> int:
        """Bytes of moments now allocated, over all parameters."""
        return sum(state_bytes(state) for state in self.state.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of `torch.optim.AdamW`.

        torch casts moments to the dtype of their parameter, which would round the float32 moments
        of a bfloat16 model; here they come back as they were saved. How the update is computed
        (`fused`, `foreach`) stays as this optimizer was made: it is no part of the state.

        Raises:
            ValueError: the state is that of other parameters, or its hyperparameters are out of
                range; nothing has been changed then.
        """
        saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
        own = [{key: group[key] for key in _OWN_KEYS} for group in self.param_groups]
        both = zip(self.param_groups, saved_groups, own, strict=False)
        for g, (group, saved, kept) in enumerate(both):
            check_group({**self.defaults, **saved, **kept})
            for i, (param, saved_id) in enumerate(
                zip(group["params"], saved["params"], strict=False)
            ):
                name = parameter_name(group, g, i)
                check_saved(saved_state.get(saved_id, {}), param, name)
        super().load_state_dict(state_dict)
        for group, saved, kept in zip(self.param_groups, saved_groups, own, strict=True):
            group.update(kept)
            for param, saved_id in zip(group["params"], saved["params"], strict=True):
                if saved_id in saved_state:
                    restore_moments(self.state[param], saved_state[saved_id], param)
        self._forget_work()

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "_layers",
            "_max_grad_norm",
            "_on_nonfinite",
            "_plan",
            "_layer_ids",
            "num_skipped_steps",
        )
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)  # older state dicts lack some
        for param_state in self.state.values():
            if "step" in param_state:
                mend_step(param_state)
        self._forget_norms()
        self._forget_work()

    def _forget_work(self) -> None:
        self._fresh: list[Tensor] = []  # parameters whose state was made in this step
        self._active: list[Active] | None = None
        self._key: list[Any] | None = None
        self._works: list[tuple[backends.AdamWWork, list[int]]] = []

    def _forget_norms(self) -> None:
        self._norm_sq: Tensor | None = None  # [layers] of the last step
        self._measured: list[int] = []  # layers that had a gradient in it

    def _scales(self) -> list[float]:
        if self._layers is None:
            return [1.0]
        if self._plan is None:
            return [1.0] * len(self._layers)
        return [self._plan.scales[name] for name in self._layers.names]

    def _find_active(self) -> list[Active]:
        scales = self._scales()
        return [
            (param, layer, g, i)
            for g, (group, ids) in enumerate(zip(self.param_groups, self._layer_ids, strict=True))
            for i, (param, layer) in enumerate(zip(group["params"], ids, strict=True))
            if scales[layer] > 0
        ]

    def _gather(self) -> list[tuple[backends.AdamWWork, Any]]:
        """Check gradients, make missing state, and give each backend its gradients."""
        if self._active is None:
            self._active = self._find_active()
        grads = []
        for param, _, g, i in self._active:
            grad = param.grad
            if grad is not None:
                check_grad(grad, param, self.param_groups[g], g, i)
            grads.append(grad)
        self._fresh = [
            param
            for (param, _, g, _), grad in zip(self._active, grads, strict=True)
            if grad is not None
            and ensure_state(self.state[param], param, amsgrad=self.param_groups[g]["amsgrad"])
        ]
        try:
            self._refresh_works(self._active)
        except Exception:
            self._drop_fresh()
            raise
        work_grads = []
        measured: set[int] = set()
        for work, positions in self._works:
            ours = [grads[position] for position in positions]
            measured.update(
                slot.layer for slot, grad in zip(work.slots, ours, strict=True) if grad is not None
            )
            work_grads.append((work, work.gather(ours)))
        self._measured = sorted(measured)
        return work_grads

    def _drop_fresh(self) -> None:
        for param in self._fresh:
            del self.state[param]
        self._fresh = []

    def _refresh_works(self, active: list[Active]) -> None:
        """Prepare the work anew when a parameter or its state is no longer the tensor it was."""
        if self._key is not None and state_key(active, self.param_groups, self.state) == self._key:
            return
        num_layers = 1 if self._layers is None else len(self._layers)
        self._works = prepare_works(active, self.param_groups, self.state, num_layers)
        self._key = state_key(active, self.param_groups, self.state)

    def _record_norms(self, norm_sqs: list[Tensor]) -> None:
        if norm_sqs:
            self._norm_sq = torch.stack([n.to(norm_sqs[0].device) for n in norm_sqs]).sum(dim=0)
        else:
            self._norm_sq = torch.zeros(len(self._scales()), dtype=torch.float64)

    def _nonfinite(self, loss: Any) -> Any:
        self._drop_fresh()
        self.num_skipped_steps += 1
        if self._on_nonfinite == "raise":
            bad = (~torch.isfinite(cast(Tensor, self._norm_sq))).nonzero().flatten().tolist()
            names = [
                self._layers.names[layer] if self._layers else "all parameters" for layer in bad
            ]
            raise FloatingPointError(
                "non-finite gradient in "
                f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}: nothing was "
                "changed. Lower the learning rate or look at the batch, or use on_nonfinite='skip'"
            )
        return loss


def _hyperparameters(group: dict[str, Any]) -> AdamWGroup:
    check_lr(group["lr"])
    beta1, beta2 = group["betas"]
    return AdamWGroup(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        maximize=bool(group["maximize"]),
    )
