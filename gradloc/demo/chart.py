"""Draws learning against keeping as an SVG: a small dot a run, a large one a method's mean.

Only draws; what the picture says in words is in `findings`.
"""

from __future__ import annotations

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
    """An `<svg>` element: right is more learned, up is more kept."""
    points = {method: [_point(run.scores) for run in outcome.of(method)] for method in METHODS}
    base = _point(outcome.base)
    everything = [base, *(point for runs in points.values() for point in runs)]
    x_axis = _Axis([x for x, _ in everything], _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis([y for _, y in everything], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="Share of changed facts learned against share of unchanged facts kept">'
    ]
    parts += _grid(x_axis, y_axis)
    parts += _mark(x_axis(base[0]), y_axis(base[1]), "#888", "before", hollow=True)
    labels = []
    for method, runs in points.items():
        colour = COLOURS[method.name]
        parts += [
            f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3" fill="{colour}" '
            'opacity="0.45"/>'
            for x, y in runs
        ]
        x, y = (mean_and_sd(values)[0] for values in zip(*runs, strict=True))
        parts.append(
            f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="6.5" fill="{colour}" '
            'stroke="white" stroke-width="1.5"/>'
        )
        labels.append((colour, method.title))
    for number, (colour, title) in enumerate(labels):
        y = _TOP + 14 + number * 22
        parts.append(f'<circle cx="{_WIDTH - _RIGHT + 24}" cy="{y}" r="6" fill="{colour}"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 36}" y="{y + 4}">{escape(title)}</text>')
    parts.append("</svg>")
    return "\n".join(parts)


class _Axis:
    """Shares onto pixels, with room around them and ticks at round shares."""

    def __init__(self, values: list[float], begin: float, end: float) -> None:
        low, high = min(values), max(values)
        room = max(0.08 * (high - low), 0.02)
        self.low, self.high = max(0.0, low - room), min(1.0, high + room)
        self.begin, self.end = begin, end
        step = next(s for s in (0.02, 0.05, 0.1, 0.2, 0.25, 1) if (self.high - self.low) / s <= 6)
        first = int(self.low / step - 1e-9) + (self.low > 0)
        self.ticks = [step * n for n in range(first, int(self.high / step + 1e-9) + 1)]

    def __call__(self, value: float) -> float:
        place = (value - self.low) / (self.high - self.low)
        return self.begin + place * (self.end - self.begin)


def _point(scores: Scores) -> tuple[float, float]:
    learned = (scores.probes["updated"].exact_match + scores.probes["new"].exact_match) / 2
    return learned, scores.probes["unchanged"].exact_match


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    parts = []
    for tick in x_axis.ticks:
        x = x_axis(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y_axis.begin}" y2="{y_axis.end}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{y_axis.begin + 17}" text-anchor="middle">{tick:.0%}</text>'
        )
    for tick in y_axis.ticks:
        y = y_axis(tick)
        parts.append(f'<line x1="{x_axis.begin}" x2="{x_axis.end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{x_axis.begin - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.0%}</text>'
        )
    middle = (x_axis.begin + x_axis.end) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">'
        "updated and new facts completed →</text>"
    )
    middle = (y_axis.begin + y_axis.end) / 2
    parts.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
        "unchanged facts completed →</text>"
    )
    return parts


def _mark(x: float, y: float, colour: str, label: str, *, hollow: bool) -> list[str]:
    fill = "white" if hollow else colour
    return [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{fill}" stroke="{colour}" '
        'stroke-width="2"/>',
        f'<text x="{x + 12:.1f}" y="{y + 4:.1f}" fill="{colour}">{escape(label)}</text>',
    ]
