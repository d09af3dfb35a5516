"""How the report writes numbers: digits, signs, intervals, and nothing where there is no number.

Decides nothing about what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradloc.compare.statistics import PairedDifference

NOTHING = "–"


def fixed(value: float, digits: int = 2) -> str:
    """A number with a true minus sign and no negative zero."""
    if not math.isfinite(value):
        return NOTHING
    text = f"{value:.{digits}f}"
    return (text[1:] if float(text) == 0 and text[0] == "-" else text).replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """The same with a plus before what is above 0."""
    text = fixed(value, digits)
    return f"+{text}" if value > 0 and any(d in "123456789" for d in text) else text


def three_digits(value: float, sd: float = math.nan) -> tuple[str, str]:
    """A number above 0 with three digits that count, and its standard deviation to the same place.

    Returns:
        The two texts; the second is empty where there is no standard deviation.
    """
    if not math.isfinite(value):
        return NOTHING, ""
    if value >= 1e6:
        return _short(value), f"± {_short(sd)}" if math.isfinite(sd) else ""
    places = 2 - math.floor(math.log10(value)) if value > 0 else 2
    places = min(max(places, 0), 4)
    return f"{value:,.{places}f}", f"± {sd:,.{places}f}" if math.isfinite(sd) else ""


def _short(value: float) -> str:
    return f"{value:.2g}".replace("e+0", "e").replace("e+", "e")


def spread(mean: float, sd: float, *, digits: int = 2, sign: bool = False) -> str:
    """Mean ± standard deviation; the mean alone where there is one value."""
    text = signed(mean, digits) if sign else fixed(mean, digits)
    return text if math.isnan(sd) else f"{text} ± {fixed(sd, digits)}"


def interval(difference: PairedDifference) -> str:
    """A difference's 95 % interval and p; nothing where there is one pair."""
    low, high = difference.ci95
    if math.isnan(low):
        return ""
    return f"[{fixed(low)}, {fixed(high)}], p {probability(difference.sign_flip_p)}"


def probability(p: float) -> str:
    """A p with two digits that count."""
    return f"{p:.2f}" if p >= 0.095 else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def rate(learning_rate: float) -> str:
    """A learning rate, 0.001 as 1e-3."""
    digits, exponent = f"{learning_rate:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def seconds(value: float) -> str:
    """A duration."""
    if not math.isfinite(value):
        return NOTHING
    if value < 9.95:
        return f"{value:.1f} s"
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"


def number_of(count: int, what: str) -> str:
    """1 seed, 2 seeds."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def ranges(numbers: Sequence[int]) -> str:
    """0–2, 5 for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for one in sorted(numbers):
        if runs and one == runs[-1][-1] + 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def named(names: Sequence[str]) -> str:
    """Names in a row."""
    return ", ".join(names)


def share_of_weights(share: float) -> str:
    """A share from 0 to 1 in percent, with two digits that count below 1 %."""
    if not math.isfinite(share):
        return ""
    if 0 < share < 1e-4:
        return "< 0.01 % of weights"
    # What is nearly all is not all.
    number = f"{100 * share:.2g}" if share < 0.01 else f"{100 * share:.0f}"
    return f"{'> 99' if number == '100' and share < 1 else number} % of weights"


def percent(share: float) -> str:
    """A share from 0 to 1."""
    return f"{100 * share:.0f} %" if math.isfinite(share) else "unknown"
