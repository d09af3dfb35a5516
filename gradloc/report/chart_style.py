"""What the report's charts have in common: colours and marks of methods, axes, saving, labels.

Draws no data.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradloc.report.analysis import Analysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, GRID, SHADE = "#1f2430", "#6b7280", "#e3e5ea", "#eceff3"
BASELINE = "#4c566a"
# Okabe and Ito's palette and Tol's muted one, without their palest: apart for colour-blind eyes.
# Where colours begin again, the mark differs.
_COLOURS = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#882255",
    "#117733", "#999933", "#AA4499",
)  # fmt: skip
_MARKS = "osD^vP*Xph<>"


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Args:
        colour: hexadecimal.
        mark: as matplotlib names it.
    """

    colour: str
    mark: str


def looks(analysis: Analysis) -> dict[str, Look]:
    """Method name -> how it is drawn, the same in every chart."""
    baseline = None if analysis.baseline is None else analysis.baseline.name
    others = [method.name for method in analysis.results.methods if method.name != baseline]
    found = {
        name: Look(_COLOURS[index % len(_COLOURS)], _MARKS[(index + 1) % len(_MARKS)])
        for index, name in enumerate(others)
    }
    return found if baseline is None else {baseline: Look(BASELINE, "o"), **found}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; it needs no display and no pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def dress(axes: Any) -> None:
    """Quiet axes: a light grid, no box."""
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#b6bcc8")
    axes.tick_params(color="#b6bcc8", labelcolor=INK, labelsize=8, length=3)


def plain(text: str) -> str:
    """A title for matplotlib, to which a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def spread_out(places: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Move label places apart until neighbours are `least` from one another.

    Args:
        places: where labels would like to stand, in any order.
        least: distance between two.
        low: below which none may stand, as far as there is room.
        high: above which none may.

    Returns:
        The places in the same order.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    least = min(least, (high - low) / max(len(places) - 1, 1))
    # Groups of touching labels, each around the mean of where its members would like to be.
    groups: list[list[int]] = []
    centres: list[float] = []

    def middle(members: list[int]) -> float:
        half = least * (len(members) - 1) / 2
        wanted = sum(places[member] for member in members) / len(members)
        return min(max(wanted, low + half), high - half)

    for index in order:
        groups.append([index])
        centres.append(middle(groups[-1]))
        while len(groups) > 1:
            room = least * (len(groups[-1]) + len(groups[-2])) / 2
            if centres[-1] - centres[-2] >= room:
                break
            last = groups.pop()
            centres.pop()
            groups[-1] += last
            centres[-1] = middle(groups[-1])
    result = [0.0] * len(places)
    for members, centre in zip(groups, centres, strict=True):
        for number, member in enumerate(members):
            result[member] = centre + least * (number - (len(members) - 1) / 2)
    return result
