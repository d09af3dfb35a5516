"""Turns what `profiles_analysis` finds into tables and charts, from the norms alone.

Decides nothing and runs no model. Drawing stands in `profiles_chart`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from profiles_analysis import (
    REFERENCES,
    SCHEMA,
    VARIANTS,
    VERSION,
    Found,
    Seed,
    analyse,
    read_seed,
)
from profiles_chart import draw_correlations, draw_profiles

from gradloc.compare.profile_tests import LayerRatios, benjamini_hochberg, holm
from gradloc.files import write_json, write_text


def summarize(output: Path, *, num_permutations: int = 1999) -> list[str]:
    """Write `summary.json`, `profiles.md` and the charts into `output`; returns what was written.

    Args:
        output: holds a folder a seed.
        num_permutations: of the tests of claim (a).

    Raises:
        FileNotFoundError: no traced seed is there.
    """
    seeds = [read_seed(folder) for folder in sorted(output.glob("seed-*"))]
    if not seeds:
        raise FileNotFoundError(f"{output} holds no seed-N folder: trace first")
    found = [analyse(seed, num_permutations) for seed in seeds]
    write_json(
        output / "summary.json",
        {"seeds": [_rounded(one.to_json()) for one in found]},
        schema=SCHEMA,
        version=VERSION,
    )
    write_text(output / "profiles.md", "\n".join(tables(seeds, found)) + "\n")
    draw_profiles(seeds[0].about["layers"], found, REFERENCES, output / "profiles.png")
    draw_correlations(found, VARIANTS, output / "correlations.png")
    names = ("profiles.md", "summary.json", "profiles.png", "correlations.png")
    return [str(output / name) for name in names]


def tables(seeds: Sequence[Seed], found: Sequence[Found]) -> Iterable[str]:
    """The lines of `profiles.md`."""
    settings = seeds[0].about["settings"]
    yield "# Layer profiles by kind of knowledge"
    yield ""
    yield (
        f"World: {settings['world']}, model {settings['model']}, seeds "
        f"{', '.join(str(seed.number) for seed in seeds)}; batches of {settings['batch_size']} "
        f"sequences, {len(seeds[0].about['layers'])} layers. Means over seeds. Made by "
        "`experiments/profiles.py`; `--summarize` makes it again from the norms kept beside it."
    )
    missing = [name for seed in seeds for name in seed.about["parts"] if name not in seed.parts]
    if missing:
        yield f"\n**Unfinished**: {len(missing)} parts are missing, such as {missing[0]}."
    yield from ["", "## What was traced", "", *_material(seeds)]
    yield from ["", "## (a) Does each kind have a profile of its own?", "", *_claim_a(found)]
    yield from ["", "## (b) Which layers react more than to ordinary text?", "", *_claim_b(found)]


def _material(seeds: Sequence[Seed]) -> Iterable[str]:
    rows = []
    for name in seeds[0].about["parts"]:
        there = [seed for seed in seeds if name in seed.parts]
        if not there:
            continue
        size = there[0].about["settings"]["batch_size"]
        traced = [seed.parts[name] for seed in there]
        rows.append(
            [
                name,
                _mean([len(one.losses) for one in traced], ".0f"),
                _mean([np.mean(one.num_tokens) / size for one in traced], ".1f"),
                _mean([seed.contexts[name] for seed in there], ".1f"),
                _mean([np.mean(one.losses) for one in traced], ".2f"),
                _mean([one.norms.mean() for one in traced], ".3g"),
            ]
        )
    head = ["part", "batches", "span tokens", "context tokens", "nats a token", "mean norm"]
    return _table(head, rows)


def _claim_a(found: Sequence[Found]) -> Iterable[str]:
    yield (
        "Spearman correlation over layers between profiles of disjoint halves of the batches, each "
        "relative to another half of the reference. *Corrected*: between, over the root of the two "
        "within, which is 1 where the profiles differ by noise only. p: the kinds' names dealt out "
        "to the batches anew; Holm over the pairs of a variant."
    )
    for variant, (_, _, title) in VARIANTS.items():
        there = [one for one in found if variant in one.tests]
        if not there:
            continue
        yield from ["", f"**{title[0].upper()}{title[1:]}**", ""]
        names = list(there[0].tests[variant])
        pairs = [name for name in names if name != "all"]
        adjusted = [
            dict(zip(pairs, holm([one.tests[variant][pair].p for pair in pairs]), strict=True))
            for one in there
        ]
        rows = []
        for name in names:
            tests = [one.tests[variant][name] for one in there]
            values = [test.observed for test in tests]
            corrected = [one.corrected[0, 1] for one in values] if name in pairs else []
            rows.append(
                [
                    name.replace(" ", " – ") if name in pairs else "all kinds",
                    str(values[0].num_batches),
                    _mean([one.within for one in values], ".3f"),
                    _mean([one.between for one in values], ".3f"),
                    _mean([one.statistic for one in values], ".3f"),
                    _mean(corrected, ".3f"),
                    _p_values([test.p for test in tests]),
                    _p_values([one[name] for one in adjusted]) if name in pairs else "",
                ]
            )
        yield from _table(
            [
                "kinds",
                "batches a half",
                "within",
                "between",
                "difference",
                "corrected",
                "p",
                "Holm",
            ],
            rows,
        )


def _claim_b(found: Sequence[Found]) -> Iterable[str]:
    yield (
        "R: mean norm of the probes' batches over that of the reference's. *Geometric*: of "
        "geometric means, which single batches with huge norms sway less. Intervals: 95 %, "
        "bootstrap over the batches of both. *Holm*, *BH*: layers at 5 %, corrected over all "
        "layers and both directions, by permutation of Welch's t. *Text as …*: ordinary text, not "
        "that of the reference, with random spans as long as that kind's."
    )
    for loss, title in REFERENCES.items():
        kinds = dict.fromkeys(kind for one in found for kind in one.ratios.get(loss, {}))
        if not kinds:
            continue
        yield from ["", f"**Against text with the loss on {title}**", ""]
        rows = []
        for kind in kinds:
            each = [one.ratios[loss][kind] for one in found if kind in one.ratios[loss]]
            above, below = zip(*(_by_false_finds(one) for one in each), strict=True)
            thirds = [np.array_split(one.ratio, 3) for one in each]
            rows.append(
                [
                    kind,
                    _mean([one.ratio.mean() for one in each], ".2f"),
                    _mean([one.geometric.mean() for one in each], ".2f"),
                    _mean([one.ratio.min() for one in each], ".2f")
                    + "–"
                    + _mean([one.ratio.max() for one in each], ".2f"),
                    " / ".join(_mean([t[i].mean() for t in thirds], ".2f") for i in range(3)),
                    _mean([one.num_above for one in each], ".0f"),
                    _mean([one.num_above_corrected for one in each], ".0f"),
                    _mean(above, ".0f"),
                    _mean([one.num_below for one in each], ".0f"),
                    _mean([one.num_below_corrected for one in each], ".0f"),
                    _mean(below, ".0f"),
                ]
            )
        head = ["kind", "mean R", "geometric", "lowest–highest", "lower / middle / upper third"]
        head += ["interval above 1", "Holm", "BH", "interval below 1", "Holm", "BH"]
        yield from _table(head, rows)


def _by_false_finds(one: LayerRatios) -> tuple[int, int]:
    adjusted = benjamini_hochberg(np.concatenate([one.p_above, one.p_below])) < 0.05
    return int(adjusted[: len(one)].sum()), int(adjusted[len(one) :].sum())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _mean(values: Sequence[float], form: str) -> str:
    """Mean, and the standard deviation where there are several."""
    if not values:
        return ""
    mean = format(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} ± {format(float(np.std(values, ddof=1)), form)}"


def _p_values(values: Sequence[float]) -> str:
    return ", ".join(f"{p:.4f}" if p < 0.01 else f"{p:.2f}" for p in values)


def _rounded(content: Any) -> Any:
    """Four significant digits; what is no number (nan) becomes null."""
    if isinstance(content, dict):
        return {name: _rounded(one) for name, one in content.items()}
    if isinstance(content, list):
        return [_rounded(one) for one in content]
    if isinstance(content, float):
        return float(f"{content:.4g}") if math.isfinite(content) else None
    return content
