"""Thresholds on one number a layer: what they may be, and which layers they choose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

Threshold: TypeAlias = str | float | tuple[str, float]


def read_threshold(threshold: Threshold) -> Threshold:
    """Check a threshold; a list such as JSON gives becomes a tuple.

    Raises:
        ValueError: it is not "mean", ("quantile", q) with 0 <= q < 1, ("top_k", k) or
            ("bottom_k", k) with a whole k >= 1, or a number.
    """
    match threshold:
        case "mean":
            return threshold
        case bool() | str():
            pass
        case int() | float() if math.isfinite(threshold):
            return float(threshold)
        case ["quantile", (int() | float()) as q] if not isinstance(q, bool) and 0 <= q < 1:
            return ("quantile", float(q))
        case ["top_k" | "bottom_k" as end, int() as k] if not isinstance(k, bool) and k >= 1:
            return (end, k)
    raise ValueError(
        f"threshold={threshold!r}: give 'mean', ('quantile', q) with 0 <= q < 1, ('top_k', k) or "
        "('bottom_k', k) with k >= 1, or a number"
    )


def chosen_layers(values: Mapping[str, float], threshold: Threshold) -> frozenset[str]:
    """The layers strictly above the threshold, or the k highest or lowest (of equals the first).

    Raises:
        ValueError: more layers are asked for than there are, or none would be chosen.
    """
    match threshold:
        case ("top_k" | "bottom_k" as end, k):
            if k > len(values):
                raise ValueError(f"threshold=({end!r}, {k}): there are only {len(values)} layers")
            sign = -1 if end == "top_k" else 1  # not reverse=True: of equals the first comes first
            return frozenset(sorted(values, key=lambda name: sign * values[name])[: int(k)])
        case ("quantile", q):
            limit = float(np.quantile(list(values.values()), q))
        case "mean":
            limit = math.fsum(values.values()) / len(values)
        case _:
            limit = float(threshold)  # type: ignore[arg-type]
    chosen = frozenset(name for name, value in values.items() if value > limit)
    if not chosen:
        raise ValueError(
            f"threshold={threshold!r}: no layer is above {limit:.4g} (they lie between "
            f"{min(values.values()):.4g} and {max(values.values()):.4g}), so nothing would train: "
            "lower the threshold or use ('top_k', k)"
        )
    return chosen
