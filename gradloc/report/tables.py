"""The report's tables of scores: at each method's chosen learning rate, at equal ones, matched.

Puts numbers of an `Analysis` into cells. What a run cost is in `cost_tables`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradloc.compare.statistics import PairedDifference, mean_sd
from gradloc.report.analysis import BOTH, RATES, Analysis
from gradloc.report.matched import Matched
from gradloc.report.rows import Row
from gradloc.report.runs import CHOSEN, KINDS, mean, number
from gradloc.report.table import Cell, Table
from gradloc.report.verdicts import Standing, clear, standing, whole_standing
from gradloc.report.words import (
    NOTHING,
    fixed,
    interval,
    number_of,
    rate,
    share_of_weights,
    signed,
    spread,
    three_digits,
)

LOSSES = ("learn", "forget", "text")


_MARKS = {Standing.LESS: "better", Standing.MORE: "worse"}


def perplexity_table(analysis: Analysis) -> Table:
    """The paper's table: perplexity of probes by kind and of ordinary text, a row a method."""
    places = [(part, name) for part in ("probes", "text") for name in analysis.results.scored(part)]
    rows = []
    if analysis.results.bases:
        bases = [record["scores"]["1"] for record in analysis.results.bases.values()]
        rows.append(
            [
                Cell("Before training", number_of(len(bases), "seed")),
                Cell(NOTHING),
                *(_base_cell(bases, part, name) for part, name in places),
            ]
        )
    rows += [
        [
            _named(row),
            _layers(row),
            *(_perplexity(row, f"perplexity {part} {name}") for part, name in places),
        ]
        for row in analysis.rows
    ]
    return Table(
        columns=("method", "layers", *(_heading(part, name) for part, name in places)),
        rows=rows,
        reference=0 if analysis.results.bases else None,
    )


def _heading(part: str, name: str) -> str:
    if part == "text":
        return f"{name} text"
    return f"{name} facts" if name in KINDS else name


def loss_table(analysis: Analysis) -> Table:
    """Losses in nats a token, and their paired differences from the baseline."""
    return _losses(analysis, analysis.rows, equal=False)


def equal_rate_table(analysis: Analysis, learning_rate: float) -> Table:
    """The same with every method at one learning rate, the baseline too."""
    return _losses(analysis, analysis.equal_rates[learning_rate], equal=True)


def _losses(analysis: Analysis, rows: Sequence[Row], *, equal: bool) -> Table:
    compare = analysis.at_equal_rate if equal else analysis.difference
    columns = ["method", *LOSSES]
    if analysis.baseline is not None:
        columns += [f"Δ {name}" for name in LOSSES]
    body = []
    for row in rows:
        cells = [_named(row, with_rate=not equal), *(_spread(row, measure) for measure in LOSSES)]
        if analysis.baseline is not None:
            cells += [_difference(compare(row, measure)) for measure in LOSSES]
        body.append(cells)
    reference = [index for index, row in enumerate(rows) if analysis.is_baseline(row)]
    return Table(columns=columns, rows=body, reference=reference[0] if reference else None)


def matched_table(analysis: Analysis, loss: str) -> Table:
    """A loss at matched learning: the row's minus that of the baseline's curve.

    Args:
        analysis: of the comparison.
        loss: "forget" or "text".
    """
    spans = (RATES, BOTH) if analysis.results.interpolates else (RATES,)
    columns = ["method", "learn", loss]
    for span in spans:
        columns += [f"Δ, point ({span})"]
    for span in spans:
        columns += [f"Δ, whole curves ({span})"]
    areas = {row.key: _area(analysis, row, loss) for row in analysis.rows}
    with_area = any(cell.main for cell in areas.values())
    columns += ["area"] * with_area
    body = []
    for row in analysis.rows:
        points = [analysis.matched.get((row.key, loss, span)) for span in spans]
        if not any(points):
            continue
        body.append(
            [
                _named(row),
                _spread(row, "learn"),
                _spread(row, loss),
                *(_matched(held) for held in points),
                *(_whole(analysis, row, loss, span) for span in spans),
                *([areas[row.key]] if with_area else []),
            ]
        )
    return Table(columns=columns, rows=body)


def _named(row: Row, *, with_rate: bool = True) -> Cell:
    parts = []
    if with_rate:
        edge = {1: " (hottest)", -1: " (coldest)", 0: ""}[row.at_edge]
        parts.append(f"lr {rate(row.learning_rate)}{edge}")
    if row.weight is CHOSEN:
        values = sorted({value for value in row.alphas() if math.isfinite(value)})
        parts.append("α " + ", ".join(f"{value:g}" for value in values))
    parts.append(number_of(len(row.runs), "seed"))
    draws = max(len(runs) for runs in row.runs.values())
    if draws > 1:
        parts.append(f"{draws} draws")
    return Cell(row.title, ", ".join(parts))


def _layers(row: Row) -> Cell:
    plans = [run.record.get("plan") or {} for runs in row.runs.values() for run in runs]
    counts = sorted({sum(scale > 0 for scale in plan.values()) for plan in plans if plan})
    share = mean(row.recorded("share_of_parameters").values())
    if not counts:
        return Cell(NOTHING)
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    total = max(len(plan) for plan in plans)
    weights = share_of_weights(share)
    if row.method.has_adapters:
        where = f"in {number} of {total} layers"
        return Cell("adapters", f"{where}, {weights}" if weights else where)
    return Cell(f"{number} of {total}", weights)


def _base_cell(bases: Sequence[object], part: str, name: str) -> Cell:
    values = [number(base, part, name, "perplexity") for base in bases]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Cell(NOTHING)
    middle, sd = mean_sd(finite)
    return Cell(*three_digits(middle, sd))


def _perplexity(row: Row, measure: str) -> Cell:
    main, small = three_digits(*row.spread(measure))
    return Cell(main, _lost(row, measure) or small)


def _spread(row: Row, measure: str) -> Cell:
    middle, sd = row.spread(measure)
    return Cell(fixed(middle), _lost(row, measure) or ("" if math.isnan(sd) else f"± {fixed(sd)}"))


def _lost(row: Row, measure: str) -> str:
    """Says it where a mean is not over all seeds of the row."""
    lost = row.runs.keys() - row.finite(measure).keys()
    diverged = [seed for seed in row.diverged() if seed in lost]
    total = number_of(len(row.runs), "seed")
    notes = [f"diverged on {len(diverged)} of {total}"] if diverged else []
    if len(lost) > len(diverged):
        notes.append(f"no number for {len(lost) - len(diverged)} of {total}")
    return "; ".join(notes)


def _difference(found: PairedDifference | None) -> Cell:
    if found is None:
        return Cell(NOTHING)
    main = spread(found.mean, found.sd, sign=True)
    return Cell(main, interval(found), _mark(found))


def _matched(held: Matched | None) -> Cell:
    if held is None:
        return Cell(NOTHING)
    notes = []
    found = held.difference
    if found is not None:
        if len(found.differences) < held.num_seeds:
            notes.append(f"on {number_of(len(found.differences), 'seed')}")
        if interval(found):
            notes.append(interval(found))
        firm = spread(*mean_sd(list(held.firm.values())), sign=True)
        if firm != spread(found.mean, found.sd, sign=True):
            notes.append(f"firm {firm}")
    if held.beyond:
        values = list(held.beyond.values())
        notes.append(
            f"beyond its range on {number_of(len(values), 'seed')}: "
            f"{spread(*mean_sd(values), sign=True)} from its last point"
        )
    if held.short:
        notes.append(f"learned less than it on {number_of(len(held.short), 'seed')}")
    if held.unknown:
        notes.append(f"no number on {number_of(len(held.unknown), 'seed')}")
    main = NOTHING if found is None else spread(found.mean, found.sd, sign=True)
    return Cell(main, "; ".join(notes), _MARKS.get(standing(held), ""))


def _whole(analysis: Analysis, row: Row, loss: str, span: str) -> Cell:
    whole = analysis.whole.get((row.method.name, loss, span))
    if row.weight is CHOSEN or whole is None:
        return Cell("")
    if whole.gap is None or whole.lowest is None or whole.highest is None:
        return Cell(NOTHING, "no shared range")
    num = len(whole.gap.differences)
    notes = [f"over {fixed(whole.width)} nats"]
    if num < whole.num_seeds:
        notes.append(f"on {number_of(num, 'seed')}")
    ends = signed(whole.lowest.mean), signed(whole.highest.mean)
    if ends[0] != ends[1]:
        notes.append(f"firm {ends[0]} to {ends[1]}")
    return Cell(
        spread(whole.gap.mean, whole.gap.sd, sign=True),
        ", ".join(notes),
        _MARKS.get(whole_standing(whole), ""),
    )


def _area(analysis: Analysis, row: Row, loss: str) -> Cell:
    whole = analysis.whole.get((row.method.name, loss, RATES))
    if row.weight is CHOSEN or whole is None or not whole.area:
        return Cell("")
    middle, sd = mean_sd(list(whole.area.values()))
    return Cell(f"× {fixed(middle)}", "" if math.isnan(sd) else f"± {fixed(sd)}")


def _mark(found: PairedDifference) -> str:
    return {-1: "better", 0: "", 1: "worse"}[clear(found)]
