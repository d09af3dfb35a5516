"""The points that the frontier charts show: means over seeds of (learn, other loss).

Draws averaged first, seeds without finite numbers left out. A point that is worse on what was to be
learned than before training is not drawn: the rest would shrink to a corner. For pictures only:
what is said and tabulated is computed seed by seed, in `matched`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradloc.report.runs import MEASURES, Method, Results, mean

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class OverviewSeeds:
    """The seeds over which the chart of all methods takes its means.

    Attributes:
        common: those that at least half of the methods have, or all where there is none such.
        of: method -> those of the common seeds that it has, or its own where it has none of them.
    """

    common: tuple[int, ...]
    of: Mapping[str, tuple[int, ...]]

    def differs(self, method: str) -> bool:
        """Whether a method is drawn on other seeds than most, so that it is to be marked."""
        return self.of[method] != self.common


def overview_seeds(results: Results) -> OverviewSeeds:
    """Choose seeds so that a method that lacks some, or has more, changes nobody else's curve."""
    of_methods = {m.name: tuple(runs) for m in results.methods if (runs := results.of(m.name))}
    counts = Counter(seed for seeds in of_methods.values() for seed in seeds)
    common = [seed for seed in counts if 2 * counts[seed] >= len(of_methods)] or list(counts)
    return OverviewSeeds(
        common=tuple(sorted(common)),
        of={
            name: tuple(seed for seed in seeds if seed in common) or seeds
            for name, seeds in of_methods.items()
        },
    )


def mean_points(
    results: Results, method: Method, loss: str, seeds: Sequence[int], weight: float = 1.0
) -> list[Point]:
    """Means over seeds, a point a learning rate, from cold to hot."""
    found = (
        mean_at(results, method, loss, learning_rate, weight, seeds)
        for learning_rate in results.rates(method.name)
    )
    return [point for point in found if point]


def all_means(results: Results, method: Method, loss: str, seeds: Sequence[int]) -> list[Point]:
    """Means over seeds at every learning rate and interpolation weight."""
    weights = sorted({w for run in results.runs if run.method == method.name for w in run.weights})
    return [p for w in weights for p in mean_points(results, method, loss, seeds, w)]


def mean_at(
    results: Results,
    method: Method,
    loss: str,
    learning_rate: float,
    weight: float,
    seeds: Sequence[int],
    *,
    worse_too: bool = False,
) -> Point | None:
    """Mean over those of the seeds that have finite numbers there.

    Returns:
        None if there are none, or if it learned less than nothing and is not asked for.
    """
    runs_of: Mapping[int, Any] = results.of(method.name, learning_rate)
    points = []
    for seed in seeds:
        runs = runs_of.get(seed, ())
        point = tuple(mean(run.value(what, weight) for run in runs) for what in ("learn", loss))
        if all(map(math.isfinite, point)):
            points.append(point)
    if not points:
        return None
    learn, other = (mean(values) for values in zip(*points, strict=True))
    return (learn, other) if worse_too or learn <= _before(results, seeds) else None


def not_drawn(results: Results, method: Method, loss: str, seeds: Sequence[int]) -> list[float]:
    """Learning rates whose point is left out for having learned less than nothing."""
    return [
        learning_rate
        for learning_rate in results.rates(method.name)
        if mean_at(results, method, loss, learning_rate, 1.0, seeds, worse_too=True)
        and not mean_at(results, method, loss, learning_rate, 1.0, seeds)
    ]


def _before(results: Results, seeds: Sequence[int]) -> float:
    """Loss of the bases on what is to be learned; infinite where it is not known."""
    found = [
        MEASURES["learn"](results.bases[s]["scores"]["1"]) for s in seeds if s in results.bases
    ]
    known = [value for value in found if math.isfinite(value)]
    return mean(known) if known else math.inf
