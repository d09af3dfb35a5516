"""Matched learning: what a method forgets beside another one that has learned as much.

Learning less and forgetting less is what a lower learning rate does too. So a method's point is
held against the other one's curve of the same seed, at the same learning; where that curve does not
reach, nothing is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradloc.compare.statistics import PairedDifference, difference_from_zero
from gradloc.report.frontier import (
    dominated_area,
    floor_of_frontier,
    interpolate_on_frontier,
    mean_gap,
    pareto,
)
from gradloc.report.rows import Row
from gradloc.report.runs import Results, mean

Point = tuple[float, float]
Curves = Mapping[int, Sequence[Point]]
"""Seed -> points (learn, other loss), in nats a token."""


@dataclass(frozen=True, kw_only=True)
class Matched:
    """A row against a curve, seed by seed.

    Attributes:
        gaps: seed -> the row's loss minus that of the straight lines between the curve's points,
            at the same learning; below 0 is better.
        firm: the same, minus the least that the curve may lose there (`floor_of_frontier`): points
            that lie far apart do not flatter the row.
        beyond: seed -> the row's loss minus that of the curve's last point, for seeds on which the
            row learned more than any point of the curve. Below 0 the row is better in both.
        short: seeds on which it learned less than any point of the curve's frontier.
        unknown: seeds without a number, or without a curve.
    """

    gaps: Mapping[int, float]
    firm: Mapping[int, float]
    beyond: Mapping[int, float]
    short: tuple[int, ...]
    unknown: tuple[int, ...]

    @property
    def num_seeds(self) -> int:
        """All seeds of the row."""
        return len(self.gaps) + len(self.beyond) + len(self.short) + len(self.unknown)

    @property
    def difference(self) -> PairedDifference | None:
        """Of the gaps; None if no seed is within the curve's range."""
        return difference_from_zero(list(self.gaps.values())) if self.gaps else None


def curves(
    results: Results, method: str, measure: str, weights: Sequence[float] | None = (1.0,)
) -> dict[int, list[Point]]:
    """A method's points over its learning rates: seed -> (learn, measure), draws averaged.

    Args:
        results: of the comparison.
        method: its name.
        measure: "forget" or "text".
        weights: interpolation weights; None: all that were scored.
    """
    found: dict[int, list[Point]] = {}
    for rate in results.rates(method):
        for seed, runs in results.of(method, rate).items():
            for weight in runs[0].weights if weights is None else weights:
                point = (
                    mean(run.value("learn", weight) for run in runs),
                    mean(run.value(measure, weight) for run in runs),
                )
                if all(map(math.isfinite, point)):
                    found.setdefault(seed, []).append(point)
    return found


def matched(row: Row, other: Curves, measure: str) -> Matched:
    """Hold a row against another method's curves of the same seeds.

    Args:
        row: a method at a learning rate.
        other: of `curves`, with the same measure.
        measure: "forget" or "text".
    """
    learned, lost = row.values("learn"), row.values(measure)
    gaps: dict[int, float] = {}
    firm: dict[int, float] = {}
    beyond: dict[int, float] = {}
    short, unknown = [], []
    for seed in row.runs:
        frontier = pareto(other.get(seed, ()))
        learn, loss = learned[seed], lost[seed]
        if not len(frontier) or not math.isfinite(learn + loss):
            unknown.append(seed)
        elif learn < frontier[0, 0]:
            beyond[seed] = loss - float(frontier[0, 1])
        elif learn > frontier[-1, 0]:
            short.append(seed)
        else:
            gaps[seed] = loss - float(interpolate_on_frontier(frontier, learn))
            firm[seed] = loss - float(floor_of_frontier(frontier, learn))
    return Matched(gaps=gaps, firm=firm, beyond=beyond, short=tuple(short), unknown=tuple(unknown))


@dataclass(frozen=True, kw_only=True)
class AgainstCurve:
    """A method's whole curve against another's, over the learning that both reach.

    Attributes:
        gap: the distance of the frontiers over seeds, straight lines between their points; None
            if they overlap on no seed.
        lowest: the least that it can be; see `Gap`.
        highest: the most that it can be.
        width: of the shared range in nats, mean over these seeds.
        num_seeds: seeds of the method.
        area: seed -> area dominated, over that of the other.
    """

    gap: PairedDifference | None
    lowest: PairedDifference | None
    highest: PairedDifference | None
    width: float
    num_seeds: int
    area: Mapping[int, float]


def whole_curve(ours: Curves, theirs: Curves) -> AgainstCurve:
    """Hold a method's curves against another's of the same seeds."""
    found = [mean_gap(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    shared = [gap for gap in found if gap.width > 0]
    differences = [
        difference_from_zero([getattr(gap, name) for gap in shared]) if shared else None
        for name in ("straight", "lowest", "highest")
    ]
    return AgainstCurve(
        gap=differences[0],
        lowest=differences[1],
        highest=differences[2],
        width=mean(gap.width for gap in shared),
        num_seeds=len(ours),
        area=area_ratio(ours, theirs),
    )


def area_ratio(ours: Curves, theirs: Curves) -> dict[int, float]:
    """The area that a method's points dominate, over that of another method: seed -> ratio.

    Each seed's corner is the worst of the other's points in either loss, so that a run of ours
    that went astray adds nothing. Seeds on which the other's points span no area are left out.
    """
    found = {}
    for seed in ours:
        points = theirs.get(seed, ())
        if len(points) < 2:
            continue
        corner = (max(point[0] for point in points), max(point[1] for point in points))
        area = dominated_area(points, corner)
        if area > 0:
            found[seed] = dominated_area(ours[seed], corner) / area
    return found
