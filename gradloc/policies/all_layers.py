"""AllLayers: every layer trains. The baseline that the other policies are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradloc.plan import LayerPlan
from gradloc.policies.policy import LayerNames


@dataclass(frozen=True)
class AllLayers:
    """Scale 1 for every layer: the same as training with no plan."""

    needs_profile: ClassVar[bool] = False

    def __call__(self, source: LayerNames, step: int = 0) -> LayerPlan:
        """Choose all of `source.names`, at every step."""
        return LayerPlan(dict.fromkeys(source.names, 1.0), policy="all layers")
