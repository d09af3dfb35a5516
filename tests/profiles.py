"""Profiles made by hand, for the tests of profiles, their table and their heatmap."""

from __future__ import annotations

import math

import numpy as np

from gradloc.measurement import Measurement, ProfiledLayer
from gradloc.profile import GradientProfile

NAN = math.nan


def measured(norms, errors=None, tokens=4):
    errors = [0.1 * norm for norm in norms] if errors is None else errors
    return Measurement(tuple(norms), tuple(errors), 2, 4, tokens)


def profile_of(layers, *, kinds=("updated", "new"), matched=True, spread=1.0, seed=0):
    """Random norms; every kind has its own matched reference."""
    random = np.random.default_rng(seed)

    def drawn():
        return measured(random.lognormal(0, 0.3 * spread, len(layers)).tolist())

    references = {"all": dict.fromkeys(kinds, drawn())}
    if matched:
        references["matched-spans"] = {kind: drawn() for kind in kinds}
    return GradientProfile(
        layers=tuple(layers),
        probes={kind: drawn() for kind in kinds},
        references=references,
        seed=3,
        step=20,
        gradloc_version="0.1.0",
        torch_version="2.6.0",
    )


def gpt2_layers(blocks):
    inside = [
        ProfiledLayer(f"transformer.h.{block}.{part}", kind, "transformer.h", block, 10)
        for block in range(blocks)
        for part, kind in (("attn", "attention"), ("mlp", "mlp"))
    ]
    wte = ProfiledLayer("transformer.wte", "embedding", num_elements=50)
    return [wte, *inside, ProfiledLayer("transformer.ln_f", "norm", num_elements=2)]


SMALL = GradientProfile(
    layers=(ProfiledLayer("a", num_elements=3), ProfiledLayer("b"), ProfiledLayer("c")),
    probes={
        "updated": measured([6.0, 2.0, 0.0], [0.3, 0.2, 0.0]),
        "new": measured([2.0, 4.0, 0.0], [0.4, NAN, 0.0]),
    },
    references={
        "all": dict.fromkeys(("updated", "new"), measured([2.0, 1.0, 0.0], [0.1, 0.1, 0.0])),
        "matched-spans": {
            "updated": measured([3.0, 4.0, 0.0], [0.2, 0.4, 0.0]),
            "new": measured([1.0, 4.0, 0.0], [0.4, 0.2, 0.0]),
        },
    },
)
