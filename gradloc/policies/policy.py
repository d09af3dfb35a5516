"""The policy protocol: a function from a profile (or only layer names) and a step to a plan.

Any callable with this signature is a policy; there is nothing to inherit from. Chooses nothing
itself.

    def attention_only(profile, step=0):
        scales = {name: float("attn" in name) for name in profile.names}
        return LayerPlan(scales, policy="attention only")

    attention_only.needs_profile = False  # it reads only names, so nothing need be traced for it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from gradloc.plan import LayerPlan


class LayerNames(Protocol):
    """What a policy may rely on: a `LayerMap`, a `GradientProfile`, anything with layer names."""

    @property
    def names(self) -> tuple[str, ...]:
        """Layer names, in model order."""


class Policy(Protocol):
    """A way of choosing layers.

    Two attributes are read where they exist, of a function as well, through the functions below:
    `needs_profile` (default True: called with a traced profile; False: with layer names alone will
    do) and `retrace_every` (default None: asked once; else again every so many optimizer steps).
    """

    def __call__(self, source: Any, step: int = 0) -> LayerPlan:
        """Choose.

        Args:
            source: has `.names`; a `GradientProfile` if the policy needs one.
            step: the optimizer step from which on the plan holds; 0 at the start.
        """


def needs_profile(policy: Callable[..., LayerPlan]) -> bool:
    """Whether the policy reads a traced profile (the default) or only the layer names."""
    return bool(getattr(policy, "needs_profile", True))


def retrace_every(policy: Callable[..., LayerPlan]) -> int | None:
    """After how many optimizer steps the policy wants to choose again; None: never."""
    every = getattr(policy, "retrace_every", None)
    return None if every is None else int(every)
