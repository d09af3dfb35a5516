"""Complement: the layers that another policy leaves frozen, the control for what it selects.

If a selection matters, training what it left out must do worse. Chooses nothing by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradloc.plan import LayerPlan
from gradloc.policies import policy as protocol


@dataclass(frozen=True)
class Complement:
    """Scale 1 where another policy has 0, and 0 where it trains, at whatever scale.

    Args:
        policy: what chooses; also says whether it needs a profile and when it is asked again.

    Raises:
        ValueError: the policy is not callable. When called: it freezes no layer.
    """

    policy: protocol.Policy

    def __post_init__(self) -> None:
        if not callable(self.policy):
            raise ValueError(f"policy={self.policy!r} is not callable: see gradloc.policies.Policy")

    @property
    def retrace_every(self) -> int | None:
        """Optimizer steps between two choices of the inner policy, None if it chooses once."""
        return protocol.retrace_every(self.policy)

    @property
    def needs_profile(self) -> bool:
        """Whether the inner policy does."""
        return protocol.needs_profile(self.policy)

    def __call__(self, source: protocol.LayerNames, step: int = 0) -> LayerPlan:
        """Train what the inner policy freezes at this step."""
        plan = self.policy(source, step)
        if not plan.frozen:
            raise ValueError(
                f"nothing would train: {plan} freezes no layer, so its complement is empty; give "
                "Complement a policy that freezes some, such as TracedGradientPolicy('freeze')"
            )
        return LayerPlan(
            {name: float(scale == 0) for name, scale in plan.scales.items()},
            policy=f"complement of ({plan.policy})",
        )
