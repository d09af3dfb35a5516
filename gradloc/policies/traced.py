"""TracedGradientPolicy: the paper's two selections, TGL + FP (freeze) and TGL + ALR (scale).

Fernandez, Bisk & Strubell, Findings of EMNLP 2024 (arXiv 2411.04448). Measures nothing; see
`trace_gradients`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradloc.measurement import REFERENCE_LOSSES
from gradloc.plan import LayerPlan
from gradloc.policies.policy import LayerNames
from gradloc.policies.threshold import Threshold, chosen_layers, read_threshold
from gradloc.profile import GradientProfile


@dataclass(frozen=True)
class TracedGradientPolicy:
    """Train the layers whose relative gradient norm R is high.

    Args:
        mode: "freeze": scale 1 where R is above the threshold, else 0. "scale": scale R /
            normaliser everywhere.
        threshold: for "freeze": "mean", ("quantile", q) with 0 <= q < 1, ("top_k", k), or a number;
            ("bottom_k", k) trains the k layers whose R is lowest, a control for the others.
        normaliser: for "scale": "mean" (of R over the layers; scales average 1) or "max" (no scale
            above 1).
        reference_loss: which reference R is taken against, "all" or "matched-spans"; the profile
            must hold it.
        kinds: use only these probe kinds; None: all of the profile's.

    Raises:
        ValueError: an unknown mode, threshold, normaliser or reference, or one that the mode does
            not use. When called: a source that is not a profile or lacks the reference or the
            kinds, and when no layer would train.
    """

    mode: str = "freeze"
    threshold: Threshold = "mean"
    normaliser: str = "mean"
    reference_loss: str = "all"
    kinds: Sequence[str] | None = None

    def __post_init__(self) -> None:
        choices = {
            "mode": ("freeze", "scale"),
            "normaliser": ("mean", "max"),
            "reference_loss": REFERENCE_LOSSES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose from {', '.join(map(repr, allowed))}"
                )
        object.__setattr__(self, "threshold", read_threshold(self.threshold))
        if self.mode == "scale" and self.threshold != "mean":
            raise ValueError(
                f"threshold={self.threshold!r} is for mode='freeze'; mode='scale' freezes no layer"
            )
        if self.mode == "freeze" and self.normaliser != "mean":
            raise ValueError(
                f"normaliser={self.normaliser!r} is for mode='scale'; mode='freeze' has scale 1"
            )

    def __call__(self, source: LayerNames, step: int = 0) -> LayerPlan:
        """Choose by `source`, a `GradientProfile`; the step plays no part."""
        if not isinstance(source, GradientProfile):
            raise ValueError(
                f"source is a {type(source).__name__}: this policy needs a GradientProfile; make "
                "one with trace_gradients"
            )
        profile = source.with_reference(self.reference_loss)
        ratios = (profile if self.kinds is None else profile.with_kinds(self.kinds)).relative
        about = f"traced gradients, {self.mode}, reference {self.reference_loss}"
        if self.mode == "freeze":
            chosen = chosen_layers(ratios, self.threshold)
            return LayerPlan(
                {name: float(name in chosen) for name in ratios},
                f"{about}, threshold {self.threshold}",
            )
        normaliser = (
            max(ratios.values()) if self.normaliser == "max" else sum(ratios.values()) / len(ratios)
        )
        if normaliser == 0:
            raise ValueError(
                "every layer's R is 0, so nothing would train: is the loss connected to the layers?"
            )
        return LayerPlan(
            {name: ratio / normaliser for name, ratio in ratios.items()},
            f"{about} by {self.normaliser}",
        )
