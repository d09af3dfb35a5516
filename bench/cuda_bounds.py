"""What gradloc promises on a GPU, judged from the rows that cuda_kernels.py measured.

Each promise gives lines that end in "kept" or "NOT KEPT". Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

OF_COPY = 0.9  # norms and AdamW, from so many elements on:
LARGE = 100_000_000
OVER_TORCH = 1.3
MASK_MARGIN = 0.03
HOST_US = 60.0

Row = dict[str, Any]


def _line(what: str, kept: bool) -> str:
    return f"{what}: {'kept' if kept else 'NOT KEPT'}"


def _case(row: Row) -> tuple[str, str, str]:
    return row["model"], row["dtype"], row["moments"]


def _called(row: Row) -> str:
    moments = f" with {row['moments']} moments" if row["moments"] else ""
    return f"{row['model']} {row['dtype']}{moments}, {row['op']}"


def bandwidth(rows: list[Row]) -> Iterable[str]:
    """Norms and AdamW at 90 % of the bandwidth of a copy, for models of 100 M parameters and up."""
    for row in rows:
        full = row["share"] == 1.0 and row["parameters"] >= LARGE
        if full and row["by"] == "gradloc" and row["op"] in ("norms", "step"):
            yield _line(
                f"{_called(row)}: {row['of_copy']:.1%} of a copy's bandwidth ({OF_COPY:.0%} asked)",
                row["of_copy"] >= OF_COPY,
            )


def speed(rows: list[Row]) -> Iterable[str]:
    """Clip + step, everything active, against clip_grad_norm_ + fused on moments of one dtype."""
    for row in rows:
        if row["by"] == "clip_grad_norm_ + torch fused" and row["share"] == 1.0:
            ratio = row["gradloc_is_x_as_fast"]
            yield _line(
                f"{_called(row)}: {ratio:.2f}x as fast as {row['by']} ({OVER_TORCH}x asked)",
                ratio >= OVER_TORCH,
            )


def masks(rows: list[Row]) -> Iterable[str]:
    """The time of a share of the elements is that share of the full time, and 3 % of it at most."""
    for row in rows:
        if row["by"] == "gradloc" and row["op"] == "clip+step" and row["share"] < 1.0:
            yield _line(
                f"{_called(row)}: {row['active']:.1%} of the elements in {row['of_full']:.1%} of "
                f"the time ({row['active'] + MASK_MARGIN:.1%} asked)",
                row["of_full"] <= row["active"] + MASK_MARGIN,
            )


def host(rows: list[Row]) -> Iterable[str]:
    """What a step takes the host at 300 tensors."""
    for row in rows:
        if row["by"] == "gradloc" and row["tensors"] == 300:
            yield _line(
                f"{row['op']} of 300 tensors: {row['host_us']:.1f} µs of host time "
                f"({HOST_US:.0f} µs asked)",
                row["host_us"] <= HOST_US,
            )


def bounds(rows: list[Row], host_rows: list[Row], *, judged: bool = True) -> list[str]:
    """All lines, in the order of the promises; with judged=False, of a rehearsal, no verdicts."""
    lines = [*bandwidth(rows), *speed(rows), *masks(rows), *host(host_rows)]
    return lines if judged else [f"{line.rpartition(': ')[0]}: not judged" for line in lines]
