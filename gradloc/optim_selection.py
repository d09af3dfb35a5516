"""The plan in force in an optimizer: which parameters train, at which scale, in which layer.

Knows param groups and layers, not state or arithmetic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradloc.layers import LayerMap
from gradloc.optim_checks import check_plan, parameter_name
from gradloc.optim_work import Active
from gradloc.plan import LayerPlan

Groups = list[dict[str, Any]]


class Selection:
    """A plan over the parameters of an optimizer.

    Args:
        layers: the model's layers; None: all parameters are one layer.

    Attributes:
        layers: the same.
        names: of the layers.
        plan: the plan in force; None: everything trains at scale 1.
    """

    def __init__(self, layers: LayerMap | None) -> None:
        self.layers = layers
        self.names = ("all parameters",) if layers is None else layers.names
        self.plan: LayerPlan | None = None
        self._layer_ids: list[list[int]] = []  # by param group, then by parameter
        self._scales: tuple[LayerPlan | None, list[float]] = None, [1.0] * len(self.names)

    def copy(self) -> Selection:
        """One that changes by itself."""
        other = Selection(self.layers)
        other.plan, other._layer_ids = self.plan, list(self._layer_ids)
        return other

    def add_group(self, group: dict[str, Any]) -> None:
        """Look up the layers of one more param group.

        Raises:
            ValueError: a parameter is in no layer.
        """
        named = group.get("param_names", group["params"])
        layers = self.layers
        self._layer_ids.append([0 if layers is None else layers.index(name) for name in named])

    def check(self, plan: LayerPlan | None) -> None:
        """Check that a plan fits the layers, and that all it trains is in the optimizer.

        Raises:
            ValueError: it does not.
        """
        if plan is not None:
            check_plan(plan, self.layers, self._layer_ids)

    def scales(self) -> list[float]:
        """Learning-rate scales in the order of `names`; the same list as long as they are."""
        plan, scales = self._scales
        if plan is not self.plan or len(scales) != len(self.names):
            named = None if self.plan is None else self.plan.scales
            scales = [1.0 if named is None else named[name] for name in self.names]
            self._scales = self.plan, scales
        return scales

    def largest_scales(self, plan: LayerPlan | None) -> list[float]:
        """The largest scale of a layer in each param group, were this plan in force."""
        named = None if plan is None else plan.scales
        return [
            max(
                (1.0 if named is None else named[self.names[layer]] for layer in set(ids)),
                default=0.0,
            )
            for ids in self._layer_ids
        ]

    def in_force(self) -> LayerPlan:
        """The plan, or without one the plan under which all that the optimizer has trains."""
        if self.plan is not None:
            return self.plan
        present = self.present()
        return LayerPlan(
            {name: float(layer in present) for layer, name in enumerate(self.names)}, "no plan"
        )

    def num_elements(self) -> list[int] | None:
        """Elements of each layer of the model; None without layers."""
        return None if self.layers is None else [layer.num_elements for layer in self.layers]

    def present(self) -> set[int]:
        """The layers of which the optimizer has parameters."""
        return {layer for ids in self._layer_ids for layer in ids}

    def in_part(self, groups: Groups) -> set[str]:
        """Active layers that do not train as a whole.

        Some of their parameters have requires_grad=False, or have a gradient and are not in the
        optimizer.
        """
        scales, pairs = self.scales(), self.params(groups)
        idle = {layer for param, layer in pairs if not param.requires_grad and param.grad is None}
        ours = {param for param, _ in pairs}
        known = () if self.layers is None else self.layers.known_parameters()
        strange = {layer for param, layer in known if param.grad is not None and param not in ours}
        return {self.names[layer] for layer in idle | strange if scales[layer] > 0}

    def params(self, groups: Groups) -> list[tuple[Tensor, int]]:
        """All parameters, each with the index of its layer."""
        both = zip(groups, self._layer_ids, strict=True)
        return [pair for group, ids in both for pair in zip(group["params"], ids, strict=True)]

    def divide(self, groups: Groups) -> tuple[list[Active], list[tuple[Tensor, str]]]:
        """The parameters that the plan trains, and those that it freezes with their names."""
        scales = self.scales()
        active, frozen, number = [], [], 0
        for g, (group, ids) in enumerate(zip(groups, self._layer_ids, strict=True)):
            for i, (param, layer) in enumerate(zip(group["params"], ids, strict=True)):
                if scales[layer] > 0:
                    active.append(Active(param, layer, g, i, number))
                else:
                    frozen.append((param, parameter_name(group, g, i)))
                number += 1
        return active, frozen
