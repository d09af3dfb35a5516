"""RandomLayers: layers drawn at random, the control for every claim that a choice matters."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from gradloc.plan import LayerPlan
from gradloc.policies.policy import LayerNames


@dataclass(frozen=True)
class RandomLayers:
    """Draw layers uniformly, without replacement; the same (seed, step) gives the same layers.

    Args:
        count: how many layers train.
        share: or which share of them, in (0, 1]; rounded to whole layers, at least one. With
            neither: one half.
        seed: of the draw. The global random state is neither read nor changed.

    Raises:
        ValueError: both count and share, or one out of range. When called: a count above the number
            of layers.
    """

    count: int | None = None
    share: float | None = None
    seed: int = 0

    needs_profile: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.count is not None and self.share is not None:
            raise ValueError(f"count={self.count!r} and share={self.share!r}: give one of the two")
        if self.count is not None and (not isinstance(self.count, int) or self.count < 1):
            raise ValueError(f"count={self.count!r}: at least 1 layer must train")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share={self.share!r}: give a share in (0, 1]")

    def __call__(self, source: LayerNames, step: int = 0) -> LayerPlan:
        """Draw from `source.names`; another step draws other layers."""
        names = source.names
        share = 0.5 if self.share is None else self.share
        count = max(1, round(share * len(names))) if self.count is None else self.count
        if count > len(names):
            raise ValueError(f"count={count}: there are only {len(names)} layers")
        # Seeding by a string mixes both numbers (sha512), so that neighbouring steps are unrelated.
        chosen = set(random.Random(f"gradloc {self.seed} {step}").sample(range(len(names)), count))
        scales = {name: float(index in chosen) for index, name in enumerate(names)}
        return LayerPlan(
            scales, policy=f"random layers, {count} of {len(names)}, seed {self.seed}, step {step}"
        )
