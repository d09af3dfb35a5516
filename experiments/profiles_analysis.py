"""What the norms that `profiles.py` has kept show: every test of one seed, from its parts' files.

Runs no model and writes nothing; tables stand in `profiles_report`, charts in `profiles_chart`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradloc.compare.profile_tests import (
    KindCorrelations,
    LayerRatios,
    compare_kinds,
    kind_correlations,
    layer_ratios,
)
from gradloc.compare.profiles import TracedBatches
from gradloc.files import read_json

SCHEMA = "gradloc.experiments.profiles"
VERSION = 1

# Which kinds are compared two by two, where both are there.
PAIRS = (
    ("updated", "new"),
    ("updated", "unchanged"),
    ("new", "unchanged"),
    ("updated", "outdated"),
    ("unchanged", "outdated"),
    ("updated", "new-facts"),
    ("new", "popular"),
    ("unchanged", "popular"),
)
REFERENCES = {
    "all": "whole sequences",
    "matched": "random spans of equal length",
    "placed": "spans of equal length and context",
    "surprising": "spans of equal length, context and loss",
}
# Variants of claim (a): the prefix of the kinds' parts, and the reference common to all kinds.
VARIANTS = {
    "whole": ("probes", "all", "whole spans, against whole sequences"),
    "short": (
        "short",
        "short-reference",
        "equally many tokens of every span, against spans as short",
    ),
}


@dataclass(frozen=True)
class Seed:
    """What was traced for one seed: its number, `about.json`, and the parts by name."""

    number: int
    about: Mapping[str, Any]
    parts: Mapping[str, TracedBatches]
    contexts: Mapping[str, float]

    def kinds(self, prefix: str = "probes") -> dict[str, np.ndarray]:
        """Kind -> norms of the parts with this prefix, in the order of the run."""
        return {
            name.removeprefix(f"{prefix}-"): self.parts[name].norms
            for name in self.about["parts"]
            if name.startswith(f"{prefix}-")
            and not name.endswith("-reference")
            and name in self.parts
        }

    def reference(self, loss: str, kind: str) -> np.ndarray | None:
        """Norms of the reference of this name for a kind, where it was traced."""
        found = self.parts.get("all" if loss == "all" else f"{loss}-{kind}")
        return None if found is None else found.norms


def read_seed(folder: Path) -> Seed:
    """Read the parts of one seed that are there."""
    about = read_json(folder / "about.json", schema=SCHEMA, version=VERSION)
    parts, contexts = {}, {}
    for name in about["parts"]:
        if (folder / f"{name}.json").is_file():
            body = read_json(folder / f"{name}.json", schema=SCHEMA, version=VERSION)
            parts[name] = TracedBatches.from_json(body)
            contexts[name] = body["context_tokens"]
    return Seed(int(folder.name.removeprefix("seed-")), about, parts, contexts)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one seed shows.

    Args:
        seed: its number.
        tests: variant -> pair ("a b"), or "all" -> its test.
        correlations: variant -> all kinds together. "own": each kind against the random spans
            that are matched to it, for which there is no permutation test.
        ratios: reference -> kind -> its layers. Controls are among the kinds.
    """

    seed: int
    tests: dict[str, dict[str, Any]]
    correlations: dict[str, KindCorrelations]
    ratios: dict[str, dict[str, LayerRatios]]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "seed": self.seed,
            "tests": {
                variant: {
                    pair: {
                        "matrix": test.observed.matrix.tolist(),
                        "corrected": test.observed.corrected.tolist(),
                        "statistic": test.observed.statistic,
                        "batches_a_half": test.observed.num_batches,
                        "p": test.p,
                    }
                    for pair, test in tests.items()
                }
                for variant, tests in self.tests.items()
            },
            "correlations": {
                variant: {"kinds": list(one.kinds), "matrix": one.matrix.tolist()}
                for variant, one in self.correlations.items()
            },
            "ratios": {
                loss: {
                    kind: {name: getattr(one, name).tolist() for name in _RATIO_FIELDS}
                    for kind, one in by_kind.items()
                }
                for loss, by_kind in self.ratios.items()
            },
        }


_RATIO_FIELDS = ("ratio", "geometric", "low", "high", "p_above", "p_below")


def analyse(seed: Seed, num_permutations: int) -> Found:
    """Every test of one seed, of the parts that are there."""

    def test(kinds: dict[str, np.ndarray], reference: np.ndarray) -> Any:
        return compare_kinds(kinds, reference, num_permutations=num_permutations)

    tests: dict[str, dict[str, Any]] = {}
    correlations = {}
    for variant, (prefix, common, _) in VARIANTS.items():
        kinds = seed.kinds(prefix)
        if common not in seed.parts or len(kinds) < 2:
            continue
        reference = seed.parts[common].norms
        groups = {" ".join(pair): pair for pair in PAIRS if set(pair) <= set(kinds)}
        tests[variant] = {
            name: test({kind: kinds[kind] for kind in pair}, reference)
            for name, pair in {"all": tuple(kinds), **groups}.items()
        }
        correlations[variant] = kind_correlations(kinds, dict.fromkeys(kinds, reference))
    controls = seed.kinds("control")
    if len(controls) > 1 and "all" in seed.parts:
        # The same text with spans of different lengths: what the length alone does to a profile.
        texts = {f"text-as-{kind}": norms for kind, norms in controls.items()}
        tests["whole"][" ".join(texts)] = test(texts, seed.parts["all"].norms)
    kinds = seed.kinds()
    own = {kind: seed.reference("matched", kind) for kind in kinds}
    if all(one is not None for one in own.values()):
        correlations["own"] = kind_correlations(kinds, own)
    ratios: dict[str, dict[str, LayerRatios]] = {}
    for loss in REFERENCES:
        rows = {kind: (norms, seed.reference(loss, kind)) for kind, norms in kinds.items()}
        # A control has the spans of a kind and neither its context nor its loss.
        for kind, norms in controls.items() if loss in ("all", "matched") else ():
            rows[f"text as {kind}"] = (norms, seed.reference(loss, kind))
        ratios[loss] = {
            kind: layer_ratios(norms, reference)
            for kind, (norms, reference) in rows.items()
            if reference is not None
        }
    return Found(seed=seed.number, tests=tests, correlations=correlations, ratios=ratios)
