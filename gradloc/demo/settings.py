"""How large the demo is: the full form, and a quick one that only shows that everything runs.

Numbers only; nothing is made or trained here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """Sizes of a temporal world and of the small GPT-2 that learns it (`gradloc.demo.pretrain`).

    Args:
        num_entities: entities with facts before the date.
        num_new_entities: entities that appear at the date.
        num_objects: objects a relation.
        old_tokens: words of the corpus from before the date.
        share_facts: the share of them in sentences about facts. With more of them the facts are
            learned sooner: at 0.6 one world of three was known by 75 % only after 1,000 steps.
        new_tokens: words of the corpus from after it.
        text_documents: passages in each file of ordinary text to measure on.
        width: of the GPT-2's hidden states.
        num_blocks: of the GPT-2.
        num_heads: of its attention.
        block_size: tokens a training sequence.
        batch_size: sequences a training step.
        base_steps: optimizer steps of pretraining, at most.
        base_learning_rate: at the top of its cosine.
        check_every: steps between checks of what the model knows.
        enough: share of the old facts, 0 to 1, at which pretraining ends early.
        required: share without which it stops with an error.
    """

    num_entities: int = 60
    num_new_entities: int = 20
    num_objects: int = 24
    old_tokens: int = 1_200_000
    share_facts: float = 0.75
    new_tokens: int = 120_000
    text_documents: int = 200
    width: int = 128
    num_blocks: int = 4
    num_heads: int = 4
    block_size: int = 64
    batch_size: int = 16
    base_steps: int = 1200
    base_learning_rate: float = 4e-3
    check_every: int = 100
    enough: float = 0.98
    required: float = 0.9


@dataclass(frozen=True, kw_only=True)
class DemoSettings(WorldSettings):
    """Sizes of the demo's world, model, training and measurements.

    Args:
        steps: optimizer steps of each run on the new corpus.
        learning_rate: of these runs; constant after a short rise.
        num_repeats: runs a method, each with another order of the data.
        max_probes: traced a kind.
        trace_batch_size: sequences a traced batch.
    """

    steps: int = 100
    learning_rate: float = 1e-3
    num_repeats: int = 3
    max_probes: int = 144
    trace_batch_size: int = 8


FULL = DemoSettings()

QUICK = DemoSettings(
    num_entities=8,
    num_new_entities=4,
    num_objects=4,
    old_tokens=12_000,
    new_tokens=3_000,
    text_documents=20,
    width=32,
    num_blocks=2,
    num_heads=2,
    base_steps=12,
    check_every=6,
    enough=1.0,
    required=0.0,
    steps=4,
    num_repeats=2,
    max_probes=16,
)
"""Some seconds; the model knows next to nothing, and the report says so."""
