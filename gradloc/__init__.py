"""gradloc: find the layers that react to new and changed knowledge, and train just those.

The public names; everything else is found from README.md's file map.
"""

from gradloc.grad_norms import layer_grad_norms
from gradloc.layers import LayerMap
from gradloc.optim import LocalizedAdamW
from gradloc.plan import LayerPlan
from gradloc.policies import AllLayers, RandomLayers, Retrace, TracedGradientPolicy
from gradloc.profile import GradientProfile
from gradloc.trace import trace_gradients

__version__ = "0.1.0"

__all__ = [
    "AllLayers",
    "GradientProfile",
    "LayerMap",
    "LayerPlan",
    "LocalizedAdamW",
    "RandomLayers",
    "Retrace",
    "TracedGradientPolicy",
    "layer_grad_norms",
    "trace_gradients",
]
