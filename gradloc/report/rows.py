"""A table's row: a method at one learning rate and interpolation weight, its values seed by seed.

The learning rate of the main table is chosen here, on validation probes only; the measured ones
have no say. Compares nothing with nothing else: `analysis` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gradloc.compare.statistics import PairedDifference, mean_sd, paired_difference
from gradloc.report.runs import CHOSEN, Method, Results, Run, Weight, mean, number


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method at one learning rate.

    Args:
        method: whose runs these are.
        weight: the interpolation weight at which they are scored; None: the one that each run's
            validation chose.
        learning_rate: theirs.
        runs: seed -> draws.
        at_edge: -1 or 1 where validation liked the coldest or the hottest of several learning
            rates best, so that the best may lie beyond; else 0.
    """

    method: Method
    weight: Weight
    learning_rate: float
    runs: Mapping[int, tuple[Run, ...]]
    at_edge: int = 0

    @property
    def title(self) -> str:
        """For people: the method's title, and "+ α" where the weight is chosen."""
        return self.method.title + (" + α" if self.weight is CHOSEN else "")

    @property
    def key(self) -> tuple[str, Weight, float]:
        """Tells rows apart."""
        return self.method.name, self.weight, self.learning_rate

    def values(self, measure: str) -> dict[int, float]:
        """A measure by seed, draws averaged first; nan for a seed with a run that has no number.

        A run that diverged has none.
        """
        return {
            seed: mean(run.value(measure, self.weight) for run in runs)
            for seed, runs in self.runs.items()
        }

    def finite(self, measure: str) -> dict[int, float]:
        """The same without seeds that have no number."""
        return {s: value for s, value in self.values(measure).items() if math.isfinite(value)}

    def diverged(self) -> list[int]:
        """Seeds with a run that diverged at the row's weight."""
        return [
            seed
            for seed, runs in self.runs.items()
            if any(run.diverged(self.weight) for run in runs)
        ]

    def spread(self, measure: str) -> tuple[float, float]:
        """Mean and standard deviation over seeds that have the number; nan for none."""
        values = list(self.finite(measure).values())
        return mean_sd(values) if values else (math.nan, math.nan)

    def recorded(self, *path: str) -> dict[int, float]:
        """A number of the records by seed, draws averaged first; see `number`."""
        return {
            seed: mean(number(run.record, *path) for run in runs)
            for seed, runs in self.runs.items()
        }

    def alphas(self) -> list[float]:
        """The interpolation weights of its runs: those chosen, or the one given."""
        runs = [run for draws in self.runs.values() for run in draws]
        return [
            number(run.record, "alpha") if self.weight is CHOSEN else self.weight for run in runs
        ]


def difference(row: Row, other: Row, measure: str) -> PairedDifference | None:
    """Row minus other over the seeds on which both have the number; None if there are none."""
    ours, theirs = row.finite(measure), other.finite(measure)
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    return paired_difference([ours[s] for s in seeds], [theirs[s] for s in seeds])


def best_row(results: Results, method: Method, weight: Weight = 1.0) -> Row | None:
    """The method at the learning rate with the least learn + forget on validation probes.

    Rates are compared on the seeds that have runs at every rate; in an unfinished grid in which
    there is none, only the rates with the most seeds are compared. A run without a finite loss
    speaks against its rate.

    Returns:
        None if the method has no finished run.
    """
    by_rate = {rate: results.of(method.name, rate) for rate in results.rates(method.name)}
    if not by_rate:
        return None
    shared = set.intersection(*(set(runs) for runs in by_rate.values()))
    most = max(len(runs) for runs in by_rate.values())

    def loss(rate: float) -> float:
        runs = by_rate[rate]
        if not shared and len(runs) < most:
            return math.inf
        value = mean(
            mean(run.validation(weight) for run in draws)
            for seed, draws in runs.items()
            if not shared or seed in shared
        )
        return value if math.isfinite(value) else math.inf

    # Of equals the lowest: the plainer choice.
    rate = min(by_rate, key=lambda rate: (loss(rate), rate))
    swept = sorted(by_rate)
    edge = 0 if len(swept) == 1 else (rate == swept[-1]) - (rate == swept[0])
    return Row(method=method, weight=weight, learning_rate=rate, runs=by_rate[rate], at_edge=edge)


def row_at(results: Results, method: Method, rate: float, weight: Weight = 1.0) -> Row | None:
    """The method at a given learning rate; None if it has no finished run there."""
    runs = results.of(method.name, rate)
    if not runs:
        return None
    return Row(method=method, weight=weight, learning_rate=rate, runs=runs)
