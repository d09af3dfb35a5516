"""Records of a comparison that nobody ran, from a simple law of learning and forgetting.

Each method is as hot as its learning rate, with a gift: nats by which it forgets less than the law
at the same learning. Tests know from it what the report has to say.
"""

from __future__ import annotations

import math
import random

from gradloc.compare.config import CompareConfig
from gradloc.compare.config_file import config_from, save_config
from gradloc.compare.grid import base_key, cells
from gradloc.compare.results import RESULTS_FILE, append_record
from gradloc.report.analysis import analyse
from gradloc.report.read import results_from

BASE_LEARN, BASE_FORGET, BASE_TEXT = 7.7, 0.13, 4.2
LAYERS = (
    *(f"transformer.h.{block}.{part}" for block in range(4) for part in ("attn", "mlp")),
    "transformer.wte",
    "transformer.ln_f",
)
# Name -> what is in the configuration, nats of gift, heat beside vanilla's.
METHODS = {
    "vanilla": ({"title": "Vanilla"}, 0.0, 1.0),
    "tgl-fp": ({"title": "TGL+FP", "localize": "freeze"}, 0.0, 0.62),
    "random": ({"title": "Random layers", "localize": "random", "draws": 2}, 0.0, 0.6),
    "scale": ({"title": "TGL+ALR", "localize": "scale"}, -0.5, 1.0),
    "replay": ({"title": "Replay", "replay": {"ratio": 1.0}}, 0.45, 0.9),
}
SWEPT = (4e-4, 1e-3, 3e-3)


def config(methods=METHODS, *, seeds=(0, 1, 2), rates=SWEPT, alphas=(1, 0.5)):
    """The configuration, as read from a file."""
    return config_from(
        {
            "world": {"kind": "toy", "num_entities": 60},
            "budget_tokens": 102400,
            "seeds": list(seeds),
            "learning_rates": list(rates),
            "alphas": list(alphas),
            "methods": {name: settings for name, (settings, _, _) in methods.items()},
        }
    )


def law(heat: float) -> tuple[float, float]:
    """(learn, forget) that vanilla reaches at a heat: the hotter, the more of both."""
    return 1.2 + 4.0 * math.exp(-1.3 * heat), BASE_FORGET + 0.55 * heat**1.5


def scores(learn: float, forget: float, text: float) -> dict:
    def probe(nll):
        return {
            "nll": nll,
            "perplexity": math.exp(nll),
            "exact_match": math.exp(-nll),
            "num_probes": 40,
            "num_tokens": 90,
        }

    def words(nll):
        return {"nll": nll, "perplexity": math.exp(nll), "num_tokens": 5000}

    return {
        "probes": {
            "updated": probe(learn - 0.1),
            "new": probe(learn + 0.1),
            "unchanged": probe(forget),
        },
        "text": {"old": words(text), "new": words(text - 0.5)},
    }


def run_record(cell, comparison: CompareConfig, methods=METHODS, *, noise: float = 0.03) -> dict:
    """What `run_cell` would have made of a cell, had the law been true."""
    _, gift, heat = methods[cell.method.name]
    draw = random.Random(f"{cell.name}")
    of_seed = random.Random(cell.seed).gauss(0, 0.15)
    heat *= 1.5 * (1 + math.log10(cell.learning_rate / 1e-3))
    learn, forget = law(heat)
    learn, forget = learn + draw.gauss(0, noise), forget - gift * forget + draw.gauss(0, noise)
    text = BASE_TEXT + 0.5 * forget
    by_weight, validation = {}, {}
    for alpha in comparison.alphas:
        # Interpolation loses less on the way back than it unlearns.
        at = scores(
            of_seed + BASE_LEARN + (learn - BASE_LEARN) * alpha**0.17,
            0.5 * of_seed + BASE_FORGET + (forget - BASE_FORGET) * alpha**1.4,
            BASE_TEXT + (text - BASE_TEXT) * alpha,
        )
        by_weight[f"{alpha:g}"] = at
        validation[f"{alpha:g}"] = {
            "learn": at["probes"]["updated"]["nll"] + 0.1,
            "forget": at["probes"]["unchanged"]["nll"],
        }
    alpha = min(comparison.alphas, key=lambda a: sum(validation[f"{a:g}"].values()))
    trained = dict.fromkeys(LAYERS, 1.0)
    policy = cell.method.localize.policy
    if policy in ("freeze", "random"):
        chosen = LAYERS[:4] if policy == "freeze" else draw.sample(LAYERS, 4)
        trained = {name: float(name in chosen) for name in LAYERS}
    elif policy == "scale":
        trained = {name: 0.5 + index / len(LAYERS) for index, name in enumerate(LAYERS)}
    share = sum(scale > 0 for scale in trained.values()) / len(LAYERS)
    keep = 51200 if cell.method.mix is not None else 0
    trace = 8000 if cell.method.localize.traced else 0
    return {
        "kind": "run",
        "key": cell.key,
        "cell": cell.name,
        "method": cell.method.name,
        "title": cell.method.title,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "draw": cell.draw,
        "scores": by_weight,
        "validation": validation,
        "alpha": alpha,
        "tokens": {
            "new": 102400 - keep - trace,
            "keep": keep,
            "trace": trace,
            "generate": 0,
            "total": 102400,
            "budget": 102400,
        },
        "num_steps": 100,
        "seconds": {
            "train": 8 + 2 * share,
            "trace": 1.5 if trace else 0.0,
            "generate": 0.0,
            "score": 2.0,
            "total": 15.0,
        },
        "memory": {
            "optimizer_bytes": round(6.8e6 * share),
            "extra_bytes": 0,
            "peak_bytes": None,
        },
        "losses": [[step, learn + 3 * math.exp(-step / 20)] for step in range(4, 101, 4)],
        "plan": trained,
        "share_of_parameters": share,
        "machine": {"processor": "an imagined one", "threads used": "1"},
        "finished": "2025-11-25T22:14:00+00:00",
    }


def base_record(comparison: CompareConfig, seed: int) -> dict:
    """What `prepare` would have made of a seed."""
    of_seed = random.Random(seed).gauss(0, 0.15)
    draw = random.Random(seed + 100)
    relative = {
        kind: {
            name: 30 * (1.6 - 0.08 * index + 0.1 * draw.random() + 0.3 * (index % 2 == odd))
            for index, name in enumerate(LAYERS)
        }
        for odd, kind in enumerate(("updated", "new"))
    }
    matched = {kind: {n: r / 10 for n, r in of.items()} for kind, of in relative.items()}
    return {
        "kind": "base",
        "seed": seed,
        "key": base_key(comparison, seed),
        "scores": {"1": scores(BASE_LEARN + of_seed, BASE_FORGET, BASE_TEXT)},
        "relative": {"all": relative, "matched-spans": matched},
        "about": {},
        "machine": {"processor": "an imagined one", "threads used": "1"},
    }


def records(comparison: CompareConfig, methods=METHODS, **options) -> list[dict]:
    """All records of a finished comparison, bases first."""
    seeds = sorted({cell.seed for cell in cells(comparison)})
    return [base_record(comparison, seed) for seed in seeds] + [
        run_record(cell, comparison, methods, **options) for cell in cells(comparison)
    ]


def write_run(folder, comparison: CompareConfig, lines) -> None:
    """Leave the files of a comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(comparison, folder)
    for line in lines:
        append_record(folder / RESULTS_FILE, line)


def analysed(methods=METHODS, *, change=None, baseline="vanilla", **options):
    """An analysis of a finished comparison; `change` gets its records first."""
    settings = config(methods, **options)
    lines = records(settings, methods)
    if change is not None:
        lines = change(lines) or lines
    return analyse(results_from(settings, lines, name="made"), baseline=baseline)


def runs_of(lines, method, **where):
    """The records of a method's runs whose fields have these values."""
    return [
        record
        for record in lines
        if record.get("method") == method and all(record[k] == v for k, v in where.items())
    ]


def of(analysis, name, weight=1.0):
    """The analysis's row of a method."""
    return next(r for r in analysis.rows if r.method.name == name and r.weight == weight)
