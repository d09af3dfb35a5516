"""CompareConfig: everything that a comparison is, as frozen data that is checked.

The methods' part is in `method_config`, reading it from YAML in `config_file`, the runs it makes in
`grid`. Where a model or data lie on a machine is no part of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from gradloc.compare.method_config import (
    MethodConfig,
    check_distinct,
    check_learning_rates,
    check_seeds,
)
from gradloc.measurement import REFERENCE_LOSSES

WORLDS = ("toy", "english")
MIX_KEYS = {"Replay": "replay", "MixReview": "mix_review", "SelfReplay": "self_replay"}
"""Class of a method's `mix` -> its key in a file."""
_PARTS = ("recadam", "lora", "slow_weights")


@dataclass(frozen=True)
class WorldConfig:
    """What the facts and the text are about.

    Args:
        kind: "toy" (`TemporalWorld` and a GPT-2 pretrained on it) or "english" (`EnglishWorld`
            and a model that is given).
        options: of that world; `gradloc.compare.study` checks them.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in WORLDS:
            raise ValueError(f"kind={self.kind!r}: choose from {', '.join(map(repr, WORLDS))}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What all runs have in common.

    Args:
        block_size: tokens a row.
        batch_size: rows a step.
        betas: of AdamW.
        weight_decay: decoupled.
        max_grad_norm: clips the active layers' gradient norm; None: not clipped.
        warmup_share: the share of the steps, in [0, 1), in which the learning rate rises; it is
            constant after that.
    """

    block_size: int = 64
    batch_size: int = 16
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    warmup_share: float = 0.1

    def __post_init__(self) -> None:
        for name, low in (("block_size", 2), ("batch_size", 1), ("weight_decay", 0)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: at least {low}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)!r}: two numbers in [0, 1)")
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r}: above 0, or null for none")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share={self.warmup_share!r}: a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """How the base model is traced.

    Args:
        num_probes: of each kind.
        batch_size: probes a batch.
        reference_loss: that policies read unless they say otherwise: "all" or "matched-spans".
    """

    num_probes: int = 32
    batch_size: int = 8
    reference_loss: str = "matched-spans"

    def __post_init__(self) -> None:
        for name in ("num_probes", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: at least 1")
        if self.reference_loss not in REFERENCE_LOSSES:
            raise ValueError(
                f"reference_loss={self.reference_loss!r}: choose from "
                f"{', '.join(map(repr, REFERENCE_LOSSES))}"
            )


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison.

    Args:
        world: what the facts are about.
        budget_tokens: tokens of all passes of a run: new and keep data, traces, generated text.
        seeds: for methods without seeds of their own, which hold theirs.
        learning_rates: the same.
        alphas: interpolation weights at which each trained model is scored; 1 (no interpolation)
            is among them.
        training: what all runs have in common.
        trace: how the base is traced.
        threads: of each process.
        methods: at least one, of different names.

    Raises:
        ValueError: a value out of range.
    """

    world: WorldConfig
    budget_tokens: int
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    alphas: tuple[float, ...] = (1.0,)
    training: TrainingConfig = TrainingConfig()
    trace: TraceConfig = TraceConfig()
    threads: int = 1
    methods: tuple[MethodConfig, ...]

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        check_learning_rates(self.learning_rates)
        for alpha in self.alphas:
            if not 0 <= alpha <= 1:
                raise ValueError(f"alphas: {alpha!r} must be in [0, 1]")
        check_distinct("alphas", self.alphas)
        # Records name them by this text.
        if len({f"{alpha:g}" for alpha in self.alphas}) < len(self.alphas):
            raise ValueError(f"alphas={list(self.alphas)}: two agree in their first six digits")
        if 1 not in self.alphas:
            raise ValueError(
                f"alphas={list(self.alphas)}: add 1, the trained model as it is, which all others "
                "are compared with"
            )
        if self.threads < 1:
            raise ValueError(f"threads={self.threads!r}: at least 1")
        step = self.training.block_size * self.training.batch_size
        if self.budget_tokens < step:
            raise ValueError(
                f"budget_tokens={self.budget_tokens!r}: one step takes {step} tokens (block_size × "
                "batch_size), so give at least that"
            )
        if not self.methods:
            raise ValueError("methods={}: give at least one")
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"methods: the names {names} are not distinct")

    def method(self, name: str) -> MethodConfig:
        """The method of this name.

        Raises:
            KeyError: there is none.
        """
        return {method.name: method for method in self.methods}[name]

    def fixed(self) -> dict[str, Any]:
        """What all runs of a folder share, ready for JSON: all but methods, seeds and rates.

        The number of threads is left out: it is no setting of the experiment.
        """
        body = self.to_json()
        return {
            name: body[name] for name in ("world", "budget_tokens", "training", "trace", "alphas")
        }

    def digest(self) -> str:
        """16 hex digits that differ when anything in the configuration does."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The same as a file has it, all defaults written out: `config_file` reads it again."""
        return {
            "world": {"kind": self.world.kind, **_plain(self.world.options)},
            "budget_tokens": self.budget_tokens,
            "seeds": list(self.seeds),
            "learning_rates": list(self.learning_rates),
            "alphas": list(self.alphas),
            "training": _plain(asdict(self.training)),
            "trace": _plain(asdict(self.trace)),
            "threads": self.threads,
            "methods": {
                method.name: {
                    "title": method.title,
                    **method_settings(method),
                    "learning_rates": list(method.learning_rates),
                    "seeds": list(method.seeds),
                    "draws": method.draws,
                }
                for method in self.methods
            },
        }


def method_settings(method: MethodConfig) -> dict[str, Any]:
    """What decides a run of the method, apart from rate, seed and draw, as a file has it.

    Options that are None are left out, so that an option that is added to a method later does not
    make results void that did not have it.
    """
    settings = {"localize": _without_none(asdict(method.localize))}
    if method.mix is not None:
        settings[MIX_KEYS[type(method.mix).__name__]] = _without_none(asdict(method.mix))
    for name in _PARTS:
        part = getattr(method, name)
        if part is not None:
            settings[name] = _without_none(
                {field.name: getattr(part, field.name) for field in fields(part)}
            )
    return settings


def digest(body: Any) -> str:
    """The first 16 hex digits of the SHA-256 of `body` as canonical JSON."""
    text = json.dumps(
        body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def _without_none(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in body.items() if value is not None}


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists, mappings are dicts."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
