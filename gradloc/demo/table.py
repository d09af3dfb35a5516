"""The demo's table: a row of ready words for each method, and the same as a rich table.

The report sets the same rows in HTML. Judges nothing; `findings` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradloc.demo.methods import METHODS
from gradloc.demo.outcome import KINDS, PERIODS, Outcome, Run, Scores, mean_and_sd, over

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "",
    "layers",
    "updated facts",
    "new facts",
    "unchanged facts",
    "old text",
    "new text",
    "memory",
    "time",
)


@dataclass(frozen=True)
class Cell:
    """What stands in a cell: the number to look at first, and a smaller one under it."""

    main: str
    small: str = ""


Row = tuple[Cell, ...]


def table_rows(outcome: Outcome) -> list[Row]:
    """The base model's row, then one a method; a cell for each of `COLUMNS`."""
    rows = [
        (
            Cell("Before"),
            Cell("–"),
            *_score_cells([outcome.base]),
            Cell("–"),
            Cell("–"),
        )
    ]
    num_layers = len(outcome.profile.layers)
    for method in METHODS:
        runs = outcome.of(method)
        trained = len(runs[0].active_layers)
        share = over(runs, lambda run: run.share_of_parameters)[0]
        rows.append(
            (
                Cell(method.title),
                Cell(f"{trained} of {num_layers}", f"{share:.0%} of weights"),
                *_score_cells([run.scores for run in runs]),
                Cell(megabytes(over(runs, lambda run: run.optimizer_bytes)[0])),
                Cell(seconds_text(median_seconds(runs))),
            )
        )
    return rows


def rich_table(outcome: Outcome) -> Table:
    """For a terminal of 80 columns or more."""
    from rich import box
    from rich.table import Table

    repeats = outcome.settings["num_repeats"]
    table = Table(
        title="What each way of continuing learned and forgot",
        caption="Facts: share completed, and below it nats a token ± standard deviation over "
        f"{repeats} runs. Text: perplexity. Layers: how many train, and their share of the "
        "weights. Memory: of the optimizer. Time: of the steps, median.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    for column in COLUMNS:
        table.add_column(column.replace(" ", "\n"), justify="right" if column else "left")
    for number, row in enumerate(table_rows(outcome)):
        small = [cell.small.replace(" ± ", "±").removesuffix(" of weights") for cell in row]
        words = [
            cell.main.replace(" of ", "/") + (f"\n[dim]{under}[/dim]" if under else "")
            for cell, under in zip(row, small, strict=True)
        ]
        table.add_row(*words, end_section=number == 0)
    return table


def megabytes(count: float) -> str:
    """Bytes in MB, or kB where that is less than a tenth of one."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def seconds_text(seconds: float) -> str:
    """Two digits are as exact as such times are."""
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def median_seconds(runs: Sequence[Run]) -> float:
    """Median over runs: one disturbed run does not count."""
    ordered = sorted(run.seconds for run in runs)
    middle = len(ordered) // 2
    return (ordered[middle] + ordered[-1 - middle]) / 2


def _score_cells(scores: Sequence[Scores]) -> list[Cell]:
    cells = []
    for kind in KINDS:
        right, _ = mean_and_sd([one.probes[kind].exact_match for one in scores])
        cells.append(Cell(f"{right:.0%}", _spread([one.nll(kind) for one in scores])))
    for period in PERIODS:
        mean, _ = mean_and_sd([one.text[period].nll for one in scores])
        cells.append(Cell(_three_digits(math.exp(min(mean, 700)))))
    return cells


def _three_digits(value: float) -> str:
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f}"


def _spread(values: Sequence[float]) -> str:
    mean, deviation = mean_and_sd(values)
    return f"{mean:.2f}" if math.isnan(deviation) else f"{mean:.2f} ± {deviation:.2f}"
