"""Says in words what the demo's numbers show, and no more than they show.

Every sentence follows from a comparison of two methods, run by run, on the same data in the same
order. Nothing here knows what ought to come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gradloc.demo.methods import FREEZE, FULL, RANDOM, SCALE, Method
from gradloc.demo.outcome import Outcome, Run, mean_and_sd
from gradloc.demo.table import median_seconds, megabytes

_SMALLEST = 0.02
"""Nats a token below which a difference is not worth a word."""

RULE = (
    "A difference counts when all runs agree on its direction and its mean is above twice its "
    f"standard error and above {_SMALLEST} nats a token"
)


def findings(outcome: Outcome) -> list[str]:
    """Sentences for people, the most important first."""
    full, base = outcome.of(FULL), outcome.base
    kept = mean_and_sd([run.scores.probes["unchanged"].exact_match for run in full])[0]
    learned = mean_and_sd(
        [
            (run.scores.probes["updated"].exact_match + run.scores.probes["new"].exact_match) / 2
            for run in full
        ]
    )[0]
    before = (base.probes["updated"].exact_match + base.probes["new"].exact_match) / 2
    sentences = [
        "Full AdamW brought the share of updated and new facts that the model completes from "
        f"{before:.0%} to {learned:.0%}; of the facts that did not change, and that the new corpus "
        f"does not mention, it completed {base.probes['unchanged'].exact_match:.0%} before and "
        f"{kept:.0%} after."
    ]
    if len(full) < 2:
        return [
            *sentences,
            "There was one run a method: how much runs differ by chance is not known, so "
            "differences between methods are not judged.",
        ]
    for method in (FREEZE, SCALE):
        sentences.append(_compared(outcome.of(method), full, method, FULL))
    sentences.append(_control(outcome))
    sentences.append(_cost(outcome))
    return sentences


def verdict(differences: Sequence[float]) -> int:
    """-1: clearly lower, 1: clearly higher, 0: neither; by `RULE`."""
    mean, deviation = mean_and_sd(differences)
    error = deviation / math.sqrt(len(differences))
    agree = all(d > 0 for d in differences) or all(d < 0 for d in differences)
    if not agree or not abs(mean) > max(2 * error, _SMALLEST):
        return 0
    return 1 if mean > 0 else -1


def _compared(runs: Sequence[Run], others: Sequence[Run], method: Method, other: Method) -> str:
    learned = _differences(runs, others, lambda run: run.scores.learned())
    forgot = _differences(runs, others, lambda run: run.scores.nll("unchanged"))
    text = _differences(runs, others, lambda run: run.scores.nll("old text"))
    named = "as many random layers" if other == RANDOM else other.title
    more = {-1: "less", 0: "about as much", 1: "more"}
    text_words = {
        -1: "and kept old ordinary text better",
        0: "and kept old ordinary text about as well",
        1: "and kept old ordinary text less well",
    }
    # A higher loss on what is to be learned means that less of it was learned.
    signs = (-verdict(learned), verdict(forgot))
    return (
        f"{method.title} against {named}: it "
        f"learned {more[signs[0]]} of the new and updated facts ({_signed(learned)} nats a token), "
        f"forgot {more[signs[1]]} of the unchanged ones ({_signed(forgot)}), "
        f"{text_words[verdict(text)]} ({_signed(text)}). {_judged(*signs)}"
    )


def _judged(learned: int, forgot: int) -> str:
    if learned == 0 and forgot == 0:
        return "No clear difference in either."
    if learned >= 0 and forgot <= 0:
        return "Better, here."
    if learned <= 0 and forgot >= 0:
        return "Worse, here."
    return (
        "A trade, not a gain: a lower learning rate also trades learning for forgetting, so one "
        "learning rate cannot say which of the two is better."
        if learned < 0
        else "A trade: more learned, more forgotten, as with a higher learning rate."
    )


def _control(outcome: Outcome) -> str:
    runs, control = outcome.of(FREEZE), outcome.of(RANDOM)
    sentence = _compared(runs, control, FREEZE, RANDOM)
    learned = -verdict(_differences(runs, control, lambda run: run.scores.learned()))
    forgot = verdict(_differences(runs, control, lambda run: run.scores.nll("unchanged")))
    if learned == 0 and forgot == 0:
        sentence += (
            " So in this world it did not show which layers were chosen; what differs from full "
            "training comes from training fewer of them."
        )
    return sentence


def _cost(outcome: Outcome) -> str:
    parts = []
    full = outcome.of(FULL)
    for method in (FREEZE, SCALE):
        runs = outcome.of(method)
        parts.append(
            f"{method.title} kept {megabytes(runs[0].optimizer_bytes)} of optimizer memory where "
            f"full AdamW kept {megabytes(full[0].optimizer_bytes)}, and its steps took "
            f"{median_seconds(runs) / median_seconds(full):.2f} times as long"
        )
    return (
        "; ".join(parts) + ". Times of so small a model vary with whatever else the machine does."
    )


def _differences(
    runs: Sequence[Run], others: Sequence[Run], value: Callable[[Run], float]
) -> list[float]:
    return [value(a) - value(b) for a, b in zip(runs, others, strict=True)]


def _signed(differences: Sequence[float]) -> str:
    mean, deviation = mean_and_sd(differences)
    return f"{mean:+.2f} ± {deviation:.2f}".replace("-", "−")
