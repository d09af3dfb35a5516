"""The report's tables of what runs cost, and of every single run.

Puts recorded numbers into cells; judges nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from gradloc.compare.statistics import mean_sd
from gradloc.report.analysis import Analysis
from gradloc.report.rows import Row
from gradloc.report.runs import CHOSEN, KINDS, Run, Weight, mean, number
from gradloc.report.table import Cell, Table
from gradloc.report.words import NOTHING, fixed, rate, seconds, three_digits
from gradloc.wording import bytes_in_words

EXTRA = ("trace", "generate")
"""Seconds that a run takes beside its training because of its method; scoring is nobody's."""


def cost_table(analysis: Analysis) -> Table:
    """Steps, tokens by kind, memory and time of each method at its chosen learning rate."""
    rows = [row for row in analysis.rows if row.weight is not CHOSEN]
    peak = any(math.isfinite(value) for row in rows for value in _peak(row))
    columns = [
        "method", "steps", "tokens", "new", "old", "traced", "generated", "optimizer", "extra",
        *(["peak"] if peak else []),
        "training", "tracing", "generating", "whole run", "scoring",
    ]  # fmt: skip
    if analysis.baseline_row is not None:
        columns.insert(-1, "× baseline")
    body = []
    for row in rows:
        cells = [Cell(row.title, f"lr {rate(row.learning_rate)}"), _count(row, "num_steps")]
        cells += [
            _count(row, "tokens", kind) for kind in ("total", "new", "keep", "trace", "generate")
        ]
        cells += [_bytes(row, "optimizer_bytes"), _bytes(row, "extra_bytes")]
        cells += [_bytes(row, "peak_bytes")] if peak else []
        runs = [run for draws in row.runs.values() for run in draws]
        cells.append(_seconds(training_seconds(run) for run in runs))
        cells += [_seconds(row.recorded("seconds", name).values()) for name in EXTRA]
        cells.append(_seconds(whole_run(run) for run in runs))
        if analysis.baseline_row is not None:
            cells.append(_relative(row, analysis.baseline_row))
        cells.append(_seconds(row.recorded("seconds", "score").values()))
        body.append(cells)
    reference = [index for index, row in enumerate(rows) if analysis.is_baseline(row)]
    return Table(columns=columns, rows=body, reference=reference[0] if reference else None)


def has_step_time(run: Run) -> bool:
    """Whether the run noted the median time of its steps; older records have only their sum."""
    return math.isfinite(_seconds_of_steps(run))


def training_seconds(run: Run, *, by_step: bool = True) -> float:
    """Seconds of training: the median step times the number of steps.

    The median leaves out steps that waited for whatever else the machine did.

    Args:
        run: finished.
        by_step: False, or a record without the median: the sum over all steps.
    """
    if by_step and has_step_time(run):
        return _seconds_of_steps(run)
    return number(run.record, "seconds", "train")


def whole_run(run: Run, *, by_step: bool = True) -> float:
    """Seconds of training, as `training_seconds` counts them, tracing and generating together."""
    extra = sum(number(run.record, "seconds", name) for name in EXTRA)
    return training_seconds(run, by_step=by_step) + extra


def _seconds_of_steps(run: Run) -> float:
    return number(run.record, "seconds", "step") * number(run.record, "num_steps")


def time_ratios(row: Row, baseline: Row) -> list[float]:
    """Whole run over that of the baseline, a value for each seed that ran on one machine.

    Medians of steps are compared with medians only: a seed on which a run lacks it is compared by
    sums.
    """
    found = []
    for seed, runs in row.runs.items():
        others = baseline.runs.get(seed, ())
        machines = {str(run.record.get("machine")) for run in (*runs, *others)}
        if others and len(machines) == 1:
            alike = all(map(has_step_time, (*runs, *others)))
            ours, theirs = (
                mean(whole_run(run, by_step=alike) for run in some) for some in (runs, others)
            )
            if theirs > 0 and math.isfinite(ours):
                found.append(ours / theirs)
    return found


def runs_table(analysis: Analysis, runs: Sequence[Run]) -> Table:
    """Every one of some runs: a line each, in the methods' order."""
    order = {method.name: index for index, method in enumerate(analysis.results.methods)}
    interpolates = analysis.results.interpolates
    columns = ["method", "lr", "seed", "draw", "learn", "forget", "text"]
    columns += [f"{kind} ppl" for kind in KINDS] + ["old text ppl"]
    columns += ["α", "learn", "forget", "text"] if interpolates else []
    columns += ["steps", "tokens", "whole run", "finished"]
    body = []
    for run in sorted(
        runs,
        key=lambda r: (order.get(r.method, len(order)), r.method, r.learning_rate, r.seed, r.draw),
    ):
        method = analysis.results.method(run.method)
        cells = [
            Cell(method.title if method else str(run.record.get("title", run.method))),
            Cell(rate(run.learning_rate)),
            Cell(str(run.seed)),
            Cell(str(run.draw)),
            *_measured(run, 1.0),
            *(Cell(three_digits(run.recorded(f"perplexity probes {kind}"))[0]) for kind in KINDS),
            Cell(three_digits(run.recorded("perplexity text old"))[0]),
        ]
        if interpolates:
            alpha = number(run.record, "alpha")
            cells.append(Cell(f"{alpha:g}" if math.isfinite(alpha) else NOTHING))
            cells += _measured(run, CHOSEN)
        cells += [
            Cell(_whole(number(run.record, "num_steps"))),
            Cell(_whole(number(run.record, "tokens", "total"))),
            Cell(seconds(whole_run(run))),
            Cell(str(run.record.get("finished") or NOTHING)[:16].replace("T", " ")),
        ]
        body.append(cells)
    return Table(columns=columns, rows=body)


def _measured(run: Run, weight: Weight) -> list[Cell]:
    """Losses as recorded, those of a run that diverged, too: this list leaves nothing out."""
    note = "diverged" if run.diverged(weight) else ""
    values = [run.recorded(measure, weight) for measure in ("learn", "forget", "text")]
    return [
        Cell(three_digits(value)[0] if value >= 1e6 else fixed(value, 3), note) for value in values
    ]


def _count(row: Row, *path: str) -> Cell:
    return Cell(_whole(mean(row.recorded(*path).values())))


def _whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else NOTHING


def _bytes(row: Row, name: str) -> Cell:
    value = mean(row.recorded("memory", name).values())
    return Cell(bytes_in_words(round(value)) if math.isfinite(value) else NOTHING)


def _peak(row: Row) -> Iterable[float]:
    return row.recorded("memory", "peak_bytes").values()


def _seconds(values: Iterable[float]) -> Cell:
    return Cell(seconds(mean(values)))


def _relative(row: Row, baseline: Row) -> Cell:
    ratios = time_ratios(row, baseline)
    if not ratios:
        return Cell(NOTHING, "not on one machine")
    middle, sd = mean_sd(ratios)
    return Cell(f"× {fixed(middle)}", "" if math.isnan(sd) else f"± {fixed(sd)}")
