"""Analysis: everything that is computed from a comparison's results, once, for all of the report.

Tables, charts and sentences read from it; nothing here is text for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradloc.compare.statistics import PairedDifference
from gradloc.report.matched import AgainstCurve, Curves, Matched, curves, matched, whole_curve
from gradloc.report.rows import Row, best_row, difference, row_at
from gradloc.report.runs import CHOSEN, Method, Results

LOSSES = ("forget", "text")
"""What is held against learning."""
RATES, BOTH = "learning rates", "learning rates × weights"
"""What a curve runs over: learning rates at weight 1, or all interpolation weights at each."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """A comparison, analysed.

    Attributes:
        results: what was read.
        baseline: what all is compared with; None if no such method has a finished run.
        rows: each method at its learning rate by validation, and after it the same at the
            interpolation weight by validation, where that is another row.
        baseline_row: of the baseline at weight 1.
        equal_rates: learning rate -> a row for each method that ran at it, rising.
        curves: (method, loss, `RATES` or `BOTH`) -> its curves.
        matched: (row key, loss, `RATES` or `BOTH`) -> the row against the baseline's curve; absent
            where the row is itself on that curve.
        whole: (method, loss, `RATES` or `BOTH`) -> its curve against the baseline's.
    """

    results: Results
    baseline: Method | None
    rows: tuple[Row, ...]
    baseline_row: Row | None
    equal_rates: Mapping[float, tuple[Row, ...]]
    curves: Mapping[tuple[str, str, str], Curves]
    matched: Mapping[tuple[tuple[str, float | None, float], str, str], Matched]
    whole: Mapping[tuple[str, str, str], AgainstCurve]

    def is_baseline(self, row: Row) -> bool:
        """Whether a row is of the baseline, at whatever weight."""
        return self.baseline is not None and row.method.name == self.baseline.name

    def difference(self, row: Row, measure: str) -> PairedDifference | None:
        """A row minus the baseline's on the same seeds; None for the baseline's own row."""
        if self.baseline_row is None or row.key == self.baseline_row.key:
            return None
        return difference(row, self.baseline_row, measure)

    def at_equal_rate(self, row: Row, measure: str) -> PairedDifference | None:
        """A row minus the baseline at the row's learning rate."""
        if self.baseline is None or self.is_baseline(row):
            return None
        other = row_at(self.results, self.baseline, row.learning_rate)
        return None if other is None else difference(row, other, measure)

    def controls_of(self, row: Row) -> list[Method]:
        """Methods that train random layers, and are else as the row's; none if it selects none."""
        if row.method.policy in ("none", "random"):
            return []
        return [
            method
            for method in self.results.methods
            if method.policy == "random"
            and method.others == row.method.others
            and self.results.rates(method.name)
        ]


def analyse(results: Results, *, baseline: str = "vanilla") -> Analysis:
    """Compute what the report tells.

    Args:
        results: of a comparison, finished or not.
        baseline: name of the method that all others are compared with.
    """
    standard = results.method(baseline)
    if standard is not None and not results.rates(standard.name):
        standard = None
    rows: list[Row] = []
    for method in results.methods:
        plain = best_row(results, method)
        if plain is None:
            continue
        rows.append(plain)
        chosen = best_row(results, method, CHOSEN) if results.interpolates else None
        if chosen is not None and (
            chosen.learning_rate != plain.learning_rate or set(chosen.alphas()) != {1.0}
        ):
            rows.append(chosen)
    spans = (RATES, BOTH) if results.interpolates else (RATES,)
    all_curves = {
        (method.name, loss, span): curves(
            results, method.name, loss, (1.0,) if span == RATES else None
        )
        for method in results.methods
        for loss in LOSSES
        for span in spans
    }
    return Analysis(
        results=results,
        baseline=standard,
        rows=tuple(rows),
        baseline_row=next(
            (row for row in rows if standard is not None and row.method == standard), None
        ),
        equal_rates=_equal_rates(results),
        curves=all_curves,
        matched=_matched(rows, standard, all_curves),
        whole=_whole(results, standard, all_curves),
    )


def _equal_rates(results: Results) -> dict[float, tuple[Row, ...]]:
    rates = sorted({run.learning_rate for run in results.runs})
    return {
        rate: tuple(
            row for method in results.methods if (row := row_at(results, method, rate)) is not None
        )
        for rate in rates
    }


def _matched(
    rows: list[Row], standard: Method | None, all_curves: Mapping[tuple[str, str, str], Curves]
) -> dict[tuple[tuple[str, float | None, float], str, str], Matched]:
    if standard is None:
        return {}
    found = {}
    for row in rows:
        for (name, loss, span), other in all_curves.items():
            own = row.method == standard and (span == BOTH or row.weight is not CHOSEN)
            # The baseline itself at weight 1 is a point of both of its curves, too.
            if name == standard.name and not own:
                found[row.key, loss, span] = matched(row, other, loss)
    return found


def _whole(
    results: Results,
    standard: Method | None,
    all_curves: Mapping[tuple[str, str, str], Curves],
) -> dict[tuple[str, str, str], AgainstCurve]:
    if standard is None:
        return {}
    return {
        (name, loss, span): whole_curve(ours, all_curves[standard.name, loss, span])
        for (name, loss, span), ours in all_curves.items()
        if name != standard.name and ours
    }
