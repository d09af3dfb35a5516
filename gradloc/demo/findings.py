"""Says in words what the demo's numbers show, and no more than they show.

Every sentence follows from a comparison of two methods, run by run, on the same data in the same
order. Nothing here knows what ought to come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gradloc.demo.methods import FREEZE, FULL, GENTLE, RANDOM, SCALE, Method
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
    return [
        *sentences,
        _compared(outcome, FREEZE, FULL),
        _compared(outcome, FREEZE, GENTLE),
        _control(outcome),
        _compared(outcome, SCALE, FULL),
        _cost(outcome),
    ]


def verdict(differences: Sequence[float]) -> int:
    """-1: clearly lower, 1: clearly higher, 0: neither; by `RULE`."""
    mean, deviation = mean_and_sd(differences)
    error = deviation / math.sqrt(len(differences))
    agree = all(d > 0 for d in differences) or all(d < 0 for d in differences)
    if not agree or not abs(mean) > max(2 * error, _SMALLEST):
        return 0
    return 1 if mean > 0 else -1


def _compared(outcome: Outcome, method: Method, other: Method) -> str:
    runs, others = outcome.of(method), outcome.of(other)
    learned = _differences(runs, others, lambda run: run.scores.learned())
    forgot = _differences(runs, others, lambda run: run.scores.nll("unchanged"))
    text = _differences(runs, others, lambda run: run.scores.nll("old text"))
    named = {
        FULL: "full AdamW",
        GENTLE: "full AdamW at half the learning rate",
        RANDOM: "as many random layers",
    }[other]
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
        return "No clear difference on facts."
    if learned >= 0 and forgot <= 0:
        return "Better on facts, here."
    if learned <= 0 and forgot >= 0:
        return "Worse on facts, here."
    return (
        "A trade: less learned for less forgotten, as a lower learning rate would do."
        if learned < 0
        else "A trade: more learned for more forgotten, as a higher learning rate would do."
    )


def _control(outcome: Outcome) -> str:
    runs, control = outcome.of(FREEZE), outcome.of(RANDOM)
    sentence = _compared(outcome, FREEZE, RANDOM)
    learned = -verdict(_differences(runs, control, lambda run: run.scores.learned()))
    forgot = verdict(_differences(runs, control, lambda run: run.scores.nll("unchanged")))
    if learned == 0 and forgot == 0:
        sentence += (
            " So these runs do not show that it matters which layers train, only that fewer of "
            "them do."
        )
    return sentence


def _cost(outcome: Outcome) -> str:
    parts = []
    full = outcome.of(FULL)
    needed = full[0].optimizer_bytes
    for method in (FREEZE, SCALE):
        runs = outcome.of(method)
        own = runs[0].optimizer_bytes
        memory = (
            "as much optimizer memory as full AdamW"
            if own == needed
            else f"{megabytes(own)} of optimizer memory, full AdamW {megabytes(needed)}"
        )
        parts.append(
            f"{method.title} needed {memory}; its steps took "
            f"{median_seconds(runs) / median_seconds(full):.2f} times as long. "
        )
    return "".join(parts) + "Times vary with whatever else the machine does."


def _differences(
    runs: Sequence[Run], others: Sequence[Run], value: Callable[[Run], float]
) -> list[float]:
    return [value(a) - value(b) for a, b in zip(runs, others, strict=True)]


def _signed(differences: Sequence[float]) -> str:
    mean, deviation = mean_and_sd(differences)
    signed = f"{mean:+.2f}" if abs(mean) >= 0.005 else "0.00"
    return f"{signed} ± {deviation:.2f}".replace("-", "−")
