"""Draws training losses by step, a panel a method at its chosen learning rate.

The loss is of the rows that a method trained on, so curves compare only between methods that see
the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradloc.report.analysis import Analysis
from gradloc.report.chart_style import (
    BASELINE,
    FAINT,
    INK,
    as_png,
    dress,
    looks,
    new_figure,
    plain,
)
from gradloc.report.rows import Row
from gradloc.report.runs import CHOSEN, mean
from gradloc.report.words import rate


def mean_losses(row: Row, seeds: Sequence[int] | None = None) -> list[tuple[int, float]]:
    """(step, loss), the mean over seeds with draws averaged first; steps that all runs have.

    Runs that diverged are left out, and losses above the limit of the others.

    Args:
        row: a method at a learning rate.
        seeds: to average over; None: all of the row.
    """
    by_seed = []
    for seed, runs in row.runs.items():
        if seeds is not None and seed not in seeds:
            continue
        curves = [
            {
                int(step): float(loss)
                for step, loss in run.record.get("losses") or []
                if loss is not None and loss <= run.limit
            }
            for run in runs
            if not run.diverged()
        ]
        if curves:
            by_seed.append(_mean_curve(curves))
    return sorted(_mean_curve(by_seed).items())


def _mean_curve(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    if not curves:
        return {}
    steps = set.intersection(*map(set, curves))
    return {step: mean(curve[step] for curve in curves) for step in steps}


def loss_curves(analysis: Analysis) -> bytes | None:
    """Small multiples, the baseline grey behind each.

    Returns:
        A PNG; None if no run recorded losses.
    """
    rows = [row for row in analysis.rows if row.weight is not CHOSEN and mean_losses(row)]
    if not rows:
        return None
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = new_figure(max(2.85 * columns, 5.0), 2.1 * lines + 0.3)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    look = looks(analysis)
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(grid.flat, rows, strict=False):
        dress(axes)
        style = look[row.method.name]
        if analysis.baseline_row is not None and not analysis.is_baseline(row):
            behind = mean_losses(analysis.baseline_row, list(row.runs))
            if behind:
                axes.plot(*zip(*behind, strict=True), color=BASELINE, alpha=0.45, linewidth=1.3)
        axes.plot(*zip(*mean_losses(row), strict=True), color=style.colour, linewidth=1.7)
        axes.set_title(
            plain(row.method.title), fontsize=9.5, color=style.colour, loc="left", fontweight="bold"
        )
        axes.text(
            0.98, 0.95, f"lr {rate(row.learning_rate)}", fontsize=7.5, color=FAINT,
            ha="right", va="top", transform=axes.transAxes,
        )  # fmt: skip
    figure.supxlabel("optimizer step", fontsize=9, color=INK)
    figure.supylabel("training loss, nats a token", fontsize=9, color=INK)
    return as_png(figure)
