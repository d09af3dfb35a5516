"""The layer plan of a cell: how a method's `localize` becomes a plan for the study's base model.

Traces nothing: the base was traced once, and who needs that is charged for it in `run_cell`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradloc.layers import LayerMap
from gradloc.plan import LayerPlan
from gradloc.policies import (
    AllLayers,
    Complement,
    Policy,
    RandomLayers,
    RandomLike,
    TracedGradientPolicy,
)
from gradloc.profile import GradientProfile

if TYPE_CHECKING:
    from gradloc.compare.grid import Cell
    from gradloc.compare.method_config import Localize


def choose_plan(
    cell: Cell, profile: GradientProfile, layers: LayerMap, *, reference_loss: str
) -> LayerPlan:
    """The plan of a cell.

    Args:
        cell: whose method chooses.
        profile: of the base model.
        layers: of the base model.
        reference_loss: which reference a method uses that names none.

    Raises:
        ValueError: a selection that is empty, or larger than the model.
    """
    localize = cell.method.localize
    # Draws are told apart by more than a sum, so that no two cells of a grid share one.
    seed = 1000 * cell.seed + cell.draw
    policy = _policy(localize, profile, seed, localize.reference_loss or reference_loss)
    plan = policy(profile)
    plan.check(layers.names)
    return plan


def _policy(localize: Localize, profile: GradientProfile, seed: int, reference_loss: str) -> Policy:
    def traced(mode: str, threshold: Any = "mean", **more: Any) -> TracedGradientPolicy:
        return TracedGradientPolicy(
            mode=mode, threshold=threshold, reference_loss=reference_loss, **more
        )

    def count() -> int:
        """How many layers: a number, or as many as TGL + FP chooses."""
        if localize.k is not None:
            return localize.k
        return len(traced("freeze", localize.threshold)(profile).active)

    match localize.policy:
        case "none":
            return AllLayers()
        case "freeze":
            return traced("freeze", localize.threshold)
        case "scale":
            return traced("scale", normaliser=localize.normaliser)
        case "random" if localize.share is not None:
            return RandomLayers(share=localize.share, seed=seed)
        case "random" if localize.k is not None:
            return RandomLayers(count=localize.k, seed=seed)
        case "random":
            return RandomLike(traced("freeze", localize.threshold), seed=seed)
        case "top-k":
            return traced("freeze", ("top_k", count()))
        case "bottom-k":
            return traced("freeze", ("bottom_k", count()))
        case "complement":
            return Complement(traced("freeze", localize.threshold))
    raise ValueError(f"localize policy={localize.policy!r} is not known")
