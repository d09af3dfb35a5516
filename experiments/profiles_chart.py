"""Draws what `profiles_report` found: relative norms by depth, and correlations between kinds.

Computes nothing but means over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradloc.compare.statistics import student_t
from gradloc.files import replacing

# Okabe and Ito's, which colour-blind readers tell apart.
_COLOURS = {"attention": "#0072b2", "mlp": "#d55e00"}
_ENOUGH_SEEDS = 4


def draw_profiles(
    layers: Sequence[Mapping[str, Any]],
    found: Sequence[Any],
    references: Mapping[str, str],
    path: Path,
) -> None:
    """A row a kind, a column a reference: R by block, with 95 % intervals.

    The interval is Student's over seeds; of fewer than four that says next to nothing, and the mean
    of the seeds' bootstrap intervals stands there instead.
    """
    from matplotlib.figure import Figure

    columns = [loss for loss in references if any(one.ratios.get(loss) for one in found)]
    if not columns:
        return
    kinds = list(dict.fromkeys(kind for one in found for kind in one.ratios[columns[0]]))
    figure = Figure(figsize=(4.3 * len(columns), 1.55 * len(kinds) + 0.9), layout="constrained")
    axes = figure.subplots(len(kinds), len(columns), squeeze=False, sharex=True, sharey=True)
    # Ratios, so a logarithmic axis; one for all, and wide enough for the lines: intervals of single
    # wild batches would flatten everything else.
    lines = np.concatenate(
        [
            np.mean([one.ratios[loss][kind].ratio for one in found if kind in one.ratios[loss]], 0)
            for loss in columns
            for kind in kinds
            if any(kind in one.ratios[loss] for one in found)
        ]
    )
    lowest, highest = min(0.7, 0.9 * lines.min()), max(1.5, 1.2 * lines.max())
    blocks = max(layer["block"] for layer in layers if layer["block"] is not None) + 1
    for column, loss in enumerate(columns):
        axes[0, column].set_title(f"against {references[loss]}", fontsize=9)
        for row, kind in enumerate(kinds):
            axis = axes[row, column]
            each = [one.ratios[loss][kind] for one in found if kind in one.ratios[loss]]
            if not each:
                axis.axis("off")
                continue
            last = not any(later in one.ratios[loss] for later in kinds[row + 1 :] for one in found)
            axis.axhline(1.0, color="0.35", linewidth=0.9, linestyle="--")
            axis.grid(axis="y", color="0.92", linewidth=0.6)
            axis.set_axisbelow(True)
            _draw_kind(axis, layers, each, blocks)
            if column == 0:
                axis.set_ylabel(kind, fontsize=9)
            if last:
                axis.set_xlabel("block (E, N: embeddings, final norm)", fontsize=8)
            axis.tick_params(labelsize=8, labelbottom=last)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_xticks(
        [-1.5, *range(0, blocks, max(1, blocks // 6)), blocks + 0.5],
        ["E", *map(str, range(0, blocks, max(1, blocks // 6))), "N"],
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside upper right", ncols=3)
    axes[0, 0].set_yscale("log", base=2)
    axes[0, 0].set_ylim(lowest, highest)
    ticks = [2.0**power for power in range(-3, 8) if lowest <= 2.0**power <= highest]
    axes[0, 0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    figure.suptitle("Gradient norm of each layer, relative to ordinary text", fontsize=11)
    _save(figure, path)


def _draw_kind(axis: Any, layers: Sequence[Any], each: Sequence[Any], blocks: int) -> None:
    ratio, low, high = _with_interval(each)
    for kind, colour in _COLOURS.items():
        chosen = [index for index, layer in enumerate(layers) if layer["kind"] == kind]
        places = [layers[index]["block"] for index in chosen]
        axis.fill_between(places, low[chosen], high[chosen], color=colour, alpha=0.2, linewidth=0)
        axis.plot(places, ratio[chosen], color=colour, linewidth=1.3, label=kind)
    outside = [index for index, layer in enumerate(layers) if layer["block"] is None]
    # Embeddings stand before the blocks in the layers' order, the final norm and a head after.
    first = next(index for index, layer in enumerate(layers) if layer["block"] is not None)
    places = [-1.5 if index < first else blocks + 0.5 for index in outside]
    spread = np.abs(np.stack([ratio - low, high - ratio]))[:, outside]
    axis.errorbar(
        places, ratio[outside], yerr=spread, fmt="o", color="0.3", markersize=3, linewidth=1,
        label="others",
    )  # fmt: skip


def _with_interval(each: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ratios = np.stack([one.ratio for one in each])
    mean = ratios.mean(axis=0)
    if len(each) < _ENOUGH_SEEDS:
        low, high = (np.mean([getattr(one, end) for one in each], 0) for end in ("low", "high"))
        return mean, low, high
    half = student_t(len(each) - 1) * ratios.std(axis=0, ddof=1) / math.sqrt(len(each))
    return mean, mean - half, mean + half


def draw_correlations(
    found: Sequence[Any], variants: Mapping[str, tuple[str, str, str]], path: Path
) -> None:
    """A matrix a variant: the correlations between kinds, corrected for noise beneath."""
    from matplotlib.figure import Figure

    titles = {name: title for name, (_, _, title) in variants.items()}
    titles["own"] = "whole spans, each kind against random spans of its own lengths"
    there = [name for name in titles if all(name in one.correlations for one in found)]
    if not there:
        return
    size = len(found[0].correlations[there[0]].kinds)
    figure = Figure(
        figsize=((0.72 * size + 1.3) * len(there), 0.72 * size + 1.7), layout="constrained"
    )
    axes = figure.subplots(1, len(there), squeeze=False)[0]
    image = None
    for axis, name in zip(axes, there, strict=True):
        each = [one.correlations[name] for one in found]
        matrix = np.mean([one.matrix for one in each], axis=0)
        corrected = np.mean([one.corrected for one in each], axis=0)
        image = axis.imshow(matrix, vmin=0, vmax=1, cmap="cividis")
        kinds = each[0].kinds
        axis.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
        for row in range(len(kinds)):
            for column in range(len(kinds)):
                text = f"{matrix[row, column]:.2f}"
                if row != column and math.isfinite(corrected[row, column]):
                    text += f"\n({corrected[row, column]:.2f})"
                dark = matrix[row, column] < 0.6
                axis.text(
                    column, row, text, ha="center", va="center", fontsize=7.5,
                    color="white" if dark else "black",
                )  # fmt: skip
        axis.set_title(titles[name].replace(", ", ",\n", 1), fontsize=9)
    figure.colorbar(image, ax=list(axes), shrink=0.7, label="Spearman correlation")
    figure.suptitle(
        "Layer profiles of halves: within kinds (diagonal), between them (corrected for noise)",
        fontsize=11,
    )
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
