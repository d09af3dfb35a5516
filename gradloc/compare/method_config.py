"""MethodConfig: one method of a comparison, and Localize: which layers of the model it trains.

Checks them; builds no policy, no data and no optimizer, and knows no file format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradloc.measurement import REFERENCE_LOSSES
from gradloc.policies.threshold import Threshold, read_threshold

if TYPE_CHECKING:
    from gradloc.recadam import RecAdam
    from gradloc.training.lora import Lora
    from gradloc.training.mixing import MixReview, Replay
    from gradloc.training.self_replay import SelfReplay
    from gradloc.training.slow_weights import SlowWeights

POLICIES = ("none", "freeze", "scale", "random", "top-k", "bottom-k", "complement")
_COUNTED = ("random", "top-k", "bottom-k")
# Also what a folder or a shell takes without quotes, and no space, which ends it in a cell's name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
MOST_PULL = 2.0
"""RecAdam's lr·gamma above which a step lands farther from the pretrained weights than it began."""


@dataclass(frozen=True, kw_only=True)
class Localize:
    """Which layers train.

    Args:
        policy: "none" (all layers), "freeze" (TGL+FP), "scale" (TGL+ALR), or a control: "random",
            "top-k", "bottom-k" by the traced ratio R, "complement" (what "freeze" leaves out).
        threshold: of "freeze", of "complement", and of the "freeze" that `like` means; as
            `TracedGradientPolicy` takes it.
        normaliser: of "scale": "mean" or "max".
        reference_loss: which reference R is taken against, "all" or "matched-spans"; None: the
            comparison's (`TraceConfig.reference_loss`).
        k: of the counted policies (random, top-k, bottom-k): this many layers.
        like: or as many as this policy chooses of the same profile; "freeze" is the only one, and
            the default.
        share: or this share of the layers, in (0, 1].

    Raises:
        ValueError: an unknown value, one out of range, or one that the policy does not read.
    """

    policy: str = "none"
    threshold: Threshold = "mean"
    normaliser: str = "mean"
    reference_loss: str | None = None
    k: int | None = None
    like: str | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("policy", POLICIES),
            ("normaliser", ("mean", "max")),
            ("reference_loss", (None, *REFERENCE_LOSSES)),
            ("like", (None, "freeze")),
        ):
            if getattr(self, name) not in allowed:
                shown = ", ".join(repr(value) for value in allowed if value is not None)
                raise ValueError(f"{name}={getattr(self, name)!r}: choose from {shown}")
        object.__setattr__(self, "threshold", read_threshold(self.threshold))
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k!r}: at least 1 layer must train")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share={self.share!r}: give a share in (0, 1]")
        counts = [name for name in ("k", "like", "share") if getattr(self, name) is not None]
        if len(counts) > 1:
            raise ValueError(f"{' and '.join(counts)}: each says how many layers, so give one")
        if self.policy in _COUNTED and not counts:
            object.__setattr__(self, "like", "freeze")
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        """Ignoring an option would be a silent surprise."""
        freezes = self.policy in ("freeze", "complement") or self.like is not None
        ranks = self.policy in ("scale", "top-k", "bottom-k")
        for name, untouched, is_read in (
            ("threshold", "mean", freezes),
            ("normaliser", "mean", self.policy == "scale"),
            ("reference_loss", None, freezes or ranks),
            ("k", None, self.policy in _COUNTED),
            ("like", None, self.policy in _COUNTED),
            ("share", None, self.policy in _COUNTED),
        ):
            value = getattr(self, name)
            if value != untouched and not is_read:
                raise ValueError(
                    f"{name}={value!r}: policy={self.policy!r} does not read it"
                    f"{self._counted_by()}, so leave it out"
                )

    def _counted_by(self) -> str:
        name = next((name for name in ("k", "share") if getattr(self, name) is not None), None)
        return f" with {name}" if name and self.policy in _COUNTED else ""

    @property
    def traced(self) -> bool:
        """Whether the choice reads a profile, so that a run pays for the trace."""
        return self.policy not in ("none", "random") or self.like is not None


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """One method, with the learning rates and seeds at which it runs.

    Args:
        name: in results and on the command line; no spaces.
        title: in tables and charts.
        mix: the old data among the new; None: new data only.
        recadam: the pull to the pretrained weights; None: none.
        lora: adapters in place of the weights; None: the weights themselves.
        slow_weights: None: none.
        localize: which layers train.
        learning_rates: each at least once, positive.
        seeds: of world, base and data order.
        draws: runs with other random layers at each learning rate and seed.

    Raises:
        ValueError: a value out of range, or settings that exclude one another.
    """

    name: str
    title: str
    mix: Replay | MixReview | SelfReplay | None = None
    recadam: RecAdam | None = None
    lora: Lora | None = None
    slow_weights: SlowWeights | None = None
    localize: Localize = Localize()
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    draws: int = 1

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name={self.name!r}: use letters, digits and . _ + -, beginning with a letter or "
                "digit; what people read is the title"
            )
        if not self.title.strip():
            raise ValueError(f"title={self.title!r}: give some text, or leave it out for the name")
        check_learning_rates(self.learning_rates)
        check_seeds(self.seeds)
        if self.draws < 1:
            raise ValueError(f"draws={self.draws!r}: at least 1")
        if self.draws > 1 and self.localize.policy != "random":
            raise ValueError(
                f"draws={self.draws} with localize policy={self.localize.policy!r}: only random "
                "layers are drawn; the other policies would give the same run again"
            )
        if self.lora is not None and self.recadam is not None:
            raise ValueError(
                "lora and recadam: with adapters the pretrained weights stay as they are, so "
                "there is nothing to pull back; drop one"
            )
        if self.recadam is not None:
            hottest = max(self.learning_rates)
            pull = hottest * self.recadam.gamma
            if pull > MOST_PULL:
                raise ValueError(
                    f"recadam gamma={self.recadam.gamma:g} with learning rate {hottest:g}: their "
                    f"product {pull:g} is above {MOST_PULL:g}, where a step overshoots the "
                    "pretrained weights by more than it was off; lower gamma to at most "
                    f"{MOST_PULL / hottest:g}, or give the method learning_rates of its own"
                )


def check_learning_rates(rates: Sequence[float]) -> None:
    """Raises ValueError where the rates are none, not positive, or not distinct."""
    if not rates:
        raise ValueError("learning_rates=[]: give at least one")
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"learning_rates: {rate!r} must be a number above 0")
    check_distinct("learning_rates", rates)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises ValueError where the seeds are none, negative, or not distinct."""
    if not seeds:
        raise ValueError("seeds=[]: give at least one")
    for seed in seeds:
        if seed < 0:
            raise ValueError(f"seeds: {seed!r} must be at least 0")
    check_distinct("seeds", seeds)


def check_distinct(name: str, values: Sequence[float]) -> None:
    """Raises ValueError naming the first value that stands there twice."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"{name}: {value:g} stands there twice; leave one out")
