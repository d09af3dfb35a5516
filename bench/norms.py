"""How fast are per-layer gradient norms, against torch's and against reading the memory once?

Bytes that must move: every gradient once, nothing written. The bandwidth to compare with is
measured in the same run over one buffer of the same bytes: a read (`torch.sum`) and a copy.

    python bench/norms.py --json bench/results/norms-cpu.json
"""

from __future__ import annotations

from typing import Any

import torch
from model_shapes import SHARES, Shapes, plan_of_share
from timing import command_line, interleave, report

from gradloc import layer_grad_norms, ops


def run(dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    """Rows for one dtype: all shares interleaved in one run."""
    model = Shapes(dtype=dtype)
    layers = model.layer_map()
    found = layers.parameters(model)
    width = torch.empty((), dtype=dtype).element_size()
    # Never zeros: untouched pages would all be the same one.
    source = torch.randn(sum(p.numel() for _, p, _ in found) * width // 4)
    target = torch.empty_like(source)
    versions: dict[str, Any] = {}
    num_bytes: dict[str, int] = {}
    for share in SHARES:
        plan, _ = plan_of_share(layers, share)
        active = set(plan.active)
        ours = [(p.grad, layer) for _, p, layer in found if layers.names[layer] in active]
        grads = [grad for grad, _ in ours]
        work = ops.NativeNorms(
            [g.numel() for g in grads], [layer for _, layer in ours], len(layers)
        )
        size = sum(g.numel() * g.element_size() for g in grads)
        here = {
            "gradloc, each layer": lambda work=work, grads=grads: work.norm_sq(grads).sqrt(),
            "torch._foreach_norm, each tensor": lambda grads=grads: torch._foreach_norm(grads),
            "torch total norm, as clip_grad_norm_": lambda grads=grads: (
                torch.nn.utils.get_total_norm(grads)
            ),
        }
        if share == 1.0:
            here["gradloc.layer_grad_norms(model, layers)"] = lambda: layer_grad_norms(
                model, layers
            )
            here["read: torch.sum of one buffer"] = source.sum
            here["copy: read and write of one buffer"] = lambda: target.copy_(source)
        for name, version in here.items():
            versions[f"{name} @ {share:.0%}"] = version
            num_bytes[f"{name} @ {share:.0%}"] = size * (2 if name.startswith("copy") else 1)
    times = interleave(versions, seconds=seconds)
    read = "read: torch.sum of one buffer @ 100%"
    rows = []
    for name, t in times.items():
        version, share = name.rsplit(" @ ", 1)
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "version": version,
                "layers' bytes": share,
                "ms": t.median * 1e3,
                "quartiles": f"{t.quartiles[0] * 1e3:.2f}-{t.quartiles[1] * 1e3:.2f}",
                "GB/s": num_bytes[name] / t.median / 1e9,
                "of read bandwidth": num_bytes[name] / num_bytes[read] / t.over(times[read]),
                "gradloc is x as fast": t.over(times[f"gradloc, each layer @ {share}"]),
                "rounds": t.num_rounds,
            }
        )
    return rows


def bounds(rows: list[dict[str, Any]]) -> list[str]:
    """What was promised, and whether this run kept it."""
    lines = []
    for dtype in ("float32", "bfloat16"):
        mine = {
            row["version"]: row
            for row in rows
            if row["dtype"] == dtype and row["layers' bytes"] == "100%"
        }
        ratio = mine["torch._foreach_norm, each tensor"]["gradloc is x as fast"]
        read = mine["gradloc, each layer"]["of read bandwidth"]
        kept = ratio >= 1.7 or read >= 0.9
        lines.append(
            f"{dtype}: {ratio:.2f}x as fast as _foreach_norm (1.7 asked) or {read:.0%} of the read "
            f"bandwidth (90 % asked): {'kept' if kept else 'NOT KEPT'}"
        )
    return lines


def main() -> None:
    options = command_line(__doc__, seconds=12.0)
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in run(dtype, options.seconds)]
    report(rows, options.json, "layer norms, GPT-2 small", bounds(rows))


if __name__ == "__main__":
    main()
