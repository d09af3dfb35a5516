"""The points that the frontier charts show: means over seeds of (learn, other loss).

Draws averaged first, seeds without finite numbers left out. For pictures only: what is said and
tabulated is computed seed by seed, in `matched`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradloc.report.runs import Method, Results, mean

Point = tuple[float, float]


def shared_seeds(results: Results) -> list[int]:
    """The seeds that every method has runs of, or all of them where there is none such."""
    of_methods = [set(runs) for m in results.methods if (runs := results.of(m.name))]
    shared = set.intersection(*of_methods) if of_methods else set()
    return sorted(shared or set().union(*of_methods))


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
) -> Point | None:
    """Mean over those of the seeds that have finite numbers there; None if there are none."""
    runs_of: Mapping[int, Any] = results.of(method.name, learning_rate)
    points = []
    for seed in seeds:
        runs = runs_of.get(seed, ())
        point = tuple(mean(run.value(what, weight) for run in runs) for what in ("learn", loss))
        if all(map(math.isfinite, point)):
            points.append(point)
    if not points:
        return None
    return mean(p[0] for p in points), mean(p[1] for p in points)
