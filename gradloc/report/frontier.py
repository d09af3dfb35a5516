"""Frontiers of two losses: the points that no other beats, lines between them, the area they rule.

Plain geometry on arrays. Which points make a method's curve is decided in `matched`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from gradloc.compare.statistics import Floats

_NUM_PLACES = 256
"""At which two frontiers are compared."""


def pareto(points: ArrayLike) -> Floats:
    """The points that no other one beats, where less is better in both coordinates.

    Args:
        points: [number of points, 2]; those that are not finite are left out.

    Returns:
        [number of such points, 2], the first coordinate rising and the second falling.
    """
    given = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    given = given[np.isfinite(given).all(axis=1)]
    ordered = given[np.lexsort((given[:, 1], given[:, 0]))]
    lowest = np.minimum.accumulate(np.concatenate(([np.inf], ordered[:, 1])))[:-1]
    result: Floats = ordered[ordered[:, 1] < lowest]
    return result


def interpolate_on_frontier(points: ArrayLike, at: ArrayLike) -> Floats:
    """The second coordinate of the frontier where the first is `at`, on straight lines.

    Args:
        points: as for `pareto`; the lines go between its neighbours.
        at: first coordinates, of any shape.

    Returns:
        Shaped like `at`; nan outside of the frontier's range: nothing is extrapolated.
    """
    frontier, places = pareto(points), np.asarray(at, dtype=np.float64)
    if not len(frontier):
        return np.full(places.shape, math.nan)
    x, y = frontier.T
    found: Floats = np.interp(places, x, y, left=math.nan, right=math.nan)
    return found


def floor_of_frontier(points: ArrayLike, at: ArrayLike) -> Floats:
    """The least that a curve through the frontier's points may be, if it falls and bows downwards.

    Such a curve runs below the straight line between two neighbours, but not below the right one,
    and not below the continued lines through the next points to either side. Where points lie far
    apart the straight lines flatter whatever is held against them; this does not.

    Args:
        points: as for `pareto`.
        at: first coordinates, of any shape.

    Returns:
        Shaped like `at`, at most `interpolate_on_frontier`; nan outside of the frontier's range.
    """
    frontier, places = pareto(points), np.asarray(at, dtype=np.float64)
    straight = interpolate_on_frontier(frontier, places)
    if len(frontier) < 2:
        return straight
    x, y = frontier.T
    slopes = np.diff(y) / np.diff(x)
    left = np.clip(np.searchsorted(x, places, side="right") - 1, 0, len(x) - 2)
    floor = y[left + 1]
    before = y[left] + slopes[np.maximum(left - 1, 0)] * (places - x[left])
    floor = np.where(left > 0, np.maximum(floor, before), floor)
    following = np.minimum(left + 1, len(slopes) - 1)
    after = y[left + 1] + slopes[following] * (places - x[left + 1])
    floor = np.where(left + 1 < len(slopes), np.maximum(floor, after), floor)
    # On a point itself the curve is known.
    lowest: Floats = np.where(places == x[left], y[left], np.minimum(floor, straight))
    return lowest


def dominated_area(points: ArrayLike, corner: tuple[float, float]) -> float:
    """The area in which a point is beaten by one of `points`, up to a corner that is worst in both.

    Args:
        points: as for `pareto`. Those beyond the corner count nothing.
        corner: the largest coordinates that count.

    Returns:
        The hypervolume in two dimensions. It grows with the number of points.
    """
    frontier = pareto(points)
    frontier = frontier[(frontier < np.asarray(corner)).all(axis=1)]
    ends = np.append(frontier[1:, 0], corner[0])[: len(frontier)]
    return float(np.sum((ends - frontier[:, 0]) * (corner[1] - frontier[:, 1])))


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far one frontier lies above another, a mean over the range that they share.

    Attributes:
        straight: with straight lines between the points of both; nan where they share no range.
        lowest: the least that it can be, with the floor of the one.
        highest: the most, with the floor of the other.
        width: of the range.
    """

    straight: float
    lowest: float
    highest: float
    width: float


def mean_gap(points: ArrayLike, others: ArrayLike) -> Gap:
    """How far one frontier lies above another, over the first coordinates that both reach.

    Args:
        points: of the one, as for `pareto`.
        others: of the other.
    """
    one, other = pareto(points), pareto(others)
    nothing = Gap(straight=math.nan, lowest=math.nan, highest=math.nan, width=0.0)
    if not len(one) or not len(other):
        return nothing
    low, high = max(one[0, 0], other[0, 0]), min(one[-1, 0], other[-1, 0])
    if not low < high:
        return nothing
    edges = np.linspace(low, high, _NUM_PLACES + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    ours, theirs = (interpolate_on_frontier(points, middles) for points in (one, other))
    return Gap(
        straight=float(np.mean(ours - theirs)),
        lowest=float(np.mean(floor_of_frontier(one, middles) - theirs)),
        highest=float(np.mean(ours - floor_of_frontier(other, middles))),
        width=float(high - low),
    )
