"""How fast are the CUDA kernels: norms, step, clip + step, and the last of a share of the layers?

Versions run in turns, each after the L2 cache was filled with other data; times are those between
two events on the device, the launches queued beforehand; what is reported is the median of the
rounds with its quartiles, and of ratios the median of the ratios within each round. Host times are
those of the call alone. What is compared stands in cuda_versions.py, what was promised in
cuda_bounds.py. The JSON is written anew after each model, so that what was measured outlives a time
limit.

    python bench/cuda_kernels.py --json results.json --seconds 190
    python bench/cuda_kernels.py --json results.json --rehearse
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from adamw import MAX_NORM, OPTIONS
from cuda_bounds import bounds
from cuda_machine import device_facts
from cuda_timing import DeviceClock, count_launches, host_seconds
from cuda_versions import COPY, OURS, Case, Version, bytes_of_case, free_bytes, short
from model_shapes import Shapes, num_elements, shapes_of
from timing import Timing, interleave, machine

from gradloc import LocalizedAdamW

# In the order of what is wanted most, as time may run out.
CASES = (
    ("gpt2-small", torch.float32),
    ("gpt2-small", torch.bfloat16),
    ("llama-3.2-1b", torch.bfloat16),
    ("llama-3.2-1b", torch.float32),
    ("llama-3.1-8b", torch.bfloat16),
    ("gpt2-xl", torch.bfloat16),
    ("gpt2-xl", torch.float32),
)
REHEARSED = (("tiny", torch.float32), ("tiny", torch.bfloat16))
NO_MEASUREMENT = "rehearsal, no GPU: these are no measurements"
HOW = (
    "events around each run, its launches queued beforehand, L2 filled with other data before "
    "each; medians over rounds that interleave the versions; ratios are medians of the ratios "
    "within a round"
)
HOW_REHEARSED = "the wall clock around each run, on tiny CPU tensors"
PREDICTED = Path(__file__).parent / "results" / "predicted.json"
_MOST_SECONDS = 9.0  # of rounds, for a case; beside it come making it, warming up and profiling


def warm_up(case: Case, clock: DeviceClock) -> dict[str, float]:
    """Run every version until its host time is known, µs by key; drop what does not fit."""
    host_us = {}
    for version in list(case.versions):
        try:
            version.run()
            seconds, _ = host_seconds(version.run, case.device, calls=5)
        except torch.OutOfMemoryError:
            case.versions.remove(version)
            case.left_out.append(f"{case.model} {short(case.dtype)}, {version.key}: out of memory")
            torch.cuda.empty_cache()
            continue
        clock.set_lead(version.key, seconds)
        host_us[version.key] = seconds * 1e6
    return host_us


def matching(versions: list[Version], version: Version, by: str) -> Version | None:
    """The version of another to compare with: the same work on moments of the same dtype."""
    same = [v for v in versions if (v.op, v.share, v.by) == (version.op, version.share, by)]
    exact = [v for v in same if v.moments == version.moments]
    return (exact or same or [None])[0]


def row_of(
    version: Version, case: Case, times: dict[str, Timing], predicted: dict[str, Any]
) -> dict[str, Any]:
    """One line of the table."""
    mine = times[version.key]

    def over(other: Version | None) -> float | None:
        return None if other is None else mine.over(times[other.key])

    ours, copy = (matching(case.versions, version, by) for by in (OURS, COPY))
    full = next(
        (
            v
            for v in case.versions
            if (v.op, v.by, v.moments, v.share) == (version.op, version.by, version.moments, 1.0)
        ),
        None,
    )
    op = version.op if version.share == 1.0 else f"{version.op} @ {version.share:.0%}"
    if version.moments not in ("", short(case.dtype)):
        op += f", {version.moments} moments"
    row = {
        "model": case.model,
        "dtype": short(case.dtype),
        "parameters": num_elements(case.model),
        "tensors": len(shapes_of(case.model)),
        "op": version.op,
        "by": version.by,
        "moments": version.moments,
        "share": version.share,
        "active": version.active,
        "ms": mine.median * 1e3,
        "quartiles_ms": [value * 1e3 for value in mine.quartiles],
        "moved_bytes": version.moved_bytes,
        "gb_per_s": version.moved_bytes / mine.median / 1e9,
        "of_copy": None
        if copy is None
        else version.moved_bytes / copy.moved_bytes / mine.over(times[copy.key]),
        "gradloc_is_x_as_fast": over(ours),
        "of_full": over(full),
        "rounds": mine.num_rounds,
    }
    if version.by == OURS and op in predicted:
        row["predicted_ms"] = predicted[op]
    return row


def run_case(
    model: str, dtype: torch.dtype, device: torch.device, *, seconds: float, min_rounds: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a model in a dtype, and what was left out."""
    case = Case(model, dtype, device)
    clock = DeviceClock(device)
    host_us = warm_up(case, clock)
    runs = {version.key: version.run for version in case.versions}
    times = interleave(runs, min_rounds=min_rounds, seconds=seconds, clock=clock)
    predicted = predictions(device).get(model, {}).get(short(dtype), {})
    rows = []
    for version in case.versions:
        row = row_of(version, case, times, predicted)
        row["host_us"] = host_us[version.key]
        # Once, outside the timing; the number does not depend on which layers train.
        if version.share == 1.0:
            launches = count_launches(version.run, device)
            row["launches"] = None if launches is None else launches.kernels
            row["copies"] = None if launches is None else launches.copies
        rows.append(row)
    return rows, case.left_out


def host_rows(device: torch.device, calls: int) -> list[dict[str, Any]]:
    """Host time of a step of 300 small tensors whose gradients are others at each step."""
    model = Shapes("300-tensors", device=device)
    layers = model.layer_map()
    params = list(model.parameters())
    sets = [[p.grad for p in params], model.other_gradients()]

    def exchange() -> None:
        sets.reverse()
        for param, grad in zip(params, sets[0], strict=True):
            param.grad = grad

    ours: dict[str, Any] = {**OPTIONS, "fused": True, "layers": layers}
    plain = LocalizedAdamW(list(model.named_parameters()), **ours)
    clipping = LocalizedAdamW(list(model.named_parameters()), **ours, max_grad_norm=MAX_NORM)
    versions: dict[tuple[str, str], Any] = {
        ("step", OURS): plain.step,
        ("clip+step", OURS): clipping.step,
    }
    for kind in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(params, **OPTIONS, **{kind: True})
        optimizer.state = defaultdict(dict)

        def clip_and_step(optimizer: Any = optimizer) -> None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
            optimizer.step()

        versions["step", f"torch {kind}"] = optimizer.step
        versions["clip+step", f"clip_grad_norm_ + torch {kind}"] = clip_and_step
    rows = []
    for (op, by), run in versions.items():
        host_seconds(run, device, calls=3, before=exchange)  # makes state, loads kernels
        median, quartiles = host_seconds(run, device, calls=calls, before=exchange)
        rows.append(
            {
                "op": op,
                "by": by,
                "tensors": len(params),
                "host_us": median * 1e6,
                "quartiles_us": [value * 1e6 for value in quartiles],
                "calls": calls,
            }
        )
    return rows


def chip(name: str) -> str:
    """What tells a card: "h100" of "H100-SXM" in devices.py and of the driver's longer name."""
    words = name.replace("-", " ").lower().split()
    return next((word for word in words if re.search(r"\d", word)), name)


def predictions(device: torch.device, path: Path = PREDICTED) -> dict[str, Any]:
    """What predict.py expects of this device: by model, dtype and operation, milliseconds."""
    if device.type != "cuda" or not path.exists():
        return {}
    here = chip(torch.cuda.get_device_name(device))
    for name, by_model in json.loads(path.read_text()).items():
        if chip(name) == here:
            return dict(by_model)
    return {}


def save(path: str | None, body: dict[str, Any]) -> None:
    """Write the JSON whole or not at all."""
    if path:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        part.write_text(json.dumps(body, indent=1) + "\n")
        os.replace(part, target)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=190.0, help="time for everything")
    parser.add_argument("--models", nargs="+", help="only these models")
    parser.add_argument("--rehearse", action="store_true", help="the same code on tiny CPU tensors")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device: use --rehearse to run the same code on tiny CPU tensors")
        return 1
    begin = time.perf_counter()
    device = torch.device("cpu" if options.rehearse else "cuda")
    cases = list(REHEARSED if options.rehearse else CASES)
    if options.models:
        cases = [c for c in cases if c[0] in options.models]
    body: dict[str, Any] = {
        "benchmark": "CUDA kernels",
        "rehearsal": NO_MEASUREMENT if options.rehearse else "",
        "machine": machine(),
        "device": device_facts(),
        "timing": HOW_REHEARSED if options.rehearse else HOW,
        "host": host_rows(device, 5 if options.rehearse else 200),
        "rows": [],
        "left_out": [],
        "failed": [],
        "bounds": [],
    }
    for at, (model, dtype) in enumerate(cases):
        name = f"{model} {short(dtype)}"
        left = options.seconds - (time.perf_counter() - begin)
        share = left / (len(cases) - at)
        room, needed = free_bytes(device), bytes_of_case(model, dtype)
        if left < 10.0 and at:
            body["left_out"].append(f"{name}: no time left")
        elif needed > room:
            body["left_out"].append(
                f"{name}: needs {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB free"
            )
        else:
            seconds = min(_MOST_SECONDS, 0.4 * share)
            rounds = 11
            if options.rehearse:
                seconds, rounds = 0.2, 3
            try:
                rows, left_out = run_case(model, dtype, device, seconds=seconds, min_rounds=rounds)
            # One model that fails must not take what the others show with it.
            except (RuntimeError, ValueError) as error:
                body["failed"].append(f"{name}: {type(error).__name__}: {error}")
                print(f"{name} FAILED: {error}", flush=True)
            else:
                body["rows"] += rows
                body["left_out"] += [what for what in left_out if what not in body["left_out"]]
                print_rows(name, rows)
        body["bounds"] = bounds(body["rows"], body["host"], judged=not options.rehearse)
        body["seconds"] = time.perf_counter() - begin
        save(options.json, body)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for row in body["host"]:
        print(f"host, {row['tensors']} tensors, {row['op']}, {row['by']}: {row['host_us']:.1f} µs")
    for line in [*body["bounds"], *body["left_out"], *body["failed"]]:
        print(line)
    if options.rehearse:
        print(NO_MEASUREMENT)
    return 1 if body["failed"] else 0


def print_rows(name: str, rows: list[dict[str, Any]]) -> None:
    """A line for each, for those who watch."""
    for row in rows:
        of_copy = "" if row["of_copy"] is None else f", {row['of_copy']:.0%} of a copy"
        print(
            f"{name}, {row['op']} @ {row['share']:.0%}, {row['by']} {row['moments']}: "
            f"{row['ms']:.3f} ms, {row['gb_per_s']:.0f} GB/s{of_copy}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
