"""RecAdam: the settings of the pull to the pretrained weights, and how it fades with the steps.

Computes no update: the formula stands in csrc/adamw.h and `gradloc.reference`, what a
`LocalizedAdamW` does with these settings in `gradloc/optim_anchor.py`.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

# In the order of csrc/adamw.h's numbers.
ANNEALS = ("sigmoid", "linear", "constant")
_ANCHOR_DTYPES = (None, "float32", "bfloat16")


@dataclass(frozen=True)
class RecAdam:
    """Recall while learning (Chen et al., EMNLP 2020): Adam's step, and a pull to old weights.

    In step t of a tensor Adam's step is multiplied by λ(t), and the rest of the step leads to the
    anchors θ*, the weights before training: with s the layer's scale and θ where Adam's step and
    the decoupled weight decay have led, as in the authors' code,

        θ ← θ - (1 - λ(t))·lr·s·gamma·(θ - θ*)

    Args:
        gamma: strength of the pull, the paper's γ; 0 turns all of this off, and λ plays no part.
        k: how steeply a sigmoid rises, a step; the constant itself, from 0 to 1, with "constant".
        t0: the step at which a sigmoid is a half, and at which "linear" has reached 1.
        anneal: "sigmoid" is λ(t) = 1 / (1 + exp(-k·(t - t0))), "linear" is min(1, t / t0),
            "constant" is k.
        anchor_dtype: "float32" or "bfloat16"; None: that of each parameter (float32 for float16
            ones), which holds its pretrained values exactly.

    Raises:
        ValueError: a setting out of range.
    """

    gamma: float = 5000.0
    _: KW_ONLY
    k: float = 0.5
    t0: float = 250.0
    anneal: str = "sigmoid"
    anchor_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("gamma", "k", "t0"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value!r}: a finite number of at least 0")
        if self.anneal not in ANNEALS:
            raise ValueError(f"anneal={self.anneal!r}: choose one of {', '.join(ANNEALS)}")
        if self.anneal == "constant" and self.k > 1:
            raise ValueError(f"k={self.k!r}: with anneal='constant' it is λ itself, from 0 to 1")
        if self.anneal == "linear" and not self.t0 > 0:
            raise ValueError(
                f"t0={self.t0!r}: with anneal='linear' the step, above 0, at which λ reaches 1"
            )
        if self.anchor_dtype not in _ANCHOR_DTYPES:
            raise ValueError(
                f"anchor_dtype={self.anchor_dtype!r}: 'float32' or 'bfloat16', or None for the "
                "parameter's own"
            )

    def annealed(self, step: float) -> float:
        """λ(t), the share of Adam's step, from 0 to 1.

        Args:
            step: t, the tensor's own count of steps, this one included.
        """
        if self.anneal == "constant":
            return float(self.k)
        if self.anneal == "linear":
            return min(1.0, step / self.t0)
        x = self.k * (step - self.t0)
        if x >= 0:
            return 1.0 / (1.0 + math.exp(-x))
        return math.exp(x) / (1.0 + math.exp(x))  # the same where exp(-x) would overflow
