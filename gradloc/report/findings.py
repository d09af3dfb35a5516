"""Says in sentences what the numbers show, and no more than they show.

Every sentence follows from a verdict of `verdicts` or states a number; those on equal learning are
in `matched_findings`. Nothing here knows what ought to come out.
"""

from __future__ import annotations

import math

from gradloc.compare.statistics import paired_difference
from gradloc.report.analysis import Analysis
from gradloc.report.matched_findings import against_random, at_equal_learning, interpolated
from gradloc.report.rows import Row
from gradloc.report.runs import CHOSEN, mean, number
from gradloc.report.verdicts import FEWEST_SEEDS, SMALLEST, clear
from gradloc.report.words import fixed, named, number_of, percent, rate, spread

_MANY = 5
"""Comparisons from which on chance alone is worth a sentence."""


def findings(analysis: Analysis) -> list[str]:
    """Sentences for people, the most important first."""
    results = analysis.results
    sentences = []
    if results.missing:
        sentences.append(
            f"{len(results.runs)} of {number_of(results.num_cells, 'run')} are finished: whatever "
            "follows may change with the rest."
            + (f" {len(results.failed)} of the others failed." if results.failed else "")
        )
    if analysis.baseline_row is None or analysis.baseline is None:
        return [
            *sentences,
            "No method that the others could be compared with has a finished run, so nothing is "
            "judged here.",
        ]
    sentences += _astray(analysis)
    sentences.append(_what_the_baseline_did(analysis, analysis.baseline_row))
    sentences += _better_text(analysis)
    plain = [r for r in analysis.rows if r.weight is not CHOSEN and not analysis.is_baseline(r)]
    if plain:
        sentences += at_equal_learning(analysis, plain)
    for row in plain:
        sentences += [against_random(row, one, analysis) for one in analysis.controls_of(row)]
    sentences += interpolated(analysis, [row for row in analysis.rows if row.weight is CHOSEN])
    sentences += _reach(analysis)
    judged = [row for row in plain if len(row.runs) >= FEWEST_SEEDS]
    if len(judged) >= _MANY:
        sentences.append(
            f"{len(judged)} methods were held against {analysis.baseline.title}. Where two do not "
            "differ at all, one 95 % interval in twenty still leaves out 0: a verdict by a narrow "
            "margin is a reason for more seeds, not a result."
        )
    return sentences


def _what_the_baseline_did(analysis: Analysis, row: Row) -> str:
    seeds = [seed for seed in row.runs if seed in analysis.results.bases]
    title, at = row.title, f"learning rate {rate(row.learning_rate)}, chosen on validation"
    after = {m: spread(*row.spread(m)) for m in ("learn", "forget", "text")}
    if not seeds:
        return (
            f"{title} ({at}) ended at {after['learn']} nats a token on updated and new facts, "
            f"{after['forget']} on unchanged ones and {after['text']} on old ordinary text."
        )
    bases = [analysis.results.bases[seed]["scores"]["1"] for seed in seeds]

    def before(*path: str) -> float:
        return mean(number(base, *path) for base in bases)

    kinds = ("updated", "new")
    learn = mean(before("probes", kind, "nll") for kind in kinds)
    right = mean(before("probes", kind, "exact_match") for kind in kinds)
    right_after = mean(row.spread(f"right {kind}")[0] for kind in kinds)
    kept = before("probes", "unchanged", "exact_match")
    kept_after = row.spread("right unchanged")[0]
    return (
        f"{title} ({at}) brought the loss on updated and new facts from {fixed(learn)} to "
        f"{after['learn']} nats a token (facts completed rightly: {percent(right)} before, "
        f"{percent(right_after)} after), that on unchanged facts from "
        f"{fixed(before('probes', 'unchanged', 'nll'))} to {after['forget']} "
        f"({percent(kept)} before, {percent(kept_after)} after), and that on old ordinary text "
        f"from {fixed(before('text', 'old', 'nll'))} to {after['text']}."
    )


def _astray(analysis: Analysis) -> list[str]:
    """Runs that no mean can count."""
    runs, limit = analysis.results.runs, analysis.results.limit
    sentences = []
    lost = [
        f"{run.record.get('cell', run.method)}"
        for run in runs
        if not all(math.isfinite(run.recorded(what)) for what in ("learn", "forget", "text"))
    ]
    if lost:
        sentences.append(
            f"Without a finite loss ended {number_of(len(lost), 'run')}: {named(lost)}. Means "
            "leave them out and say so."
        )
    diverged = []
    for run in runs:
        weights = [weight for weight in run.weights if run.diverged(weight)]
        if weights:
            at = "" if 1 in weights else f" (at α {named([f'{w:g}' for w in weights])} only)"
            diverged.append(f"{run.record.get('cell', run.method)}{at}")
    if diverged:
        sentences.append(
            f"Diverged: {number_of(len(diverged), 'run')}, with a loss above {fixed(limit, 1)} "
            f"nats a token (twice the largest of the base models', plus 10): {named(diverged)}. "
            "Means, curves and charts leave them out, and tables say so."
        )
    return sentences


def _better_text(analysis: Analysis) -> list[str]:
    """Methods after which ordinary text is predicted better than before training."""
    bases = {
        seed: number(base["scores"]["1"], "text", "old", "nll")
        for seed, base in analysis.results.bases.items()
    }
    clearly, few = [], []
    for row in (row for row in analysis.rows if row.weight is not CHOSEN):
        pairs = [
            (value, bases[seed])
            for seed, value in row.finite("text").items()
            if math.isfinite(bases.get(seed, math.nan))
        ]
        if not pairs:
            continue
        found = paired_difference([after for after, _ in pairs], [before for _, before in pairs])
        text = (
            f"{row.title} ({spread(found.mean, found.sd, sign=True)}, "
            f"{number_of(len(pairs), 'seed')})"
        )
        if clear(found) == -1:
            clearly.append(text)
        elif len(pairs) < FEWEST_SEEDS and found.direction == -1 and found.mean < -SMALLEST:
            few.append(text)
    parts = [f"clearly for {named(clearly)}"] if clearly else []
    parts += [f"on too few seeds to judge for {named(few)}"] if few else []
    if not parts:
        return []
    return [
        "Old ordinary text is predicted better after training than before it (loss after minus "
        f"before, nats a token), {'; '.join(parts)}: such a model has adapted to text of the kind "
        "that is measured, as by replaying it, and that says nothing of what else it forgot. Its "
        "loss on that text is no measure of forgetting."
    ]


def _reach(analysis: Analysis) -> list[str]:
    """Sweeps that stopped while learning still improved: their curves may be cut short."""
    results = analysis.results
    falling, single = [], []
    for method in results.methods:
        rates = results.rates(method.name)
        if len(rates) == 1:
            single.append(method.title)
        if len(rates) < 2:
            continue
        hottest, before = (results.of(method.name, rate) for rate in (rates[-1], rates[-2]))
        seeds = [seed for seed in hottest if seed in before]
        last, former = (
            mean(mean(run.value("learn") for run in runs[seed]) for seed in seeds)
            for runs in (hottest, before)
        )
        if last < former - SMALLEST:
            falling.append(f"{method.title} ({fixed(former)} → {fixed(last)})")
    sentences = []
    if falling:
        sentences.append(
            "At the hottest learning rate that was tried, the loss on what is to be learned was "
            f"still falling for {named(falling)}: their curves may go on to the hot side."
        )
    if single:
        sentences.append(
            f"Only one learning rate was tried (or is finished) of {named(single)}: a point is no "
            "curve."
        )
    return sentences
