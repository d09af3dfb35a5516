"""A GradientProfile as plain text with bars, for terminals. Measures and chooses nothing."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradloc.profile import GradientProfile

_MARK = "●"
_MEANS = "mean over layers"
_PARTS = " ▏▎▍▌▋▊▉"  # eighths of a column
_SHORTEST_BAR = 10
_LOSSES = {
    "all": "on all tokens",
    "matched-spans": "on random spans as long as the probes'",
}


def profile_table(profile: GradientProfile, *, width: int = 100) -> str:
    """One table for each reference that the profile holds, the one in use first.

    Args:
        profile: what to show.
        width: columns of the terminal; names are cut and kinds left out (and counted) to fit.

    Returns:
        Lines without trailing blanks, joined by newlines.

    Raises:
        ValueError: a width below 60.
    """
    if width < 60:
        raise ValueError(f"width={width}: the table needs at least 60 columns")
    others = [loss for loss in profile.available_reference_losses if loss != profile.reference_loss]
    tables = [
        _table(profile.with_reference(loss), width) for loss in (profile.reference_loss, *others)
    ]
    return "\n\n".join(tables)


def _table(profile: GradientProfile, width: int) -> str:
    ratios, errors, by_kind = (
        profile.relative,
        profile.relative_standard_errors,
        profile.relative_by_kind,
    )
    several = len(profile.kinds) > 1
    longest_name = max(len(name) for name in (*profile.names, _MEANS))
    name_width = min(longest_name, width * 3 // 10)
    kind_width = max(6, min(10, max(len(kind) for kind in profile.kinds)))
    # Beside the kinds: name, mean ± error (6 + 7), mark, bar, and two blanks between columns.
    free = width - name_width - (2 + 13) - 3 - (1 + _SHORTEST_BAR)
    kinds = profile.kinds[: max(0, free // (kind_width + 2))] if several else ()
    bar_width = min(40, free + _SHORTEST_BAR - len(kinds) * (kind_width + 2))

    head = f"{'layer':<{name_width}}" + "".join(
        f"  {_cut(kind, kind_width):>{kind_width}}" for kind in kinds
    )
    lines = [
        "Relative gradient norm R = probe / reference; reference loss "
        f"{_LOSSES[profile.reference_loss]}" + (f", step {profile.step}" if profile.step else ""),
        "",
        f"{head}  {'mean' if several else 'R':>6} {'± s.e.':<6}",
    ]
    lines.append("─" * (name_width + len(kinds) * (kind_width + 2) + 2 + 13 + 3 + bar_width + 1))
    # One far outlier would leave nothing to see of the other bars: it is cut, and ends in an arrow.
    middle = sorted(ratios.values())[len(ratios) // 2]
    longest = min(max(ratios.values()), 3 * middle) or 1.0
    above = set(profile.above_mean)
    for name, ratio in ratios.items():
        cells = "".join(f"  {_number(by_kind[kind][name]):>{kind_width}}" for kind in kinds)
        mark = _MARK if name in above else " "
        lines.append(
            f"{_cut(name, name_width, tail=True):<{name_width}}{cells}  {_number(ratio):>6} "
            f"{_error(errors[name]):<6}  {mark} {_bar(ratio / longest, bar_width)}"
        )
    means = "".join(f"  {_number(_mean(by_kind[kind].values())):>{kind_width}}" for kind in kinds)
    lines.append(
        f"{_cut(_MEANS, name_width):<{name_width}}{means}  {_number(profile.mean_relative):>6}"
    )
    lines += ["", f"{_MARK} above the mean: {len(above)} of {len(ratios)} layers"]
    if len(kinds) < len(profile.kinds) and several:
        missing = len(profile.kinds) - len(kinds)
        lines.append(f"(the mean has {missing} more kinds, for which {width} columns are too few)")
    lines += _counts(profile, width)
    return "\n".join(line.rstrip() for line in lines)


def _counts(profile: GradientProfile, width: int) -> list[str]:
    """How much each set was measured on, so that sets that cannot be compared are noticed."""
    reference = profile.references[profile.reference_loss]
    sets = dict(profile.probes)
    if profile.reference_loss == "all":
        sets["reference"] = next(iter(reference.values()))
    else:
        sets.update({f"matched to {kind}": one for kind, one in reference.items()})
    label_width = min(max(map(len, sets)), width - 60)
    return [
        f"{_cut(what, label_width):<{label_width}}  {one.num_batches:>5} batches "
        f"{one.num_sequences:>7} sequences {one.num_tokens:>9} tokens "
        f"({one.num_tokens / one.num_batches:.1f} a batch)"
        for what, one in sets.items()
        if one.num_sequences
    ]


def _bar(share: float, width: int) -> str:
    if share > 1.0 + 1e-9:
        return "█" * (width - 1) + "▶"
    eighths = round(min(share, 1.0) * width * 8)
    return "█" * (eighths // 8) + (_PARTS[eighths % 8] if eighths % 8 else "")


def _number(value: float) -> str:
    """At most five characters, so that columns stay in line."""
    if value >= 1e4:
        return f"{value:.0e}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _error(value: float) -> str:
    return "" if math.isnan(value) else f"± {_number(value)}"


def _mean(values: Collection[float]) -> float:
    return math.fsum(values) / len(values)


def _cut(text: str, width: int, *, tail: bool = False) -> str:
    if len(text) <= width:
        return text
    return "…" + text[len(text) - width + 1 :] if tail else text[: width - 1] + "…"
