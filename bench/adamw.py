"""How fast is clip + step, against torch, and what does it cost when only some layers train?

Bytes that must move for an active element: the gradient once for the clip norm; then gradient,
parameter and two moments read, parameter and moments written. float32: 4 + 4 + 3·8 = 32 bytes. A
frozen element: 0. torch writes the clipped gradients back, 8 bytes more; its moments have the
parameters' dtype, so that in bfloat16 it moves 8 bytes an element less than we do, with less
precision. torch at a share gets only the active parameters. In bfloat16 there are also steps with
stochastic rounding, with bfloat16 moments, and with both.

    python bench/adamw.py --json bench/results/adamw-cpu.json
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from model_shapes import SHARES, Shapes, plan_of_share
from timing import command_line, interleave, report

from gradloc import LocalizedAdamW

OPTIONS: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}
MAX_NORM = 1.0


def bytes_an_element(width: int, moment: int, *, ours: bool, clip: bool) -> int:
    """Bytes moved for an active element; width of parameter and gradient, and of a moment."""
    step = width + 2 * (width + 2 * moment)
    if not clip:
        return step
    return step + width * (1 if ours else 3)


def run(dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    """Rows for one dtype: all shares and versions interleaved in one run."""
    ours, theirs = Shapes(dtype=dtype), Shapes(dtype=dtype)
    layers = ours.layer_map()
    width = torch.empty((), dtype=dtype).element_size()
    versions: dict[str, Any] = {}
    about: dict[str, tuple[float, int]] = {}  # true share of the elements, bytes

    def add(name: str, share: float, moved: int, version: Any) -> None:
        versions[name] = version
        about[name] = (share, moved)

    named = list(ours.named_parameters())
    state: Any = defaultdict(dict)
    their_states: dict[str, Any] = {"fused": defaultdict(dict), "foreach": defaultdict(dict)}
    total = sum(p.numel() for _, p in named)
    for share in SHARES:
        plan, true = plan_of_share(layers, share)
        at = f"@ {share:.0%}"
        active = set(plan.active)
        count = round(true * total)
        localized = LocalizedAdamW(
            named, **OPTIONS, layers=layers, plan=plan, max_grad_norm=MAX_NORM
        )
        localized.state = state  # one set of moments: the shares differ in nothing but the plan
        moved = count * bytes_an_element(width, 4, ours=True, clip=True)
        add(f"gradloc clip + step {at}", true, moved, localized.step)
        params = [p for _, p, layer in layers.parameters(theirs) if layers.names[layer] in active]
        for kind in ("fused", "foreach"):
            optimizer = torch.optim.AdamW(params, **OPTIONS, **{kind: True})
            optimizer.state = their_states[kind]

            def clip_and_step(optimizer: Any = optimizer, params: Any = params) -> None:
                torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
                optimizer.step()

            moved = count * bytes_an_element(width, width, ours=False, clip=True)
            add(f"torch clip_grad_norm_ + {kind} {at}", true, moved, clip_and_step)
            if share == 1.0 and kind == "fused":
                moved = count * bytes_an_element(width, width, ours=False, clip=False)
                add(f"torch fused step, no clip {at}", true, moved, optimizer.step)
    moved = total * bytes_an_element(width, 4, ours=True, clip=False)
    unclipped = LocalizedAdamW(named, **OPTIONS)
    unclipped.state = state
    add("gradloc step, no clip @ 100%", 1.0, moved, unclipped.step)
    if dtype == torch.bfloat16:
        half: dict[str, Any] = {"state_dtype": torch.bfloat16}
        for what, options in {
            "stochastic rounding": {"stochastic_rounding": True},
            "bfloat16 moments": half,
            "both": {**half, "stochastic_rounding": True},
        }.items():
            optimizer = LocalizedAdamW(named, **OPTIONS, **options)
            if "state_dtype" not in options:
                optimizer.state = state
            moment = 2 if "state_dtype" in options else 4
            count = total * bytes_an_element(width, moment, ours=True, clip=False)
            add(f"gradloc step, no clip, {what} @ 100%", 1.0, count, optimizer.step)
    source = torch.randn(moved // 8)
    target = torch.empty_like(source)
    add("copy of gradloc's step bytes @ 100%", 1.0, moved, lambda: target.copy_(source))
    times = interleave(versions, seconds=seconds, min_rounds=11)

    copy = "copy of gradloc's step bytes @ 100%"
    rows = []
    for name, t in times.items():
        version, share = name.rsplit(" @ ", 1)
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "version": version,
                "active": round(about[name][0], 4),
                "ms": t.median * 1e3,
                "quartiles": f"{t.quartiles[0] * 1e3:.1f}-{t.quartiles[1] * 1e3:.1f}",
                "MB that must move": round(about[name][1] / 1e6),
                "of copy bandwidth": about[name][1] / about[copy][1] / t.over(times[copy]),
                "of gradloc's full time": t.over(times["gradloc clip + step @ 100%"]),
                "gradloc is x as fast": t.over(times[f"gradloc clip + step @ {share}"]),
                "rounds": t.num_rounds,
            }
        )
    return rows


def bounds(rows: list[dict[str, Any]]) -> list[str]:
    """What was promised, and whether this run kept it."""
    lines = []
    for dtype in ("float32", "bfloat16"):
        mine = [row for row in rows if row["dtype"] == dtype]
        fused = next(r for r in mine if r["version"] == "torch clip_grad_norm_ + fused")
        ratio = fused["gradloc is x as fast"]
        lines.append(
            f"{dtype}: clip + step {ratio:.2f}x as fast as clip_grad_norm_ + fused (1.25 asked): "
            f"{'kept' if ratio >= 1.25 else 'NOT KEPT'}"
        )
        for row in mine:
            if row["version"] == "gradloc clip + step" and row["active"] < 1:
                time, share = row["of gradloc's full time"], row["active"]
                lines.append(
                    f"{dtype}: {share:.1%} of the bytes in {time:.1%} of the time (share + 5 % "
                    f"asked): {'kept' if time <= share + 0.05 else 'NOT KEPT'}"
                )
    return lines


def main() -> None:
    options = command_line(__doc__, seconds=25.0)
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in run(dtype, options.seconds)]
    report(rows, options.json, "AdamW, GPT-2 small", bounds(rows))


if __name__ == "__main__":
    main()
