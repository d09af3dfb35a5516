"""Ways of choosing layers, one file each: functions from a profile or names to a LayerPlan."""

from gradloc.policies.all_layers import AllLayers
from gradloc.policies.complement import Complement
from gradloc.policies.policy import LayerNames, Policy, needs_profile, retrace_every
from gradloc.policies.random_layers import RandomLayers
from gradloc.policies.random_like import RandomLike
from gradloc.policies.retrace import Retrace
from gradloc.policies.traced import TracedGradientPolicy

__all__ = [
    "AllLayers",
    "Complement",
    "LayerNames",
    "Policy",
    "RandomLayers",
    "RandomLike",
    "Retrace",
    "TracedGradientPolicy",
    "needs_profile",
    "retrace_every",
]
