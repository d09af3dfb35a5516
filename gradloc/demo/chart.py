"""Draws learning against keeping as an SVG: a small dot a run, a large one a method's mean.

Only draws; what the picture says in words is in `findings`.
"""

from __future__ import annotations

import math
from html import escape

from gradloc.demo.methods import FREEZE, FULL, GENTLE, METHODS, RANDOM, SCALE
from gradloc.demo.outcome import Outcome, Scores, mean_and_sd

COLOURS = {
    FULL.name: "#4c566a",
    GENTLE.name: "#9aa5b8",
    FREEZE.name: "#c0392b",
    SCALE.name: "#d98e04",
    RANDOM.name: "#2874a6",
}
_WIDTH, _HEIGHT = 640, 330
_LEFT, _TOP, _RIGHT, _BOTTOM = 62, 16, 150, 50


def trade_off_svg(outcome: Outcome) -> str:
    """An `<svg>` element of losses, both axes reversed: right is more learned, up is more kept.

    The model before continuing is left out: it lies so far off that the others would be one spot.
    """
    points = {}
    for method in METHODS:
        places = [_point(run.scores) for run in outcome.of(method)]
        finite = [place for place in places if all(map(math.isfinite, place))]
        if finite:
            points[method] = finite
    if not points:
        return "<p>No loss is a finite number: there is nothing to draw.</p>"
    everything = [point for runs in points.values() for point in runs]
    x_axis = _Axis([x for x, _ in everything], _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis([y for _, y in everything], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="Loss on updated and new facts against loss on unchanged facts">'
    ]
    parts += _grid(x_axis, y_axis)
    means = []
    for number, (method, runs) in enumerate(points.items()):
        colour = COLOURS[method.name]
        parts += [
            f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3" fill="{colour}" '
            'opacity="0.55"/>'
            for x, y in runs
        ]
        x, y = (mean_and_sd(values)[0] for values in zip(*runs, strict=True))
        means.append(
            f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="6.5" fill="{colour}" '
            'stroke="white" stroke-width="1.5"/>'
        )
        place = _TOP + 14 + number * 22
        means.append(
            f'<circle cx="{_WIDTH - _RIGHT + 24}" cy="{place}" r="6" fill="{colour}"/>'
            f'<text x="{_WIDTH - _RIGHT + 36}" y="{place + 4}">{escape(method.title)}</text>'
        )
    return "\n".join((*parts, *means, "</svg>"))


class _Axis:
    """Losses onto pixels, the lowest at the end, with room around them and ticks at round ones."""

    def __init__(self, values: list[float], begin: float, end: float) -> None:
        low, high = min(values), max(values)
        room = max(0.08 * (high - low), 0.02)
        self.low, self.high = low - room, high + room
        self.begin, self.end = begin, end
        span = self.high - self.low
        self.step = next(
            s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, span) if span / s <= 7
        )
        first = math.ceil(self.low / self.step)
        self.ticks = [self.step * n for n in range(first, int(self.high / self.step) + 1)]

    def __call__(self, value: float) -> float:
        place = (self.high - value) / (self.high - self.low)
        return self.begin + place * (self.end - self.begin)

    def label(self, tick: float) -> str:
        return f"{tick:.2f}" if self.step < 0.1 else f"{tick:.1f}"


def _point(scores: Scores) -> tuple[float, float]:
    return scores.learned(), scores.nll("unchanged")


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    parts = []
    for tick in x_axis.ticks:
        x, label = x_axis(tick), x_axis.label(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y_axis.begin}" y2="{y_axis.end}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{y_axis.begin + 17}" text-anchor="middle">{label}</text>'
        )
    for tick in y_axis.ticks:
        y, label = y_axis(tick), y_axis.label(tick)
        parts.append(f'<line x1="{x_axis.begin}" x2="{x_axis.end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{x_axis.begin - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    middle = (x_axis.begin + x_axis.end) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">'
        "loss on updated and new facts (more learned →)</text>"
    )
    middle = (y_axis.begin + y_axis.end) / 2
    parts.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
        "loss on unchanged facts (more kept →)</text>"
    )
    return parts
