"""Draws a loss against learning, a curve a method over its learning rates: together, and one each.

Right is more learned and down is less lost, so the lower right corner is the better one. Shaded is
what the baseline beats: one of its own points learned at least as much and lost no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradloc.report.analysis import BOTH, RATES, Analysis
from gradloc.report.chart_style import (
    BASELINE,
    FAINT,
    INK,
    SHADE,
    Look,
    as_png,
    dress,
    looks,
    new_figure,
    plain,
    spread_out,
)
from gradloc.report.frontier import pareto
from gradloc.report.frontier_points import (
    Point,
    all_means,
    mean_at,
    mean_points,
    not_drawn,
    overview_seeds,
)
from gradloc.report.runs import Method, Results
from gradloc.report.words import number_of, rate

_LEARN = "loss on updated and new facts, nats a token  (more learned →)"
_LOSS = {
    "forget": "loss on unchanged facts, nats a token  (← less forgotten)",
    "text": "loss on old ordinary text, nats a token  (← less forgotten)",
}


def frontier_overview(analysis: Analysis, loss: str) -> bytes:
    """All methods in one chart, means over the seeds that most have; a second panel with weights.

    Dashed, and with the number of its seeds: a method that lacks some of these.

    Args:
        analysis: of the comparison.
        loss: "forget" or "text".

    Returns:
        A PNG.
    """
    results = analysis.results
    chosen = overview_seeds(results)
    spans = (RATES, BOTH) if results.interpolates else (RATES,)
    figure = new_figure(11.4 if len(spans) == 2 else 8.0, 5.4)
    panels = figure.subplots(1, len(spans), squeeze=False, sharey=True)[0]
    look = looks(analysis)
    labelled: list[tuple[Any, str, list[tuple[str, Point, Look]]]] = []
    left_out = [
        f"{_cut(method.title)} (lr {rate(learning_rate)})"
        for method in _drawn_first(analysis)
        for learning_rate in not_drawn(results, method, loss, chosen.of[method.name])
    ]
    for axes, span in zip(panels, spans, strict=True):
        dress(axes)
        ends: list[tuple[str, Point, Look]] = []
        for method in _drawn_first(analysis):
            seeds = chosen.of[method.name]
            points = (
                mean_points(results, method, loss, seeds)
                if span == RATES
                else pareto(all_means(results, method, loss, seeds)).tolist()
            )
            if not points:
                continue
            style = look[method.name]
            wide = 2.6 if method == analysis.baseline else 1.6
            title, dashes = _cut(method.title), "-"
            if chosen.differs(method.name):
                title, dashes = f"{title} ({number_of(len(seeds), 'seed')})", "--"
            if span == RATES:
                _curve(axes, points, style, wide, dashes)
                ends.append((title, points[-1], style))
            else:
                axes.plot(
                    *zip(*points, strict=True),
                    color=style.colour,
                    linewidth=wide,
                    linestyle=dashes,
                    marker=style.mark,
                    markersize=3.6,
                    markeredgewidth=0,
                )
                ends.append((title, (points[0][0], points[0][1]), style))
        axes.set_title(
            f"over {span}" + (": what no other point of the method beats" if span == BOTH else ""),
            fontsize=10, color=INK, loc="left",
        )  # fmt: skip
        under = plain(_without(left_out)) if left_out and span == RATES else ""
        axes.set_xlabel(_LEARN + under, fontsize=9, color=INK)
        if not axes.xaxis_inverted():
            axes.invert_xaxis()
        labelled.append((axes, span, ends))
    # Once all is drawn: shading fixes the limits, which the panels share.
    for axes, span, ends in labelled:
        if analysis.baseline is not None:
            _shade(axes, analysis, loss, span, chosen.of[analysis.baseline.name])
        _label_ends(axes, ends)
        _corner(axes, shade=analysis.baseline.title if analysis.baseline else "")
    panels[0].set_ylabel(_LOSS[loss], fontsize=9, color=INK)
    return as_png(figure)


def frontier_multiples(analysis: Analysis, loss: str) -> bytes:
    """A panel a method, with the baseline's curve on that method's seeds behind it.

    Large marks are means over seeds, small ones single seeds, thin lines lead from each learning
    rate over the interpolation weights.

    Returns:
        A PNG.
    """
    results = analysis.results
    baseline = analysis.baseline
    methods = [m for m in results.methods if m != baseline and results.rates(m.name)]
    methods = methods or [m for m in results.methods if results.rates(m.name)]
    columns = min(4, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure = new_figure(max(2.85 * columns, 5.0), 2.75 * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    look = looks(analysis)
    for axes in grid.flat[len(methods) :]:
        axes.set_visible(False)
    for axes, method in zip(grid.flat, methods, strict=False):
        dress(axes)
        seeds = list(results.of(method.name))
        if baseline is not None and method != baseline:
            points = mean_points(results, baseline, loss, seeds)
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=BASELINE,
                    alpha=0.55,
                    linewidth=1.4,
                    marker="o",
                    markersize=3.5,
                    markeredgewidth=0,
                    zorder=2,
                )
        _one_method(axes, results, method, loss, look[method.name])
        axes.set_title(
            plain(method.title),
            fontsize=9.5,
            color=look[method.name].colour,
            loc="left",
            fontweight="bold",
        )
        axes.text(
            1,
            1.02,
            _seeds_and_gaps(results, method, loss, seeds),
            fontsize=7,
            color=FAINT,
            ha="right",
            va="bottom",
            transform=axes.transAxes,
        )
    grid[0, 0].invert_xaxis()
    grid[0, 0].margins(y=0.14)
    for axes, method in zip(grid.flat, methods, strict=False):
        _shade(axes, analysis, loss, RATES, list(results.of(method.name)))
    _corner(grid[0, 0])
    figure.supxlabel(_LEARN, fontsize=9, color=INK)
    figure.supylabel(_LOSS[loss], fontsize=9, color=INK)
    return as_png(figure)


def _seeds_and_gaps(results: Results, method: Method, loss: str, seeds: Sequence[int]) -> str:
    gaps = [rate(learning_rate) for learning_rate in not_drawn(results, method, loss, seeds)]
    without = f", lr {', '.join(gaps)} not drawn" if gaps else ""
    return number_of(len(seeds), "seed") + without


def _drawn_first(analysis: Analysis) -> list[Method]:
    """The baseline below all others."""
    methods = [m for m in analysis.results.methods if analysis.results.rates(m.name)]
    return sorted(methods, key=lambda method: method != analysis.baseline)


def _curve(
    axes: Any, points: Sequence[Point], style: Look, wide: float = 1.6, dashes: str = "-"
) -> None:
    """Over learning rates; a ring around the hottest one."""
    x, y = zip(*points, strict=True)
    axes.plot(
        x,
        y,
        color=style.colour,
        linewidth=wide,
        linestyle=dashes,
        marker=style.mark,
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=3,
    )
    axes.plot(
        x[-1],
        y[-1],
        marker="o",
        markersize=10,
        markerfacecolor="none",
        markeredgecolor=style.colour,
        markeredgewidth=1.1,
        zorder=3,
    )


def _one_method(axes: Any, results: Results, method: Method, loss: str, style: Look) -> None:
    seeds = list(results.of(method.name))
    for learning_rate in results.rates(method.name):
        weights = sorted(
            {w for runs in results.of(method.name, learning_rate).values() for w in runs[0].weights}
        )
        line = [
            p for w in weights if (p := mean_at(results, method, loss, learning_rate, w, seeds))
        ]
        if len(line) > 1:
            axes.plot(
                *zip(*line, strict=True),
                color=style.colour,
                alpha=0.4,
                linewidth=0.9,
                marker=".",
                markersize=3,
                markeredgewidth=0,
                zorder=2.5,
            )
        for seed in seeds if len(seeds) > 1 else ():
            point = mean_at(results, method, loss, learning_rate, 1.0, [seed])
            if point:
                axes.plot(
                    *point,
                    marker=style.mark,
                    markersize=3,
                    color=style.colour,
                    alpha=0.4,
                    markeredgewidth=0,
                    zorder=2.6,
                )
    points = mean_points(results, method, loss, seeds)
    if not points:
        return
    _curve(axes, points, style)
    drawn = [r for r in results.rates(method.name) if mean_at(results, method, loss, r, 1.0, seeds)]
    axes.annotate(
        f"lr {rate(drawn[-1])}", points[-1], xytext=(0, 8), textcoords="offset points",
        ha="center", va="bottom", fontsize=6.5, color=FAINT,
    )  # fmt: skip


def _shade(axes: Any, analysis: Analysis, loss: str, span: str, seeds: Sequence[int]) -> None:
    """What one of the baseline's mean points beats, up to the edges of the axes."""
    if analysis.baseline is None:
        return
    results, method = analysis.results, analysis.baseline
    points = pareto(
        mean_points(results, method, loss, seeds)
        if span == RATES
        else all_means(results, method, loss, seeds)
    )
    if not len(points):
        return
    worst, _ = axes.get_xlim()  # the axis is reversed: its left end is the worst
    _, top = axes.get_ylim()
    limits = axes.get_xlim(), axes.get_ylim()
    x = np.append(points[:, 0], max(worst, points[-1, 0]))
    y = np.append(points[:, 1], points[-1, 1])
    axes.fill_between(x, y, max(top, y.max()), step="post", color=SHADE, linewidth=0, zorder=0)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def _label_ends(axes: Any, ends: Sequence[tuple[str, Point, Look]]) -> None:
    """Titles in a column at the right, each with a line to its curve's end."""
    low, high = axes.get_ylim()
    places = [(y - low) / (high - low) for _, (_, y), _ in ends]
    moved = spread_out(places, 0.048, 0.0, 1.0)
    for (title, point, style), place in zip(ends, moved, strict=True):
        axes.annotate(
            plain(title), point, xytext=(1.035, place), textcoords="axes fraction",
            fontsize=8, color=style.colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": style.colour, "linewidth": 0.5, "alpha": 0.5,
                        "relpos": (0, 0.5), "shrinkB": 5},
        )  # fmt: skip


def _without(points: Sequence[str]) -> str:
    shown = list(points[:2]) + [f"and {len(points) - 2} more"] * (len(points) > 2)
    return f"\nnot drawn, worse than before training: {', '.join(shown)}"


def _cut(title: str) -> str:
    return title if len(title) <= 32 else title[:31] + "…"


def _corner(axes: Any, *, shade: str = "") -> None:
    """In the upper left corner, which only bad points can be in: where the good one is."""
    axes.annotate(
        "better", xy=(0.135, 0.82), xytext=(0.02, 0.965), xycoords="axes fraction",
        textcoords="axes fraction", fontsize=9, color=FAINT, va="top",
        arrowprops={"arrowstyle": "->", "color": FAINT, "relpos": (0.5, 0)},
    )  # fmt: skip
    if shade:
        axes.text(0.16, 0.965, f"shaded: beaten by {plain(shade)}", fontsize=7.5, color=FAINT,
                  va="top", transform=axes.transAxes)  # fmt: skip
