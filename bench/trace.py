"""What does tracing cost over the forward and backward passes of the same batches?

python bench/trace.py --json bench/results/trace-cpu.json
"""

from __future__ import annotations

from typing import Any

import torch
from timing import command_line, interleave, report
from transformers import GPT2Config, GPT2LMHeadModel

from gradloc import LayerMap, trace_gradients


def main() -> None:
    options = command_line(__doc__, seconds=60.0)
    torch.manual_seed(0)
    # 12 blocks, so as many tensors as GPT-2 small, and narrow enough to repeat often.
    config = GPT2Config(
        vocab_size=4096,
        n_positions=128,
        n_embd=384,
        n_layer=12,
        n_head=6,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    layers = LayerMap.from_model(model)
    batches: list[dict[str, torch.Tensor]] = []
    for _ in range(6):
        ids = torch.randint(0, config.vocab_size, (8, 64))
        batches.append({"input_ids": ids, "labels": ids})
    probes, reference = batches[:3], batches[3:]

    def passes() -> None:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    def trace() -> Any:
        return trace_gradients(model, probes, reference, layers=layers, progress=False)

    times = interleave(
        {"forward and backward alone": passes, "trace_gradients": trace}, seconds=options.seconds
    )
    bare = times["forward and backward alone"]
    rows = [
        {
            "version": name,
            "ms a batch": t.median * 1e3 / len(batches),
            "quartiles": f"{t.quartiles[0] * 1e3 / 6:.1f}-{t.quartiles[1] * 1e3 / 6:.1f}",
            "of the bare passes": t.over(bare),
            "rounds": t.num_rounds,
        }
        for name, t in times.items()
    ]
    size = sum(layer.num_elements for layer in layers)
    report(rows, options.json, f"tracing {len(layers)} layers, {size:,} parameters")


if __name__ == "__main__":
    main()
