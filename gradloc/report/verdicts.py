"""Verdicts: when a difference counts, and where a row stands beside another method's curve.

The one place that decides what the report may say. Writes no sentences; `findings` does.
"""

from __future__ import annotations

import math
from enum import Enum

from gradloc.compare.statistics import PairedDifference, difference_from_zero
from gradloc.report.matched import AgainstCurve, Matched

SMALLEST = 0.02
"""Nats a token below which a difference is not worth a word, however sure it is."""
FEWEST_SEEDS = 3

RULE = (
    f"A difference counts when there are at least {FEWEST_SEEDS} seeds, all of them agree on its "
    "direction, the 95 % interval of its mean (Student's t over seeds) leaves out 0, and the mean "
    f"is above {SMALLEST} nats a token; else it is within noise"
)


class Standing(Enum):
    """Where a row stands at equal learning."""

    LESS = "less loss at the same learning"
    COARSE = "the curve has too few points to say"
    MORE = "more loss at the same learning"
    SAME = "within noise of the curve"
    PAST = "learned more than any point of the curve"
    SHORT = "learned less than any point of the curve"
    MIXED = "within the curve's range on some seeds only"
    UNKNOWN = "no number on some seeds"
    FEW = "too few seeds"


def clear(difference: PairedDifference | None) -> int:
    """-1: clearly lower, 1: clearly higher, 0: neither; by `RULE`."""
    if difference is None or len(difference.differences) < FEWEST_SEEDS:
        return 0
    low, high = difference.ci95
    if math.isnan(low) or low <= 0 <= high or abs(difference.mean) <= SMALLEST:
        return 0
    return difference.direction


def bound(matched: Matched, *, firm: bool = False) -> PairedDifference | None:
    """The gaps, and for seeds beyond the curve the distance to its last point; None without any.

    To learn as much as there, the curve would have to lose more still, since along a frontier more
    learning costs more: so where this is below 0 the true gap is lower yet.
    """
    found = {**(matched.firm if firm else matched.gaps), **matched.beyond}
    return difference_from_zero([found[seed] for seed in sorted(found)]) if found else None


def standing(matched: Matched) -> Standing:
    """The verdict on a row held against a curve."""
    if matched.num_seeds < FEWEST_SEEDS:
        return Standing.FEW
    if matched.unknown:
        return Standing.UNKNOWN
    if matched.short:
        return Standing.MIXED if matched.gaps or matched.beyond else Standing.SHORT
    sign = clear(bound(matched))
    if sign == -1:
        return Standing.LESS if clear(bound(matched, firm=True)) == -1 else Standing.COARSE
    if matched.beyond:
        return Standing.MIXED if matched.gaps else Standing.PAST
    return Standing.MORE if sign == 1 else Standing.SAME


def whole_standing(whole: AgainstCurve) -> Standing:
    """The verdict on a whole curve; `SHORT` where the two share no learning."""
    if whole.gap is None:
        return Standing.FEW if whole.num_seeds < FEWEST_SEEDS else Standing.SHORT
    if len(whole.gap.differences) < FEWEST_SEEDS:
        return Standing.FEW if whole.num_seeds < FEWEST_SEEDS else Standing.MIXED
    sign = clear(whole.gap)
    if sign == 0:
        return Standing.SAME
    if clear(whole.highest if sign < 0 else whole.lowest) != sign:
        return Standing.COARSE
    return Standing.LESS if sign < 0 else Standing.MORE
