"""gradloc: find the layers that react to new and changed knowledge, and train just those.

The public names; everything else is found from README.md's file map. A name is imported when it is
first used, so that `gradloc doctor` can speak where the compiled module cannot be imported.
"""

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# `python` started in a clone finds this folder before the installed package, and only the installed
# one has the compiled module: look for submodules there too.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"

__all__ = [
    "AllLayers",
    "GradientProfile",
    "LayerMap",
    "LayerPlan",
    "LocalizedAdamW",
    "RandomLayers",
    "RecAdam",
    "Retrace",
    "TracedGradientPolicy",
    "layer_grad_norms",
    "trace_gradients",
]

if TYPE_CHECKING:
    from gradloc.grad_norms import layer_grad_norms
    from gradloc.layers import LayerMap
    from gradloc.optim import LocalizedAdamW
    from gradloc.plan import LayerPlan
    from gradloc.policies import AllLayers, RandomLayers, Retrace, TracedGradientPolicy
    from gradloc.profile import GradientProfile
    from gradloc.recadam import RecAdam
    from gradloc.trace import trace_gradients
else:
    # Hidden from type checkers, which would take it to mean that any name exists.
    _MODULES = {
        "AllLayers": "policies",
        "GradientProfile": "profile",
        "LayerMap": "layers",
        "LayerPlan": "plan",
        "LocalizedAdamW": "optim",
        "RandomLayers": "policies",
        "RecAdam": "recadam",
        "Retrace": "policies",
        "TracedGradientPolicy": "policies",
        "layer_grad_norms": "grad_norms",
        "trace_gradients": "trace",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
