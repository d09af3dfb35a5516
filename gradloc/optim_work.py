"""The work of an optimizer step, prepared once and used until a tensor of it moves.

Holds no optimizer state of its own; `LocalizedAdamW` decides when to prepare anew.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradloc import backends, ops, sharding
from gradloc.ops_cuda import refuse_capture
from gradloc.optim_anchor import ANCHOR, anchor_dtype, in_effect
from gradloc.optim_checks import check_grad, parameter_name
from gradloc.optim_state import ensure_state, is_complete, laid_out, mend_step, moment_dtype
from gradloc.recadam import RecAdam
from gradloc.watch import Watch, watch


class Active(NamedTuple):
    """A parameter that the plan trains, and where it stands."""

    param: Tensor
    layer: int  # index of its layer
    group: int  # index of its param group
    position: int  # in the group
    number: int  # among all parameters of the optimizer, frozen ones too


@dataclass(frozen=True)
class Part:
    """The parameters of one backend, device and sharding."""

    work: backends.AdamWWork
    members: list[int]  # positions in the list of active parameters
    reduction: sharding.Reduction | None  # over which ranks sums of squares are added

    def reduced(self, norm_sq: Tensor) -> Tensor:
        """Sums of squares over all ranks."""
        if self.reduction is not None:
            self.reduction.sum_(norm_sq)
        return norm_sq


class StepWork:
    """What a step over some parameters needs, prepared when first used and kept.

    Args:
        active: the parameters.
        groups: the optimizer's param groups.
        states: the optimizer's state; what is missing is made when a gradient comes.
        num_layers: number of layers.
        state_dtype: dtype of the moments; None: float32 or wider.
        rounding: whether steps will round stochastically.
        recadam: what anchors are kept for; None: no anchors.
        watched: whether `gather_unchanged` is to serve; it looks at all of the optimizer.
    """

    def __init__(
        self,
        active: Sequence[Active],
        groups: Sequence[dict[str, Any]],
        states: MutableMapping[Tensor, dict[str, Any]],
        num_layers: int,
        *,
        state_dtype: torch.dtype | None,
        rounding: bool,
        recadam: RecAdam | None,
        watched: bool,
    ) -> None:
        self.active = list(active)
        self._groups = groups
        self._states = states
        self._num_layers = num_layers
        self._state_dtype = state_dtype
        self._rounding = rounding
        self._recadam = in_effect(recadam)
        self._params = _ids(groups)
        # Plain tensors, the common case, are not asked in every step whether they are sharded.
        sharded = any(sharding.is_sharded(one.param) for one in self.active)
        self._local = sharding.local if sharded else _itself
        # Parameters whose moments were made by the last `gather`, and whether the anchor was too.
        self._fresh: list[tuple[Tensor, bool]] = []
        self._key: list[Any] | None = None
        self._parts: list[Part] = []
        self._watched = watched
        self._watch: Watch | None = None
        self._with_grad: Set[int] | None = None  # layers, as `gather_unchanged` found them

    def is_over(
        self, groups: Sequence[dict[str, Any]], states: MutableMapping[Tensor, dict[str, Any]]
    ) -> bool:
        """Whether these are still the optimizer's groups, parameters and state.

        All of them may be assigned to: Accelerate exchanges the parameters after sharding.
        """
        return self._groups is groups and self._states is states and self._params == _ids(groups)

    def gather_unchanged(
        self, groups: Sequence[dict[str, Any]], states: MutableMapping[Tensor, dict[str, Any]]
    ) -> list[tuple[Part, Any]] | None:
        """What `gather` would give, where nothing was exchanged and all gradients are ordinary.

        None where that is not so, and where it is not known: `is_over` and `gather` see to it then.
        """
        self._with_grad = None
        if self._watch is None or self._groups is not groups or self._states is not states:
            return None
        grads = self._watch.gradients() if self._watch.unchanged() else None
        if grads is None:
            return None
        self._fresh = []
        self._with_grad = self._watch.layers_with_grad
        return list(zip(self._parts, grads, strict=True))

    def gather(self) -> list[tuple[Part, Any]]:
        """Check the gradients, make missing state, and give each backend its gradients.

        Raises:
            ValueError: a gradient or a moment does not fit; nothing has been changed then.
        """
        self._with_grad = None
        grads = [self._checked_grad(one) for one in self.active]
        self._fresh = []
        try:
            for one, grad in zip(self.active, grads, strict=True):
                if grad is not None:
                    anchored = ANCHOR in self._states.get(one.param, {})
                    if self._ensure_state(one):
                        self._fresh.append((one.param, not anchored))
            self._refresh()
            self._remember()
            return [
                (part, part.work.gather([grads[member] for member in part.members]))
                for part in self._parts
            ]
        except Exception:
            self.drop_fresh()
            raise

    def layers_with_grad(self) -> Set[int]:
        """Indices of the layers of which a parameter has a gradient."""
        if self._with_grad is not None:
            return self._with_grad
        return {one.layer for one in self.active if one.param.grad is not None}

    def drop_fresh(self) -> None:
        """Take back the state that the last `gather` made: the step does not happen."""
        for param, with_anchor in self._fresh:
            state = self._states.pop(param)
            if not with_anchor:  # of an earlier time, when the parameter had other values
                self._states[param] = {ANCHOR: state[ANCHOR]}
        self._fresh = []

    def keep_fresh(self) -> None:
        """From here on the state that the last `gather` made is no longer that of the beginning."""
        self._fresh = []

    def _checked_grad(self, one: Active) -> Tensor | None:
        grad = one.param.grad
        if grad is None:
            return None
        check_grad(grad, one.param, self._groups[one.group], one.group, one.position)
        return sharding.local_grad(grad, one.param)

    def _ensure_state(self, one: Active) -> bool:
        amsgrad = self._groups[one.group]["amsgrad"]
        if self._is_complete(one):
            return False
        refuse_capture(one.param.device)
        return ensure_state(
            self._states[one.param],
            one.param,
            moment_dtype(one.param, self._state_dtype),
            amsgrad=amsgrad,
            step_device=self._step_device(one),
            recadam=self._recadam,
        )

    def _is_complete(self, one: Active) -> bool:
        return is_complete(
            self._states.get(one.param, {}),
            amsgrad=self._groups[one.group]["amsgrad"],
            anchored=self._recadam is not None,
        )

    def _step_device(self, one: Active) -> torch.device:
        """Where the step count of a parameter is kept."""
        ours = sharding.local(one.param)
        group = self._groups[one.group]
        name = parameter_name(group, one.group, one.position)
        on_device = backends.runs_on_device(ours, group["fused"], name)
        return ours.device if on_device else torch.device("cpu")

    def _refresh(self) -> None:
        """Prepare the parts anew when a parameter or its state is no longer the tensor it was."""
        if self._key is not None and self._now() == self._key:
            return
        for one in self.active:
            refuse_capture(one.param.device)
        self._watch = None
        found: dict[Any, tuple[list[ops.AdamWSlot], list[int]]] = {}
        for member, one in enumerate(self.active):
            if not self._is_complete(one):
                continue  # it has had no gradient yet, or none since amsgrad was turned on
            slot, kind = self._slot(one)
            slots, members = found.setdefault(kind, ([], []))
            slots.append(slot)
            members.append(member)
        self._parts = [
            Part(backend(slots, self._num_layers), members, reduction)
            for (backend, _, reduction), (slots, members) in found.items()
        ]
        self._key = self._now()

    def _remember(self) -> None:
        """Let `gather_unchanged` serve the next steps, if the core updates all."""
        native = all(isinstance(part.work, ops.NativeAdamW) for part in self._parts)
        if not self._watched or not native or (self._watch and self._watch.unchanged()):
            return
        if self._watch is None:
            params, layers = [one.param for one in self.active], [one.layer for one in self.active]
            self._watch = watch(self._groups, self._states, params, layers)
        self._watch.remember([part.members for part in self._parts])

    def _slot(self, one: Active) -> tuple[ops.AdamWSlot, Any]:
        """A parameter with its state as backends take it, and which part it belongs to."""
        param, state, group = one.param, self._states[one.param], self._groups[one.group]
        name = parameter_name(group, one.group, one.position)
        sharding.refuse_unsupported(param, name)  # FSDP1 may wrap after the optimizer was made
        dtype = moment_dtype(param, self._state_dtype)
        of_anchor = anchor_dtype(param, self._recadam)
        ours = sharding.local(param.detach())
        slot = ops.AdamWSlot(
            ours,
            laid_out(state, "exp_avg", param, dtype),
            laid_out(state, "exp_avg_sq", param, dtype),
            laid_out(state, "max_exp_avg_sq", param, dtype) if group["amsgrad"] else None,
            mend_step(state, self._step_device(one)),
            one.layer,
            one.group,
            tensor=one.number,
            first_element=sharding.first_element(param, name) if self._rounding else 0,
            anchor=None if of_anchor is None else laid_out(state, ANCHOR, param, of_anchor),
        )
        backend = backends.choose(ours, group["fused"], name)
        return slot, (backend, ours.device, sharding.reduction(param))

    def _now(self) -> list[Any]:
        """What the parts depend on."""
        key: list[Any] = [(group["amsgrad"], group["fused"]) for group in self._groups]
        for one in self.active:
            # Addresses and not objects: a tensor may get other memory in place (share_memory_,
            # .data).
            ours = self._local(one.param)
            state = self._states.get(one.param, {})
            key.append(
                (ours.shape, ours.stride(), ours.data_ptr(), *map(self._address, state.values()))
            )
        return key

    def _address(self, value: Any) -> int | None:
        return self._local(value).data_ptr() if isinstance(value, Tensor) else None


def _ids(groups: Sequence[dict[str, Any]]) -> list[int]:
    return [id(param) for group in groups for param in group["params"]]


def _itself(tensor: Tensor) -> Tensor:
    return tensor
