"""How fast is clip + step, against torch, and what does it cost when only some layers train?

Bytes that must move for an active element: the gradient once for the clip norm; then gradient,
parameter and two moments read, parameter and moments written. float32: 4 + 4 + 3·8 = 32 bytes. A
frozen element: 0.

    python bench/adamw.py --json bench/results/adamw-cpu.json
"""

from __future__ import annotations

import argparse

import torch
from gpt2_shapes import Shapes
from timing import interleave, report

from gradloc import LayerMap, LayerPlan, LocalizedAdamW

SHARES = (1.0, 0.5, 0.25, 0.1)
OPTIONS = {"lr": 1e-5, "weight_decay": 0.01}
MAX_NORM = 1.0


def plan_of_share(layers: LayerMap, share: float) -> tuple[LayerPlan, float]:
    """Whole layers, largest first, until about `share` of the elements train; the true share."""
    sizes = {layer.name: layer.num_elements for layer in layers}
    total = sum(sizes.values())
    active: set[str] = set()
    left = share * total
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size <= left * 1.02:
            active.add(name)
            left -= size
    plan = LayerPlan({name: float(name in active) for name in sizes}, policy=f"share {share}")
    return plan, sum(sizes[name] for name in active) / total


def run(dtype: torch.dtype, seconds: float) -> list[dict[str, object]]:
    models = {name: Shapes(dtype) for name in ("gradloc", "fused", "foreach", "step")}
    layers = LayerMap.from_model(models["gradloc"], patterns=models["gradloc"].patterns())
    plans = {share: plan_of_share(layers, share) for share in SHARES}
    named = list(models["gradloc"].named_parameters())
    ours = {
        share: LocalizedAdamW(named, **OPTIONS, layers=layers, plan=plan, max_grad_norm=MAX_NORM)
        for share, (plan, _) in plans.items()
    }
    ours_step = LocalizedAdamW(models["step"].parameters(), **OPTIONS)
    fused = torch.optim.AdamW(models["fused"].parameters(), **OPTIONS, fused=True)
    foreach = torch.optim.AdamW(models["foreach"].parameters(), **OPTIONS, foreach=True)

    def clip_and_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    versions = {f"gradloc clip + step, {share:.0%}": opt.step for share, opt in ours.items()}
    versions["torch clip_grad_norm_ + fused"] = lambda: clip_and_step(models["fused"], fused)
    versions["torch clip_grad_norm_ + foreach"] = lambda: clip_and_step(models["foreach"], foreach)
    versions["gradloc step, no clip"] = ours_step.step
    versions["torch fused step, no clip"] = fused.step
    num_elements = sum(p.numel() for _, p in named)
    width = torch.empty((), dtype=dtype).element_size()
    step_bytes = num_elements * (
        width + 2 * width + 4 * 4
    )  # gradient; parameter and moments, both ways
    clip_bytes = num_elements * width
    source = torch.randn(step_bytes // 8)
    target = torch.empty_like(source)
    versions["copy of the step's bytes"] = lambda: target.copy_(source)
    times = interleave(versions, seconds=seconds, min_rounds=11)

    copy = times["copy of the step's bytes"].median / step_bytes
    full = times["gradloc clip + step, 100%"].median
    rows = []
    for name, t in times.items():
        share = next((plans[s][1] for s in SHARES if name.endswith(f", {s:.0%}")), 1.0)
        num_bytes = share * (
            step_bytes + (clip_bytes if "clip +" in name or "clip_grad" in name else 0)
        )
        if "clip_grad" in name:
            num_bytes += 2 * clip_bytes  # torch writes the clipped gradients back
        if name.startswith("copy"):
            num_bytes = step_bytes
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "version": name,
                "active": round(share, 4),
                "ms": t.median * 1e3,
                "quartiles": f"{t.quartiles[0] * 1e3:.1f}-{t.quartiles[1] * 1e3:.1f}",
                "bytes (MB)": round(num_bytes / 1e6),
                "of copy bandwidth": num_bytes * copy / t.median,
                "of full time": t.median / full if name.startswith("gradloc clip") else None,
                "gradloc clip + step is x as fast": t.median / full,
                "rounds": t.num_rounds,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=30.0, help="time for each dtype")
    options = parser.parse_args()
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in run(dtype, options.seconds)]
    columns = [
        "dtype",
        "version",
        "active",
        "ms",
        "quartiles",
        "bytes (MB)",
        "of copy bandwidth",
        "of full time",
        "gradloc clip + step is x as fast",
    ]
    report(rows, columns, options.json, "AdamW, GPT-2 small")


if __name__ == "__main__":
    main()
