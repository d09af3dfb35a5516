"""Results: the runs of a comparison, its methods and bases, as the report works with them.

Only data and the numbers in it; reading the folder is `read`, and judging is left to others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gradloc.compare.results import Measures, measures

KINDS = ("updated", "new", "unchanged")
TEXTS = ("old", "new")
CHOSEN = None
"""Stands for the interpolation weight that a run's validation chose, where a weight is asked for.
"""
Weight = float | None
_LARGEST_UNKNOWN = 15.0
"""Nats a token: guessing among three million tokens; where no base was scored."""


def number(record: Any, *path: str) -> float:
    """The number at a path of keys; nan where it is missing or null."""
    for name in path:
        record = record.get(name) if isinstance(record, Mapping) else None
    if isinstance(record, (int, float)) and not isinstance(record, bool):
        return float(record)
    return math.nan


def mean(values: Iterable[float]) -> float:
    """Of any number of values; nan of none."""
    given = list(values)
    return math.fsum(given) / len(given) if given else math.nan


def _judged_by(name: str) -> Callable[[Any], float]:
    def value(scores: Any) -> float:
        found = getattr(measures(scores or {}), name)
        return math.nan if found is None else float(found)

    return value


def _at(*path: str) -> Callable[[Any], float]:
    return lambda scores: number(scores, *path)


MEASURES: Mapping[str, Callable[[Any], float]] = {
    **{name: _judged_by(name) for name in Measures._fields},
    **{f"right {kind}": _at("probes", kind, "exact_match") for kind in KINDS},
}
"""What is measured -> the number in an entry of a record's "scores". Lower is better in all but the
share of facts that are right; "learn", "forget" and "text" are in nats a token. Perplexities are
told by their place: "perplexity probes updated", "perplexity text old"."""


def measure_of(name: str) -> Callable[[Any], float]:
    """The reader of a measure: one of `MEASURES`, or a perplexity."""
    if name.startswith("perplexity "):
        part, which = name.removeprefix("perplexity ").split(" ", 1)
        return _at(part, which, "perplexity")
    return MEASURES[name]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of the comparison, as its configuration has it.

    Args:
        name: in records.
        title: for people.
        policy: how it chooses layers; "none": all of them.
        others: its other settings; methods that share them differ in their layers only.
        learning_rates: swept.
        seeds: that it is to run on.
    """

    name: str
    title: str
    policy: str = "none"
    others: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()

    @property
    def has_adapters(self) -> bool:
        """Whether it trains adapters in its layers, and not their weights."""
        return "lora" in self.others


def divergence_limit(bases: Iterable[Mapping[str, Any]]) -> float:
    """Nats a token above which a loss after training is no result: the run diverged.

    Twice the largest of the bases' losses, plus 10: a model that knows nothing at all has the
    logarithm of its vocabulary's size, 8 to 13, so a run beyond it has lost more than there was.

    Args:
        bases: records of base models; without a loss in any, 15 stands for the largest.
    """
    found = [
        value
        for base in bases
        for value in measures(base["scores"]["1"])
        if value is not None and math.isfinite(value)
    ]
    return 2 * max(found, default=_LARGEST_UNKNOWN) + 10


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        record: a line of results.jsonl with kind "run".
        limit: loss in nats a token above which it counts as diverged; see `divergence_limit`.
    """

    record: Mapping[str, Any]
    limit: float = math.inf

    @property
    def method(self) -> str:
        """Its method's name."""
        return str(self.record["method"])

    @property
    def learning_rate(self) -> float:
        """As swept."""
        return float(self.record["learning_rate"])

    @property
    def seed(self) -> int:
        """Of world, base and data order."""
        return int(self.record["seed"])

    @property
    def draw(self) -> int:
        """Which of the random layer sets; 0 for other policies."""
        return int(self.record.get("draw", 0))

    @property
    def weights(self) -> list[float]:
        """Interpolation weights that were scored, from 1 downwards."""
        return sorted(map(float, self.record["scores"]), reverse=True)

    def value(self, measure: str, weight: Weight = 1.0) -> float:
        """A measure at an interpolation weight, or at the chosen one.

        Returns:
            nan where there is none, or where the run diverged at that weight.
        """
        return math.nan if self.diverged(weight) else self.recorded(measure, weight)

    def recorded(self, measure: str, weight: Weight = 1.0) -> float:
        """The same as it was recorded, even if the run diverged."""
        scores = self.record["scores"].get(self._key(weight))
        return measure_of(measure)(scores)

    def diverged(self, weight: Weight = 1.0) -> bool:
        """Whether learn, forget or text is above the limit at a weight."""
        return any(self.recorded(name, weight) > self.limit for name in Measures._fields)

    def validation(self, weight: Weight = 1.0) -> float:
        """Learning plus forgetting on the validation probes, in nats a token."""
        key = self._key(weight)
        return sum(number(self.record.get("validation"), key, what) for what in ("learn", "forget"))

    def _key(self, weight: Weight) -> str:
        return f"{number(self.record, 'alpha') if weight is CHOSEN else weight:g}"


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that a comparison's folder holds.

    Args:
        name: of the folder.
        config: as config.json has it.
        methods: in the configuration's order.
        runs: those that the configuration asks for and that are finished.
        bases: seed -> the record of its base model.
        missing: names of the cells that are not finished.
        failed: of those among them whose last attempt, or that of their base, ended in an error:
            name -> the reason.
        set_aside: finished runs that the configuration does not ask for (any more).
        other_keys: whether the records' keys were made by another version, so that runs were found
            by method, learning rate, seed and draw.
        limit: loss in nats a token above which a run counts as diverged.
    """

    name: str
    config: Mapping[str, Any]
    methods: tuple[Method, ...]
    runs: tuple[Run, ...]
    bases: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    set_aside: tuple[Run, ...] = ()
    other_keys: bool = False
    limit: float = math.inf

    @property
    def num_cells(self) -> int:
        """Runs that the configuration asks for."""
        return len(self.runs) + len(self.missing)

    def scored(self, part: str) -> list[str]:
        """What the runs have scores of: kinds of "probes" or of "text", the usual ones first."""
        first = {"probes": KINDS, "text": TEXTS}[part]
        found = {
            name
            for record in (*self.bases.values(), *(run.record for run in self.runs))
            for scores in record["scores"].values()
            for name in (scores or {}).get(part) or ()
        }
        return [*(n for n in first if n in found), *sorted(found.difference(first))]

    @property
    def interpolates(self) -> bool:
        """Whether any weight but 1 was scored."""
        return any(weight != 1 for run in self.runs for weight in run.weights)

    def method(self, name: str) -> Method | None:
        """The method of that name, if there is one."""
        return next((method for method in self.methods if method.name == name), None)

    def of(self, method: str, learning_rate: float | None = None) -> dict[int, tuple[Run, ...]]:
        """The runs of a method, at one learning rate or at all: seed -> its runs, draws in order.

        Only seeds that have any.
        """
        found: dict[int, list[Run]] = {}
        for run in self.runs:
            if run.method == method and learning_rate in (None, run.learning_rate):
                found.setdefault(run.seed, []).append(run)
        return {
            seed: tuple(sorted(found[seed], key=lambda run: (run.learning_rate, run.draw)))
            for seed in sorted(found)
        }

    def rates(self, method: str) -> list[float]:
        """Learning rates at which the method has finished runs, rising."""
        return sorted({run.learning_rate for run in self.runs if run.method == method})

    def machines(self) -> list[dict[str, str]]:
        """The different machines of runs and bases, in order of appearance."""
        found: list[dict[str, str]] = []
        for record in (*self.bases.values(), *(run.record for run in self.runs)):
            machine = {str(k): str(v) for k, v in dict(record.get("machine") or {}).items()}
            if machine and machine not in found:
                found.append(machine)
        return found
