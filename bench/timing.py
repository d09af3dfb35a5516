"""Timing for every benchmark here: versions interleaved, medians with spread, machine named.

Machines are noisy, so versions that are to be compared run in turns within one process, and what is
reported is each version's median with its quartiles. Nothing here knows what is being timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import gradloc
from gradloc import ops


@dataclass(frozen=True)
class Timing:
    """Seconds of one version over the rounds."""

    name: str
    median: float
    quartiles: tuple[float, float]
    samples: tuple[float, ...]  # by round

    @property
    def num_rounds(self) -> int:
        """How often it ran."""
        return len(self.samples)

    def over(self, other: Timing) -> float:
        """How many times as long as `other`: the median of the ratios within each round.

        A shared machine changes speed for seconds at a time, for all versions of a round alike;
        the ratio of two medians would mix the speeds.
        """
        pairs = zip(self.samples, other.samples, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def wall_clock(name: str, run: Callable[[], Any]) -> float:
    """Seconds that `run` takes: right where it has finished when it returns, as on a CPU."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def interleave(
    versions: dict[str, Callable[[], Any]],
    *,
    min_rounds: int = 15,
    seconds: float = 10.0,
    clock: Callable[[str, Callable[[], Any]], float] = wall_clock,
) -> dict[str, Timing]:
    """Time the versions in turns until each ran `min_rounds` times and `seconds` have passed.

    Args:
        versions: by name, what to run.
        min_rounds: at least so many rounds, whatever the time.
        seconds: and at least so long.
        clock: runs a version, given by name too, and says how many seconds that took.
    """
    samples: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(2):
        for run in versions.values():
            run()
    draw = random.Random(0)
    names = list(versions)
    start = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or time.perf_counter() - start < seconds:
        # Another order each round: what one version leaves in the caches should not always help
        # the same other one.
        draw.shuffle(names)
        for name in names:
            samples[name].append(clock(name, versions[name]))
        rounds += 1
    out = {}
    for name, values in samples.items():
        low, _, high = statistics.quantiles(values, n=4)
        out[name] = Timing(name, statistics.median(values), (low, high), tuple(values))
    return out


def machine() -> dict[str, Any]:
    """What ran: processor, instruction set, threads, versions, commit."""
    model = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        ).stdout.strip()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": ops.build_info()["simd"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradloc": gradloc.__version__,
        "commit": commit or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
    }


def command_line(about: str | None, *, seconds: float) -> argparse.Namespace:
    """What every benchmark takes: where its JSON goes, and for how long each dtype is timed."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=seconds, help="time for each dtype")
    return parser.parse_args()


def report(
    rows: list[dict[str, Any]],
    path: str | None,
    name: str,
    bounds: list[str] | None = None,
) -> None:
    """Print the rows as a table, then the bounds; write both with the machine as JSON."""
    about = machine()
    parts = (about["processor"], f"{about['threads']} threads", about["simd"])
    print(f"{name}: {', '.join(parts)}, torch {about['torch']}")
    columns = list(rows[0])
    widths = [max(len(c), *(len(_cell(row.get(c))) for row in rows)) for c in columns]
    print("  ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True)))
    for row in rows:
        print("  ".join(_cell(row.get(c)).ljust(w) for c, w in zip(columns, widths, strict=True)))
    for line in bounds or ():
        print(line)
    if path:
        body = {"benchmark": name, "machine": about, "bounds": bounds or [], "rows": rows}
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(body, indent=1) + "\n")
        print(f"written to {target}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
