"""A GradientProfile as a heatmap: layers against probe kinds, a panel for each reference.

Colour is a layer's ratio against the mean over layers, so that the pattern shows whatever the
ratios' level; what is red in the mean's column is what the threshold "mean" chooses. Only draws:
where cells lie is in `profile_layout`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradloc.files import replacing
from gradloc.profile_layout import Group, Section, sections_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gradloc.profile import GradientProfile

_LOSSES = {"all": "Reference: all tokens", "matched-spans": "Reference: matched spans"}
_INK, _FAINT, _NO_LAYER = "#222222", "#6b6b6b", "#eeeeee"
_TICKS = (1 / 16, 1 / 8, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4, 8, 16)
# Stands for the mean over kinds among columns that are otherwise named by their kind.
_MEAN = None


def plot_profile(profile: GradientProfile, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw the heatmap; see `GradientProfile.plot`."""
    from matplotlib.figure import Figure

    drawing = _Drawing(profile)
    figure = Figure(figsize=(drawing.width, drawing.height), facecolor="white")
    suffix = None if path is None else Path(path).suffix[1:].lower() or "png"
    if suffix is not None and suffix not in (known := figure.canvas.get_supported_filetypes()):
        raise ValueError(f"path={os.fspath(path or '')!r}: choose a suffix of {', '.join(known)}")
    drawing.draw(figure)
    if path is not None:
        with replacing(path) as temporary:
            figure.savefig(temporary, format=suffix, dpi=160)
    return figure


class _Drawing:
    """Sizes, all in inches from the top left, and the strokes that use them."""

    def __init__(self, profile: GradientProfile) -> None:
        self.sections = sections_of(profile.layers)
        others = [loss for loss in profile.references if loss != profile.reference_loss]
        self.panels = [profile.with_reference(loss) for loss in (profile.reference_loss, *others)]
        self.columns: tuple[str | None, ...] = profile.kinds
        if len(profile.kinds) > 1:
            self.columns = (*profile.kinds, _MEAN)
        most_groups = max(len(section.groups) for section in self.sections)
        if most_groups * len(self.columns) > 24:
            # Single parameters as layers: columns a kind would not fit on a page.
            self.columns = (_MEAN,)
        self.slanted = most_groups > 4
        num_rows = max(len(section.rows) for section in self.sections)
        self.row = 0.27 if num_rows <= 16 else 0.2 if num_rows <= 40 else 0.11
        least = 0.3 if self.slanted else 1.15
        narrow = self.row < 0.2 or most_groups * len(self.columns) > 12
        self.cell = max(0.36 if narrow else 0.44, least / len(self.columns))
        if self.slanted and len(self.columns) == 1:
            self.cell = 0.44
        self.group_gap = 0.06 if self.slanted else 0.14
        longest = max(len(label) for section in self.sections for label in section.rows)
        self.left = 0.55 + 0.075 * min(longest, 44)
        self.head = 0.95 + (1.0 if self.slanted else 0.26)
        self.kind_labels = (
            0.16 + 0.055 * max(len(column or "mean") for column in self.columns)
            if len(self.columns) > 1
            else 0
        )
        self.panel_width = most_groups * (self.cell * len(self.columns) + self.group_gap)
        self.panel_width = max(self.panel_width, 2.6)
        self.body = sum(len(section.rows) * self.row for section in self.sections)
        self.body += 0.34 * (len(self.sections) - 1)
        self.width = self.left + len(self.panels) * (self.panel_width + 0.3) + 1.0
        self.width = max(self.width, 6.2)
        self.height = max(self.head + 0.25 + self.kind_labels + self.body + 0.45, 2.6)
        values = [self.log_values(panel) for panel in self.panels]
        self.colours = _Colours(
            [v for panel in values for column in panel.values() for v in column.values()]
        )

    def log_values(self, panel: GradientProfile) -> dict[str | None, dict[str, float]]:
        """Column -> layer -> log2 of its R over the column's mean R; -inf for R = 0."""
        result = {}
        for column in self.columns:
            ratios = self.ratios(panel, column)
            mean = math.fsum(ratios.values()) / len(ratios) or 1.0
            result[column] = {
                name: math.log2(ratio / mean) if ratio > 0 else -math.inf
                for name, ratio in ratios.items()
            }
        return result

    def ratios(self, panel: GradientProfile, column: str | None) -> dict[str, float]:
        return panel.relative if column is _MEAN else panel.relative_by_kind[column]

    def axes(self, figure: Figure, left: float, top: float, width: float, height: float) -> Any:
        """Axes at a place in inches from the top left."""
        place = (
            left / self.width,
            1 - (top + height) / self.height,
            width / self.width,
            height / self.height,
        )
        return figure.add_axes(place)

    def text(
        self, figure: Figure, left: float, top: float, words: str, size: float, **style: Any
    ) -> None:
        style = {"color": _INK, "va": "top", **style}
        figure.text(left / self.width, 1 - top / self.height, words, fontsize=size, **style)

    def draw(self, figure: Figure) -> None:
        kinds = self.panels[0].kinds
        what = f"the {kinds[0]!r} probes" if len(kinds) == 1 else "probes"
        if self.columns == (_MEAN,):
            what = f"probes (mean of {', '.join(kinds)})"
        self.text(figure, 0.2, 0.14, "Relative gradient norm R of every layer", 12, weight="bold")
        lines = (
            f"R = gradient norm on {what} / gradient norm on ordinary text",
            "Colour: R against the mean of its column over all layers"
            + "; numbers: R" * (self.row >= 0.2),
        )
        self.text(figure, 0.2, 0.4, "\n".join(lines), 8, color=_FAINT, linespacing=1.35)
        for index, panel in enumerate(self.panels):
            self.draw_panel(figure, panel, self.left + index * (self.panel_width + 0.3), index == 0)
        self.draw_colour_bar(figure)

    def draw_panel(
        self, figure: Figure, panel: GradientProfile, left: float, labelled: bool
    ) -> None:
        values = self.log_values(panel)
        above = set(panel.above_mean)
        self.text(figure, left, 0.88, _LOSSES[panel.reference_loss], 9.5, weight="bold")
        self.text(
            figure, left, 1.06, f"mean R over layers {panel.mean_relative:.3g}", 8, color=_FAINT
        )
        top = self.head + 0.25 + self.kind_labels
        for number, section in enumerate(self.sections):
            height = len(section.rows) * self.row
            for place, group in enumerate(section.groups):
                width = self.cell * len(self.columns)
                x = left + place * (width + self.group_gap)
                axes = self.axes(figure, x, top, width, height)
                self.draw_group(axes, panel, section, group, values, above)
                self.draw_titles(figure, group.title, x, top, number == 0)
                if place == 0 and labelled:
                    _label_rows(axes, section)
            top += height + 0.34
        self.text(
            figure,
            left,
            top - 0.34 + 0.14,
            f"● above the mean: {len(above)} of {len(panel.layers)} layers",
            8,
        )

    def draw_titles(self, figure: Figure, title: str, left: float, top: float, first: bool) -> None:
        if self.slanted and title not in ("", "outside the blocks"):
            self.text(
                figure,
                left + 0.12,
                top - 0.06,
                title,
                7,
                rotation=40,
                va="bottom",
                rotation_mode="anchor",
            )
            return
        labels = self.kind_labels if first else 0
        self.text(figure, left, top - labels - 0.05, title, 9, va="bottom", weight="bold")
        for index, column in enumerate(self.columns if labels else ()):
            middle = left + (index + 0.42) * self.cell
            self.text(
                figure,
                middle,
                top - 0.05,
                column or "mean",
                7.5,
                va="bottom",
                rotation=45,
                rotation_mode="anchor",
                style="normal" if column else "italic",
            )

    def draw_group(
        self,
        axes: Any,
        panel: GradientProfile,
        section: Section,
        group: Group,
        values: dict[str | None, dict[str, float]],
        above: set[str],
    ) -> None:
        cells = np.full((len(section.rows), len(self.columns)), np.nan)
        for row, name in group.layers.items():
            cells[row] = [values[column][name] for column in self.columns]
        limit = self.colours.limit
        # Clipped here: an R of 0 is -inf, which matplotlib would leave blank, as it does nan.
        shown: NDArray[np.float64] = np.clip(cells, -2 * limit, 2 * limit)
        axes.set_facecolor(_NO_LAYER)
        axes.pcolormesh(
            shown,
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            edgecolors="white",
            linewidth=0.8 if self.row > 0.15 else 0.3,
        )
        axes.invert_yaxis()
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
        last = len(self.columns) - 1
        for row, name in group.layers.items():
            for index, column in enumerate(self.columns):
                dark = abs(shown[row, index]) > 0.62 * limit
                if self.row >= 0.2:
                    ratio = self.ratios(panel, column)[name]
                    axes.text(
                        index + 0.54,
                        row + 0.54,
                        _number(ratio),
                        ha="center",
                        va="center",
                        fontsize=7 if self.row > 0.25 and self.cell > 0.4 else 6.2,
                        color="white" if dark else _INK,
                    )
                if index == last and name in above:
                    axes.plot(
                        index + (0.07 / self.cell if self.row >= 0.2 else 0.5),
                        row + 0.5,
                        "o",
                        color="white" if dark else _INK,
                        markersize=3 if self.row >= 0.2 else 2.4,
                        markeredgewidth=0,
                    )

    def draw_colour_bar(self, figure: Figure) -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        limit = self.colours.limit
        top = self.head + 0.25 + self.kind_labels
        axes = self.axes(
            figure,
            self.left + len(self.panels) * (self.panel_width + 0.3),
            top,
            0.13,
            min(self.body, 2.6),
        )
        axes.set_label("colour bar")
        colours = ScalarMappable(Normalize(-limit, limit), cmap="RdBu_r")
        bar = figure.colorbar(colours, cax=axes, extend=self.colours.extend)
        ticks = self.colours.ticks()
        bar.set_ticks(
            [math.log2(tick) for tick in ticks],
            labels=[f"×{tick:.2f}".rstrip("0").rstrip(".") for tick in ticks],
        )
        bar.minorticks_off()
        bar.outline.set_visible(False)
        axes.tick_params(labelsize=7.5, length=2, color=_FAINT, labelcolor=_INK)
        axes.set_ylabel("R / mean of R over all layers", fontsize=8, color=_INK)


class _Colours:
    """A symmetric log2 range that holds nearly all values: one outlier must not bleach the rest."""

    def __init__(self, values: Sequence[float]) -> None:
        sizes = [abs(value) for value in values if math.isfinite(value)]
        self.limit = max(float(np.quantile(sizes, 0.98)) if sizes else 0.0, 0.25)
        ends = (min(values) < -1.001 * self.limit, max(values) > 1.001 * self.limit)
        self.extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(
            ends, "neither"
        )

    def ticks(self) -> list[float]:
        """Round ratios, as far apart as their labels need, 1 always among them."""
        chosen = [1.0]
        for side in (1, -1):
            last = 0.0
            for tick in sorted(_TICKS, key=lambda tick: abs(math.log2(tick))):
                place = math.log2(tick) * side
                if last + 0.24 * self.limit <= place <= self.limit:
                    chosen.append(tick)
                    last = place
        return sorted(chosen)


def _label_rows(axes: Any, section: Section) -> None:
    count = len(section.rows)
    every = 1 if section.stack is None or count <= 16 else 2 if count <= 40 else 5
    rows = range(0, count, every)
    axes.set_yticks([row + 0.5 for row in rows], labels=[_cut(section.rows[row]) for row in rows])
    axes.tick_params(axis="y", length=0, labelsize=7.5, labelcolor=_INK, pad=3)
    if section.stack is not None:
        axes.set_ylabel(
            f"block of {section.stack}" if count > 6 else section.stack, fontsize=8, color=_FAINT
        )


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _cut(label: str) -> str:
    return label if len(label) <= 44 else "…" + label[-43:]
