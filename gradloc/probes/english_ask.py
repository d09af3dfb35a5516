"""Asks a model which facts it knows, so that a world can be built of what it can forget.

The only file of this folder that runs a model. Scores nothing else (`gradloc.evaluate`) and builds
no world (`english`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from gradloc.probes.english_facts import FactKey
from gradloc.probes.probe import Probe


def ask(
    model: torch.nn.Module,
    tokenizer: Any,
    probes: Iterable[Probe],
    *,
    batch_size: int = 32,
    max_length: int = 512,
    templates: str = "all",
    progress: bool = False,
) -> set[FactKey]:
    """Find the facts that a model answers right.

    A probe is answered right if greedy decoding would write its span, or another of its acceptable
    answers, after the text before it: `gradloc.evaluate.probes_matched`.

    Args:
        model: a causal language model; the modes of its modules are put back afterwards.
        tokenizer: a fast tokenizer.
        probes: of an `EnglishWorld`, such as its `old_probes()`: their source names their fact.
        batch_size: sequences a forward pass.
        max_length: tokens a sequence; longer texts lose their start.
        templates: "all": a fact is known if all of its probes are answered right; "any": if one is.
        progress: show a progress bar.

    Returns:
        The facts known, as (entity, relation).

    Raises:
        ValueError: `templates` is neither, there are no probes, or a source names no fact.
    """
    # Not at import: evaluation stands above this package and imports it.
    from gradloc.evaluate import probes_matched

    if templates not in ("all", "any"):
        raise ValueError(f"templates={templates!r}: choose 'all' or 'any'")
    listed = list(probes)
    keys = [fact_key(probe) for probe in listed]
    if not listed:
        raise ValueError("probes is empty: give an EnglishWorld's old_probes()")
    right = probes_matched(
        model,
        tokenizer,
        listed,
        batch_size=batch_size,
        max_length=max_length,
        progress=progress,
    )
    answers: dict[FactKey, list[bool]] = {}
    for key, is_right in zip(keys, right, strict=True):
        answers.setdefault(key, []).append(is_right)
    enough = all if templates == "all" else any
    return {key for key, rights in answers.items() if enough(rights)}


def fact_key(probe: Probe) -> FactKey:
    """Read from an English probe's source which fact it asks for.

    Returns:
        (entity, relation).

    Raises:
        ValueError: the source is not that of an `EnglishWorld`.
    """
    world, _, fact = probe.source.partition(":")
    entity, slash, relation = fact.partition(":")[2].partition("/")
    if world != "english" or not (entity and slash and relation):
        raise ValueError(
            f"source={probe.source!r} names no fact of an EnglishWorld: ask for probes that its "
            "old_probes() or probes() gave"
        )
    return entity, relation
