"""Retrace: another policy, asked again every so many steps. The training loop does the tracing."""

from __future__ import annotations

from dataclasses import dataclass

from gradloc.plan import LayerPlan
from gradloc.policies import policy as protocol


@dataclass(frozen=True)
class Retrace:
    """Choose again every `every` optimizer steps, from a fresh profile if the policy needs one.

    Args:
        policy: what chooses.
        every: optimizer steps between two choices, >= 1.

    Raises:
        ValueError: `every` is not a whole number >= 1, or the policy is not callable.
    """

    policy: protocol.Policy
    every: int

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(
                f"every={self.every!r}: give the optimizer steps between two traces, at least 1"
            )
        if not callable(self.policy):
            raise ValueError(f"policy={self.policy!r} is not callable: see gradloc.policies.Policy")

    @property
    def retrace_every(self) -> int:
        """Optimizer steps between two choices."""
        return self.every

    @property
    def needs_profile(self) -> bool:
        """Whether the inner policy does."""
        return protocol.needs_profile(self.policy)

    def __call__(self, source: protocol.LayerNames, step: int = 0) -> LayerPlan:
        """What the inner policy chooses at this step."""
        return self.policy(source, step)
