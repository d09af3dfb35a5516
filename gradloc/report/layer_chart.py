"""Draws which layers react, and which layers each method trained: layers across, a row each.

The relative gradient norms are the base models', against both references; what a method trained
is the share of its runs in which a layer's scale was above 0, or the mean scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradloc.layer_kinds import sublayer_kind
from gradloc.measurement import ProfiledLayer
from gradloc.profile_layout import sections_of
from gradloc.report.chart_style import FAINT, INK, as_png, new_figure, plain
from gradloc.report.runs import Results, mean

_REFERENCES = {
    "all": "R against ordinary text, its loss on all tokens (as in the paper)",
    "matched-spans": "R against ordinary text, its loss on random spans as long as the probes'",
}
_IN_BLOCK = re.compile(r"(?P<stack>.+?)\.(?P<block>\d+)(?:\.(?P<part>.+))?")
_GAP = 0.45
"""Room between groups of layers, in cells."""


@dataclass(frozen=True)
class Band:
    """Rows that share a title and a scale of colours.

    Args:
        title: above them.
        rows: label -> layer -> value.
        ratio: whether 1 is the middle (ratios, log scale) or values are shares from 0 to 1.
    """

    title: str
    rows: Mapping[str, Mapping[str, float]]
    ratio: bool


def layer_heatmap(results: Results) -> bytes | None:
    """The picture, or None if no record says anything of layers."""
    bands = layer_bands(results)
    if not bands:
        return None
    names = list(dict.fromkeys(n for band in bands for row in band.rows.values() for n in row))
    columns = _columns(names)
    num_cells = columns[-1].right
    cell = min(max(10.6 / num_cells, 0.1), 0.46)
    longest = max(len(label) for band in bands for label in band.rows)
    left = 0.35 + 0.062 * min(longest, 40)
    width = left + num_cells * cell + 0.9
    width = max(width, 7.4)
    row_height, head, between = 0.25, 0.55, 0.42
    outside = max((len(x) for c in columns for x in c.labels if not x.isdigit()), default=0)
    height = head + sum(len(b.rows) * row_height + between for b in bands) + 0.042 * outside
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    limit = _limit([band for band in bands if band.ratio])
    top = head
    for index, band in enumerate(bands):
        tall = len(band.rows) * row_height
        axes = figure.add_axes(
            (left / width, 1 - (top + tall) / height, num_cells * cell / width, tall / height)
        )
        _draw_band(axes, band, columns, limit, numbers=cell >= 0.34)
        figure.text(
            left / width,
            1 - (top - 0.07) / height,
            band.title,
            fontsize=8,
            color=FAINT,
            va="bottom",
        )
        if index == 0:
            for column in columns:
                x = (left + (column.left + column.right) / 2 * cell) / width
                figure.text(
                    x,
                    1 - (top - 0.27) / height,
                    column.title,
                    fontsize=8.5,
                    color=INK,
                    ha="center",
                    va="bottom",
                    fontweight="bold",
                )
        if index == len(bands) - 1:
            _label_layers(axes, columns, cell)
        bar = figure.add_axes(
            ((left + num_cells * cell + 0.15) / width, 1 - (top + tall) / height,
             0.09 / width, tall / height)
        )  # fmt: skip
        _draw_bar(figure, bar, band, limit)
        top += tall + between
    return as_png(figure)


def layer_bands(results: Results) -> list[Band]:
    """What the picture shows, top to bottom; every value is a mean over seeds."""
    bands = []
    for reference, title in _REFERENCES.items():
        by_seed = [base.get("relative", {}).get(reference) or {} for base in results.bases.values()]
        rows = {
            kind: _mean_rows([one[kind] for one in by_seed if kind in one])
            for kind in dict.fromkeys(kind for one in by_seed for kind in one)
        }
        if rows:
            bands.append(Band(title, rows, ratio=True))
    shares: dict[str, dict[str, float]] = {}
    scales: dict[str, dict[str, float]] = {}
    for method in results.methods:
        plans = [
            [dict(run.record.get("plan") or {}) for run in runs]
            for runs in results.of(method.name).values()
        ]
        flat = [plan for of_seed in plans for plan in of_seed if plan]
        values = {scale for plan in flat for scale in plan.values()}
        if not flat or values == {1.0}:
            continue
        if values <= {0.0, 1.0}:
            shares[method.title] = _mean_rows([_mean_rows(one) for one in plans])
        else:
            scales[method.title] = _mean_rows([_mean_rows(one) for one in plans])
    for title, found, ratio in (
        ("Learning-rate scale of each layer", scales, True),
        ("Share of seeds in which the layer trained", shares, False),
    ):
        if found:
            bands.append(Band(title, _merged(found), ratio=ratio))
    return bands


@dataclass(frozen=True)
class _Column:
    """A group of layers side by side; places in cells."""

    title: str
    left: float
    layers: Mapping[int, str]
    labels: tuple[str, ...]

    @property
    def right(self) -> float:
        return self.left + len(self.labels)


def _columns(names: Sequence[str]) -> list[_Column]:
    found: list[_Column] = []
    left = 0.0
    for section in sections_of([_profiled(name) for name in names]):
        for group in section.groups:
            title = group.title
            if section.stack is None:
                title = "outside" if len(found) else ""
            found.append(_Column(title, left, group.layers, section.rows))
            left = found[-1].right + _GAP
    return found


def _profiled(name: str) -> ProfiledLayer:
    """Stack, block and kind by the name alone: a record has no model."""
    match = _IN_BLOCK.fullmatch(name)
    if match is None:
        return ProfiledLayer(name)
    part = match["part"]
    kind = "block" if part is None else sublayer_kind(part.rsplit(".", 1)[-1].lower()) or "other"
    return ProfiledLayer(name, kind=kind, stack=match["stack"], block=int(match["block"]))


def _draw_band(
    axes: Any, band: Band, columns: Sequence[_Column], limit: float, *, numbers: bool
) -> None:
    axes.set(xlim=(0, columns[-1].right), ylim=(len(band.rows), 0))
    for column in columns:
        cells = np.full((len(band.rows), len(column.labels)), np.nan)
        raw = cells.copy()
        for row, values in enumerate(band.rows.values()):
            middle = mean(values.values()) or 1.0
            for place, name in column.layers.items():
                raw[row, place] = values.get(name, math.nan)
                ratio = raw[row, place] / middle
                cells[row, place] = (
                    raw[row, place]
                    if not band.ratio
                    else math.log2(ratio)
                    if ratio > 0
                    else -2 * limit
                )
        low, high = (-limit, limit) if band.ratio else (0, 1)
        edges = column.left + np.arange(len(column.labels) + 1)
        axes.pcolormesh(
            edges, np.arange(len(band.rows) + 1), np.clip(cells, 2 * low, 2 * high),
            cmap="RdBu_r" if band.ratio else "Greys", vmin=low, vmax=high,
            edgecolors="white", linewidth=0.6,
        )  # fmt: skip
        if numbers:
            for (row, place), value in np.ndenumerate(raw):
                if math.isfinite(value):
                    shade = cells[row, place]
                    dark = abs(shade) > 0.62 * limit if band.ratio else shade > 0.55
                    text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
                    axes.text(
                        edges[place] + 0.5, row + 0.54, text,
                        ha="center", va="center", fontsize=6.5, color="white" if dark else INK,
                    )  # fmt: skip
    axes.set_yticks(
        np.arange(len(band.rows)) + 0.5, labels=[plain(_cut(label)) for label in band.rows]
    )
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelsize=8, labelcolor=INK, pad=4)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _label_layers(axes: Any, columns: Sequence[_Column], cell: float) -> None:
    places, labels = [], []
    for column in columns:
        numbered = all(label.isdigit() for label in column.labels)
        every = max(1, math.ceil(0.2 / cell)) if numbered else 1
        for place in range(0, len(column.labels), every):
            places.append(column.left + place + 0.5)
            labels.append(column.labels[place])
    axes.set_xticks(places, labels=labels)
    axes.tick_params(axis="x", length=0, labelsize=7, labelcolor=INK, pad=2)
    for text in axes.get_xticklabels():
        if not text.get_text().isdigit():
            text.set(rotation=40, ha="right", rotation_mode="anchor")


def _draw_bar(figure: Any, axes: Any, band: Band, limit: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    low, high = (-limit, limit) if band.ratio else (0.0, 1.0)
    bar = figure.colorbar(
        ScalarMappable(Normalize(low, high), cmap="RdBu_r" if band.ratio else "Greys"), cax=axes
    )
    if band.ratio:
        bar.set_ticks(
            [low, 0, high],
            labels=[f"×{2**low:.2g}", "×1" if len(band.rows) > 1 else "", f"×{2**high:.2g}"],
        )
    else:
        bar.set_ticks([0, 1], labels=["0", "all"])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    axes.tick_params(labelsize=7, length=2, color=FAINT, labelcolor=INK)


def _limit(bands: Sequence[Band]) -> float:
    """A symmetric log2 range that holds nearly all ratios."""
    sizes = []
    for band in bands:
        for values in band.rows.values():
            middle = mean(values.values())
            sizes += [abs(math.log2(v / middle)) for v in values.values() if v > 0 and middle > 0]
    return max(float(np.quantile(sizes, 0.98)) if sizes else 0.0, 0.25)


def _mean_rows(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    given = [row for row in rows if row]
    names = dict.fromkeys(name for row in given for name in row)
    return {name: mean(row[name] for row in given if row.get(name) is not None) for name in names}


def _merged(rows: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Methods that trained the same layers in one row."""
    titles: dict[tuple[tuple[str, float], ...], list[str]] = {}
    for title, values in rows.items():
        titles.setdefault(tuple(sorted(values.items())), []).append(title)
    return {", ".join(same): dict(rows[same[0]]) for same in titles.values()}


def _cut(label: str) -> str:
    return label if len(label) <= 40 else label[:39] + "…"
