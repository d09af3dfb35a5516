"""The runs that a configuration makes, each with a name and a key, in the order they are made.

A key says what decides a run's result, so a record is found again whatever else changed. Runs
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gradloc.compare.config import CompareConfig, digest, method_settings
from gradloc.compare.method_config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid.

    Args:
        method: what is run.
        learning_rate: of a layer with scale 1.
        seed: of world, base and data order.
        draw: number of the draw of random layers; 0 for all other policies.
        fixed: `CompareConfig.fixed()`: what it shares with all others.
    """

    method: MethodConfig
    learning_rate: float
    seed: int
    draw: int
    fixed: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """For people: "tgl-fp lr=0.001 seed=0 draw=0"."""
        return f"{self.method.name} lr={self.learning_rate:g} seed={self.seed} draw={self.draw}"

    @cached_property
    def key(self) -> str:
        """16 hex digits over all that decides the result; titles and threads do not."""
        return digest(
            {
                **self.fixed,
                "method": {"name": self.method.name, **method_settings(self.method)},
                "learning_rate": self.learning_rate,
                "seed": self.seed,
                "draw": self.draw,
            }
        )


def cells(config: CompareConfig, only: Sequence[str] | None = None) -> list[Cell]:
    """The runs of a comparison, by seed, then draw, then learning rate, then method.

    So an unfinished grid has whole seeds, and within one every method at the first learning rates.

    Args:
        config: the comparison.
        only: methods to keep; None: all.

    Raises:
        ValueError: a name in `only` is no method of the configuration.
    """
    names = [method.name for method in config.methods]
    for name in only or ():
        if name not in names:
            raise ValueError(
                f"no method {name!r} in the configuration; there are {', '.join(names)}"
            )
    fixed = config.fixed()
    place = {name: index for index, name in enumerate(names)}
    # The configuration's order first, then that of methods with lists of their own.
    seeds = _order(config.seeds, *(method.seeds for method in config.methods))
    rates = _order(config.learning_rates, *(method.learning_rates for method in config.methods))
    found = [
        Cell(method=method, learning_rate=rate, seed=seed, draw=draw, fixed=fixed)
        for method in config.methods
        if only is None or method.name in only
        for seed in method.seeds
        for draw in range(method.draws)
        for rate in method.learning_rates
    ]
    found.sort(
        key=lambda cell: (
            seeds[cell.seed],
            cell.draw,
            rates[cell.learning_rate],
            place[cell.method.name],
        )
    )
    return found


def base_key(config: CompareConfig, seed: int) -> str:
    """16 hex digits over what decides the base of a seed, and how it is traced and scored."""
    fixed = config.fixed()
    shared = {name: fixed[name] for name in ("world", "training", "trace")}
    return digest({"base": shared, "seed": seed})


def _order(*lists: Sequence[float]) -> dict[float, int]:
    return {
        value: index for index, value in enumerate(dict.fromkeys(v for vs in lists for v in vs))
    }
