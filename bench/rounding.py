"""What does training wholly in bfloat16 lose, and what does stochastic rounding give back?

A small GPT-2 learns the text of the temporal world three times on the same batches: in float32, in
bfloat16 rounded to nearest, and in bfloat16 rounded stochastically (parameters and moments in
bfloat16 both times), at a high and at a low learning rate. Not about speed; see adamw.py.

Predicted: an update is lost to nearest where it is below 2^-9 of the parameter. AdamW moves a
weight by about the learning rate, and weights are some 0.02, so that at 1e-5 nearly all is lost.

    python bench/rounding.py --json bench/results/rounding-cpu.json
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from timing import command_line, report
from transformers import GPT2Config, GPT2LMHeadModel

from gradloc import LocalizedAdamW
from gradloc.probes import TemporalWorld
from gradloc.training.corpus import text_batches

RATES = (1e-3, 1e-4, 1e-5)
SEEDS = (0, 1, 2)
STEPS = 300
VERSIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16, to nearest": (torch.bfloat16, {"state_dtype": torch.bfloat16}),
    "bfloat16, stochastic": (
        torch.bfloat16,
        {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
    ),
}


def train(
    batches: list[Any], held_out: list[Any], dtype: torch.dtype, seed: int, **options: Any
) -> tuple[float, float]:
    """Loss on held-out text before and after, in nats a token, computed in float32."""
    torch.manual_seed(seed)
    vocabulary = 1 + max(int(batch["input_ids"].max()) for batch in [*batches, *held_out])
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).to(dtype).eval()  # no dropout: the runs differ in rounding only
    optimizer = LocalizedAdamW(model.parameters(), weight_decay=0.0, seed=seed, **options)
    order = torch.Generator().manual_seed(seed)

    def loss() -> float:
        with torch.no_grad():
            judge = GPT2LMHeadModel(config).eval()
            judge.load_state_dict(model.state_dict())
            return statistics.fmean(float(judge(**batch).loss) for batch in held_out)

    before = loss()
    for _ in range(STEPS):
        batch = batches[int(torch.randint(len(batches), (), generator=order))]
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, loss()


def main() -> None:
    options = command_line(__doc__, seconds=0.0)
    with tempfile.TemporaryDirectory() as folder:
        world = TemporalWorld(seed=0)
        world.write(folder)
        tokenizer = world.tokenizer()
        text = text_batches(
            Path(folder) / "old.txt", tokenizer, block_size=64, batch_size=8, max_batches=316
        )
    held_out, batches = text[:16], text[16:]
    rows = []
    for rate in RATES:
        for version, (dtype, own) in VERSIONS.items():
            ends = [train(batches, held_out, dtype, seed, lr=rate, **own) for seed in SEEDS]
            gains = [before - after for before, after in ends]
            rows.append(
                {
                    "learning rate": rate,
                    "version": version,
                    "loss before": statistics.fmean(before for before, _ in ends),
                    "loss after": statistics.fmean(after for _, after in ends),
                    "gained": statistics.fmean(gains),
                    "sd over seeds": statistics.stdev(gains),
                    "steps": STEPS,
                }
            )
    report(rows, options.json, "Rounding, a GPT-2 of 0.1 M parameters", [])


if __name__ == "__main__":
    main()
