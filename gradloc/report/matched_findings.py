"""The sentences about equal learning: who forgot less than another that had learned as much.

Methods with the same verdict share a sentence. The verdicts are those of `verdicts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradloc.report.analysis import BOTH, RATES, Analysis
from gradloc.report.matched import AgainstCurve, Matched, matched, whole_curve
from gradloc.report.rows import Row
from gradloc.report.runs import Method
from gradloc.report.verdicts import (
    FEWEST_SEEDS,
    Standing,
    bound,
    clear,
    standing,
    whole_standing,
)
from gradloc.report.words import fixed, named, number_of, spread

_SAME_SIZE = ("freeze", "top-k", "bottom-k")
"""Policies that choose as many layers as their random control."""
_WHOLE = {
    Standing.LESS: "clearly less",
    Standing.MORE: "clearly more",
    Standing.SAME: "within noise",
    Standing.COARSE: "too few points to say",
}
_WHY_NOT = {
    Standing.COARSE: "the curve's points lie too far apart",
    Standing.SHORT: "it learned less than any point of the curve",
    Standing.PAST: "it learned more than any point of the curve",
    Standing.MIXED: "it is within the curve's range on some seeds only",
    Standing.UNKNOWN: "a run has no finite loss, diverged or has no partner of its seed",
    Standing.FEW: f"there are fewer than {FEWEST_SEEDS} seeds",
}
_Held = Sequence[tuple[Row, Matched]]


def at_equal_learning(analysis: Analysis, rows: Sequence[Row], span: str = RATES) -> list[str]:
    """Verdicts of rows against the baseline's curve, on forgetting and then on ordinary text."""
    found = []
    for loss in ("forget", "text"):
        by_standing: dict[Standing, list[tuple[Row, Matched]]] = {}
        for row in rows:
            held = analysis.matched.get((row.key, loss, span))
            if held is not None:
                by_standing.setdefault(standing(held), []).append((row, held))
        if loss == "forget":
            found += _judged(analysis, by_standing, span) + _unjudged(analysis, by_standing, span)
        else:
            found += _text(analysis, by_standing, span)
    return found


def interpolated(analysis: Analysis, rows: Sequence[Row]) -> list[str]:
    """What interpolation with the old weights did, for the baseline itself and then for others."""
    assert analysis.baseline is not None
    title = analysis.baseline.title
    sentences = []
    for row in rows:
        held = analysis.matched.get((row.key, "forget", RATES))
        if held is None or not analysis.is_baseline(row):
            continue
        verdict = {
            Standing.LESS: "clearly less was forgotten than at another learning rate alone",
            Standing.MORE: "clearly more was forgotten than at another learning rate alone",
            Standing.SAME: "it is within noise of what another learning rate alone does",
        }.get(standing(held)) or f"not judged, as {_WHY_NOT[standing(held)]}"
        sentences.append(
            f"{title} interpolated with the old weights (weight α, chosen on validation: "
            f"{_alphas(row)}), against its own curve over {RATES} at the same learning: {verdict} "
            f"({gap(held)})."
        )
    others = [row for row in rows if not analysis.is_baseline(row)]
    return sentences + at_equal_learning(analysis, others, BOTH)


def against_random(row: Row, control: Method, analysis: Analysis) -> str:
    """A selection against random layers, at the same learning: its point, or else its curve."""
    ours, theirs = (
        analysis.curves[method.name, "forget", RATES] for method in (row.method, control)
    )
    held = matched(row, theirs, "forget")
    place, found = standing(held), gap(held)
    if place in (Standing.SHORT, Standing.PAST, Standing.MIXED):
        whole = whole_curve(ours, theirs)
        if whole_standing(whole) in _WHOLE:
            place, found = whole_standing(whole), _whole(whole)
    same = "no clear difference at the same learning"
    if row.method.policy in _SAME_SIZE:
        same += ", so that these runs do not show that it matters which layers train"
    verdict = {
        Standing.LESS: "it forgot clearly less at the same learning",
        Standing.MORE: "it forgot clearly more at the same learning",
        Standing.SAME: same,
    }.get(place) or f"not judged, as {_WHY_NOT[place]}"
    draws = max(
        len({run.draw for run in runs}) for runs in analysis.results.of(control.name).values()
    )
    return (
        f"{row.title} against random layers ({control.title}, the mean of "
        f"{number_of(draws, 'draw')} a seed): {verdict} ({found})."
    )


def gap(held: Matched) -> str:
    """The difference at equal learning, mean ± standard deviation over the seeds that have one."""
    found = bound(held)
    if found is None:
        return "outside of its range" if held.short else "nothing to compare with"
    return f"{spread(found.mean, found.sd, sign=True)}, {number_of(len(found.differences), 'seed')}"


def _judged(
    analysis: Analysis, rows: dict[Standing, list[tuple[Row, Matched]]], span: str
) -> list[str]:
    curve = _curve(analysis, span)
    sentences = []
    for sign, word in ((Standing.LESS, "less"), (Standing.MORE, "more")):
        if sign in rows:
            sentences.append(
                f"Clearly {word} forgotten than on {curve} at the same learning (difference of the "
                "loss on unchanged facts, nats a token, mean ± standard deviation over seeds): "
                f"{_gaps(rows[sign])}.{_beyond(rows[sign])}"
            )
    if Standing.SAME in rows:
        sentence = (
            f"Within noise of {curve}: {_gaps(rows[Standing.SAME])}. Nothing shows that they do "
            "what another setting on that curve would not do."
        )
        lazy = [row.title for row, _ in rows[Standing.SAME] if _less_of_both(analysis, row)]
        if lazy and analysis.baseline_row is not None:
            sentence += (
                f" To learn less and forget less than {analysis.baseline_row.title} at its own "
                f"learning rate is all that {named(lazy)} did."
            )
        sentences.append(sentence)
    if Standing.COARSE in rows:
        sentences.append(
            f"Below the straight lines between the points of {curve}, which lie too far apart to "
            "say that the curve itself does not pass there, too: "
            f"{_gaps(rows[Standing.COARSE])}. More learning rates would tell."
        )
    return sentences


def _unjudged(
    analysis: Analysis, rows: dict[Standing, list[tuple[Row, Matched]]], span: str
) -> list[str]:
    curve = _curve(analysis, span)
    sentences = []
    for place, before, after in (
        (
            Standing.SHORT,
            f"Learned less than any point of {curve}, so that forgetting less there is no result",
            "",
        ),
        (
            Standing.PAST,
            f"Learned more than any point of {curve}, but did not forget clearly less than its "
            "last point",
            "",
        ),
        (Standing.MIXED, f"Within the range of {curve} on some seeds only, so not judged", ""),
    ):
        if place in rows:
            names = [
                f"{row.title} ({_whole(analysis.whole.get((row.method.name, 'forget', span)))})"
                for row, _ in rows[place]
            ]
            sentences.append(f"{before}: {named(names)}.{after}")
    if Standing.UNKNOWN in rows:
        names = [row.title for row, _ in rows[Standing.UNKNOWN]]
        sentences.append(f"Not judged, as {_WHY_NOT[Standing.UNKNOWN]}: {named(names)}.")
    if Standing.FEW in rows:
        sentences.append(
            f"Not judged, with fewer than {FEWEST_SEEDS} seeds (in brackets the difference from "
            f"{curve} at the same learning): {_gaps(rows[Standing.FEW])}."
        )
    return sentences


def _text(
    analysis: Analysis, rows: dict[Standing, list[tuple[Row, Matched]]], span: str
) -> list[str]:
    parts = [
        f"clearly {word} for {_gaps(rows[sign])}"
        for sign, word in ((Standing.LESS, "lower"), (Standing.MORE, "higher"))
        if sign in rows
    ]
    for sign, word in (
        (Standing.SAME, "within noise"),
        (Standing.COARSE, "lower by too little for points so far apart"),
    ):
        if sign in rows:
            parts.append(f"{word} for {named([row.title for row, _ in rows[sign]])}")
    if not parts:
        return []
    return [
        f"Loss on old ordinary text, against {_curve(analysis, span)} at the same learning: "
        f"{'; '.join(parts)}."
    ]


def _whole(whole: AgainstCurve | None) -> str:
    """A method's whole curve, where its point at the chosen learning rate cannot be compared."""
    if whole is None or whole.gap is None:
        return "the curves share no range, either"
    found = spread(whole.gap.mean, whole.gap.sd, sign=True)
    verdict = _WHOLE.get(
        whole_standing(whole), f"on {number_of(len(whole.gap.differences), 'seed')}"
    )
    return (
        f"its whole curve, over the {fixed(whole.width)} nats that both reach: {found}, {verdict}"
    )


def _less_of_both(analysis: Analysis, row: Row) -> bool:
    learned, lost = (analysis.difference(row, measure) for measure in ("learn", "forget"))
    return clear(learned) == 1 and clear(lost) == -1


def _curve(analysis: Analysis, span: str) -> str:
    assert analysis.baseline is not None
    return f"{analysis.baseline.title}'s curve over {span}"


def _gaps(rows: _Held) -> str:
    return named([f"{row.title} ({gap(held)})" for row, held in rows])


def _beyond(rows: _Held) -> str:
    past = [
        f"{row.title} on {number_of(len(held.beyond), 'seed')}" for row, held in rows if held.beyond
    ]
    if not past:
        return ""
    return (
        " (More learned than anywhere on the curve, so held against its last point: "
        f"{named(past)}.)"
    )


def _alphas(row: Row) -> str:
    values = [value for value in row.alphas() if math.isfinite(value)]
    low, high = min(values, default=math.nan), max(values, default=math.nan)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
