"""How fast are per-layer gradient norms, against torch's and against reading the memory once?

Bytes that must move: every gradient once, nothing written. The read bandwidth is measured in the
same run by summing the same number of bytes with the fastest reader at hand (a large `torch.sum`
and a `memcpy`-like pass are both given).

    python bench/norms.py --json bench/results/norms-cpu.json
"""

from __future__ import annotations

import argparse

import torch
from gpt2_shapes import Shapes
from timing import interleave, report

from gradloc import LayerMap, ops


def run(dtype: torch.dtype, seconds: float) -> list[dict[str, object]]:
    model = Shapes(dtype)
    layers = LayerMap.from_model(model, patterns=model.patterns())
    parameters = layers.parameters(model)
    grads = [parameter.grad for _, parameter, _ in parameters]
    assert all(grad is not None for grad in grads)
    native = ops.NativeNorms(
        [g.numel() for g in grads], [layer for *_, layer in parameters], len(layers)
    )
    num_bytes = sum(g.numel() * g.element_size() for g in grads)
    # One contiguous buffer of the same bytes: the best case for a reader. Never zeros: pages would
    # be shared.
    source = torch.randn(num_bytes // 4)
    target = torch.empty_like(source)

    def clip_total() -> None:
        torch.nn.utils.get_total_norm(grads)

    times = interleave(
        {
            "gradloc, norm of each of the layers": lambda: native.norm_sq(grads).sqrt(),
            "torch._foreach_norm, norm of each tensor": lambda: torch._foreach_norm(grads),
            "torch.nn.utils.get_total_norm": clip_total,
            "read: torch.sum of one buffer": lambda: source.sum(),
            "copy: read and write of one buffer": lambda: target.copy_(source),
        },
        seconds=seconds,
    )
    best_read = max(
        num_bytes / times["read: torch.sum of one buffer"].median,
        2 * num_bytes / times["copy: read and write of one buffer"].median,
    )
    ours = times["gradloc, norm of each of the layers"].median
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "version": name,
            "ms": t.median * 1e3,
            "quartiles": f"{t.quartiles[0] * 1e3:.2f}-{t.quartiles[1] * 1e3:.2f}",
            "GB/s": (2 if name.startswith("copy") else 1) * num_bytes / t.median / 1e9,
            "of best bandwidth": (2 if name.startswith("copy") else 1)
            * num_bytes
            / t.median
            / best_read,
            "gradloc is x as fast": t.median / ours,
            "rounds": t.num_rounds,
        }
        for name, t in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each dtype")
    options = parser.parse_args()
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in run(dtype, options.seconds)]
    columns = [
        "dtype",
        "version",
        "ms",
        "quartiles",
        "GB/s",
        "of best bandwidth",
        "gradloc is x as fast",
    ]
    report(rows, columns, options.json, "layer norms, GPT-2 small")


if __name__ == "__main__":
    main()
