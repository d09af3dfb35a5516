"""RandomLike: layers at random, as many as another policy's; the control for its choice.

Embeddings stay as that policy has them: half of a small model's parameters, they would make another
experiment of every draw that has them.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass

from gradloc.plan import LayerPlan
from gradloc.policies import policy as protocol


@dataclass(frozen=True)
class RandomLike:
    """Draw as many of the blocks' layers as the inner policy trains; same arguments, same layers.

    What stands outside of the blocks (embeddings, final norm, head: layers whose names, numbers
    aside, no other layer has) trains exactly where it does with the inner policy. Among the others
    all draws are equally likely, whatever their kind.

    Args:
        policy: whose choice is controlled; it may freeze layers, and all that train must have
            scale 1.
        seed: of the draw. The global random state is neither read nor changed.

    Raises:
        ValueError: the policy is not callable. When called: it scales learning rates.
    """

    policy: protocol.Policy
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.policy):
            raise ValueError(f"policy={self.policy!r} is not callable: see gradloc.policies.Policy")

    @property
    def needs_profile(self) -> bool:
        """Whether the inner policy does."""
        return protocol.needs_profile(self.policy)

    @property
    def retrace_every(self) -> int | None:
        """When the inner policy wants to choose again."""
        return protocol.retrace_every(self.policy)

    def __call__(self, source: protocol.LayerNames, step: int = 0) -> LayerPlan:
        """Draw from `source.names`; another step draws other layers."""
        inner = self.policy(source, step)
        if scaled := [name for name, scale in inner.scales.items() if scale not in (0.0, 1.0)]:
            raise ValueError(
                f"the policy gives {scaled[0]!r} the scale {inner.scales[scaled[0]]:g}: only a "
                "choice of layers, scales 0 and 1, has a random control"
            )
        kinds = Counter(_kind(name) for name in source.names)
        drawn = [name for name in source.names if kinds[_kind(name)] > 1]
        active = set(inner.active)
        draw = random.Random(f"gradloc like {self.seed} {step}")
        chosen = active.difference(drawn)
        chosen.update(draw.sample(drawn, len(active.intersection(drawn))))
        return LayerPlan(
            {name: float(name in chosen) for name in source.names},
            policy=f"random layers, {len(chosen)} of {len(source.names)} as ({inner.policy}), "
            f"seed {self.seed}, step {step}",
        )


def _kind(name: str) -> str:
    """Layers of several blocks differ in numbers only: "h.0.attn" and "h.7.attn"."""
    return re.sub(r"\d+", "#", name)
