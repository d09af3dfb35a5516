"""Runs and bases that train nothing, for tests of the grid; also the grid in a process of its own.

    python compare_fakes.py FOLDER PROCESSES SECONDS

runs `make_config()` with these, each run taking about SECONDS. What a run does can be chosen by the
name of its method: "raises" raises, "dies" is killed, "fills" can write no more, as on a full disk.
Each start and end is a line of FOLDER/made.txt, with the process's id.
"""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

from gradloc.compare.config import CompareConfig, WorldConfig
from gradloc.compare.grid import base_key
from gradloc.compare.method_config import Localize, MethodConfig

RUNNER = ("compare_fakes:run_cell", "compare_fakes:prepare")
STEPS = 5


def make_config(methods=("vanilla", "tgl-fp", "random"), *, seconds=0.0, **changes):
    """A grid of 2 rates and 2 seeds: 16 cells with the three methods, random twice a seed."""
    rates, seeds = (1e-3, 3e-3), (0, 1)
    methods = tuple(
        MethodConfig(
            name=name,
            title=name.title(),
            localize=Localize(policy="random" if name == "random" else "none"),
            draws=2 if name == "random" else 1,
            learning_rates=changes.get("learning_rates", rates),
            seeds=changes.get("seeds", seeds),
        )
        for name in methods
    )
    return CompareConfig(
        **{
            "world": WorldConfig("toy", {"seconds": seconds}),
            "budget_tokens": 4096,
            "learning_rates": rates,
            "seeds": seeds,
            "methods": methods,
            **changes,
        }
    )


def _tell(folder, what):
    with open(folder / "made.txt", "a") as file:
        file.write(f"{what} {os.getpid()}\n")


def made(folder):
    """What FOLDER/made.txt says: a list of (begun or ended or based, key or seed, process)."""
    lines = (folder / "made.txt").read_text().splitlines()
    return [(what, key, int(pid)) for what, key, pid in (line.split() for line in lines)]


def _scores(draw):
    probes = {kind: {"nll": draw.random()} for kind in ("updated", "new", "unchanged")}
    return {"1": {"probes": probes, "text": {"old": {"nll": draw.random()}}}}


def run_cell(cell, config, folder, *, places, on_step, note):
    _tell(folder, f"begun {cell.key}")
    note("training")
    if cell.method.name == "raises":
        raise ValueError("no luck\nand a second line")
    if cell.method.name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.method.name == "fills":
        size = (folder / "results.jsonl").stat().st_size + 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    for step in tqdm(range(STEPS)):  # as libraries do
        time.sleep(config.world.options.get("seconds", 0) / STEPS)
        on_step(step + 1, STEPS)
    _tell(folder, f"ended {cell.key}")
    return {
        "kind": "run",
        "key": cell.key,
        "cell": cell.name,
        "method": cell.method.name,
        "scores": _scores(random.Random(cell.key)),
        "seconds": {"total": 2.0},
        "places": dict(places),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "nan": float("nan"),
    }


def prepare(config, seed, folder, *, places, on_step, note):
    note("asking what is known")
    key = base_key(config, seed)
    _tell(folder, f"based {seed}")
    if seed in config.world.options.get("bad_seeds", ()):
        raise ValueError("the base knows nothing")
    return {"kind": "base", "key": key, "seed": seed, "scores": _scores(random.Random(key))}


if __name__ == "__main__":
    from gradloc.compare.schedule import run_grid

    run_grid(
        make_config(seconds=float(sys.argv[3])),
        Path(sys.argv[1]),
        places={},
        processes=int(sys.argv[2]),
        runner=RUNNER,
    )
