"""Makes the base model: a small GPT-2 that knows the facts from before the date.

Trains on the old corpus through `gradloc.training.train`, and checks that it knows them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gradloc.demo.progress import StepCallback
from gradloc.demo.settings import WorldSettings
from gradloc.evaluate import evaluate_probes
from gradloc.files import replacing_folder
from gradloc.policies import AllLayers
from gradloc.probes import TemporalWorld
from gradloc.training.config import TrainConfig
from gradloc.training.corpus import packed_corpus
from gradloc.training.train import train

SCORE_BATCH = 64


def make_base(
    world: TemporalWorld,
    tokenizer: Any,
    settings: WorldSettings,
    output: Path,
    *,
    note: Callable[[str], None],
    advance: Callable[[], None],
    device: str = "cpu",
) -> tuple[torch.nn.Module, float, int]:
    """Pretrain on `output / "world/old.txt"`, check, and save to `output / "base"`.

    Args:
        world: whose facts the model is to know.
        tokenizer: the world's.
        settings: sizes.
        output: a folder with the corpus.
        note: takes a sentence for the user.
        advance: called after each step.
        device: as in `TrainConfig`.

    Returns:
        The model, the share of the old facts' probes that it completes, and the steps that it took.

    Raises:
        ValueError: it knows fewer of the old facts than `settings.required`; nothing is saved then.
    """
    model = make_model(len(tokenizer), settings, world.seed)
    old_probes = world.old_probes()
    accuracy = 0.0

    def knows_enough(trained: torch.nn.Module, step: int) -> bool:
        nonlocal accuracy
        score = evaluate_probes(
            trained, tokenizer, old_probes, batch_size=SCORE_BATCH, max_length=settings.block_size
        )["old"]
        accuracy = score.exact_match
        note(f"step {step}: completes {accuracy:.0%} of the old facts")
        return accuracy >= settings.enough

    corpus = packed_corpus(output / "world/old.txt", tokenizer, block_size=settings.block_size)
    with tempfile.TemporaryDirectory(prefix=".runs-", dir=output) as folder:
        steps = StepCallback(advance, knows_enough, settings.check_every)
        config = TrainConfig(
            output=Path(folder) / "base",
            max_steps=settings.base_steps,
            learning_rate=settings.base_learning_rate,
            betas=(0.9, 0.99),
            lr_scheduler="cosine",
            warmup_steps=settings.base_steps // 20,
            batch_size=settings.batch_size,
            seed=world.seed,
            save_steps=settings.base_steps,
            device=device,
            progress=False,
        )
        train(model, None, corpus, config, policy=AllLayers(), callbacks=[steps])
    if steps.num_steps % settings.check_every:
        knows_enough(model, steps.num_steps)
    if accuracy < settings.required:
        raise ValueError(
            f"seed={world.seed}: after {steps.num_steps} steps the base model completes only "
            f"{accuracy:.0%} of the old facts (needed: {settings.required:.0%}), so there "
            "is nothing to forget and the comparison would mean nothing: try another seed"
        )
    model.eval()
    with replacing_folder(output / "base") as target:
        model.save_pretrained(target)  # type: ignore[operator]  # a transformers model
        tokenizer.save_pretrained(target)
    return model, accuracy, steps.num_steps


def make_model(vocabulary: int, settings: WorldSettings, seed: int) -> torch.nn.Module:
    """A GPT-2 with random weights and no dropout; the global random state is left alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=settings.block_size,
        n_embd=settings.width,
        n_layer=settings.num_blocks,
        n_head=settings.num_heads,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        # The methods are compared on the same data in the same order: nothing else should differ.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: torch.nn.Module = GPT2LMHeadModel(config)
    # transformers derives it from the class's name, does not know this one's, and warns.
    model.loss_type = "ForCausalLM"  # type: ignore[assignment]
    return model
