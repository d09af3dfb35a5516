"""What the demo measures: scores of a model, a run with its scores, and the whole outcome.

Data and their JSON; tables, sentences and the report are made of them elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradloc.demo.methods import Method
from gradloc.evaluate import ProbeScore, TextScore
from gradloc.profile import GradientProfile

KINDS = ("updated", "new", "unchanged")
PERIODS = ("old", "new")


@dataclass(frozen=True)
class Scores:
    """What a model knows.

    Args:
        probes: "updated", "new", "unchanged" -> score on the facts after the date.
        text: "old", "new" -> score on ordinary text of that time.
    """

    probes: Mapping[str, ProbeScore]
    text: Mapping[str, TextScore]

    def nll(self, measure: str) -> float:
        """Nats a token: of a kind of facts, or of "old text" or "new text"."""
        if measure.endswith(" text"):
            return self.text[measure.removesuffix(" text")].nll
        return self.probes[measure].nll

    def learned(self) -> float:
        """What the new corpus teaches, in nats a token, lower is better: updated and new facts."""
        return (self.nll("updated") + self.nll("new")) / 2


@dataclass(frozen=True)
class Run:
    """One run of a method on the new corpus.

    Args:
        method: its name.
        repeat: from 0; runs of the same repeat see the same data in the same order.
        active_layers: names of the layers that trained.
        share_of_parameters: of the model's parameters, in those layers.
        optimizer_bytes: AdamW's moments at the end.
        seconds: of the steps, without loading, saving and scoring.
        scores: afterwards.
    """

    method: str
    repeat: int
    active_layers: tuple[str, ...]
    share_of_parameters: float
    optimizer_bytes: int
    seconds: float
    scores: Scores


@dataclass(frozen=True)
class Outcome:
    """Everything that the report tells.

    Args:
        seed: of the demo.
        quick: whether it was the quick form.
        base: scores before continuing.
        base_accuracy: share of the old facts that the base model knows.
        base_steps: optimizer steps that it took.
        num_old_facts: facts before the date.
        runs: of all methods and repeats.
        profile: of the base model.
        settings: sizes, as in `DemoSettings`.
        machine: what it ran on, name -> value.
        seconds: of the whole demo so far.
    """

    seed: int
    quick: bool
    base: Scores
    base_accuracy: float
    base_steps: int
    num_old_facts: int
    runs: tuple[Run, ...]
    profile: GradientProfile
    settings: Mapping[str, Any]
    machine: Mapping[str, str]
    seconds: float

    def of(self, method: Method) -> list[Run]:
        """The runs of a method, by repeat."""
        return sorted(
            (run for run in self.runs if run.method == method.name), key=lambda run: run.repeat
        )

    def to_json(self) -> dict[str, Any]:
        """Ready for `write_json`, without the profile, which has its own file."""
        runs = [asdict(run) for run in self.runs]
        content = {
            "seed": self.seed,
            "quick": self.quick,
            "settings": dict(self.settings),
            "machine": dict(self.machine),
            "seconds": round(self.seconds, 1),
            "base": {
                "accuracy_on_old_facts": self.base_accuracy,
                "num_steps": self.base_steps,
                "scores": asdict(self.base),
            },
            "runs": runs,
        }
        return dict(_finite(content))


@dataclass(frozen=True)
class DemoResult:
    """Where the demo left its files, and what came out.

    Args:
        folder: the output folder.
        report: report.html in it.
        outcome: the numbers.
    """

    folder: Path
    report: Path
    outcome: Outcome


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is nan for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def over(runs: Sequence[Run], value: Callable[[Run], float]) -> tuple[float, float]:
    """Mean and standard deviation of a number over runs."""
    return mean_and_sd([value(run) for run in runs])


def _finite(value: Any) -> Any:
    """JSON has no inf and nan: null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
