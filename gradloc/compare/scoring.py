"""Scores a model on a study's measured and validation probes and on ordinary text.

Encodes what it scores once, as every model of a seed is scored on the same. Chooses nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from gradloc.compare.material import FORGET_KIND, LEARN_KINDS, Material
from gradloc.evaluate import evaluate_probes, evaluate_text
from gradloc.training.corpus import pack_documents

_BATCH = 16


class Scorer:
    """Scores models of one seed.

    Args:
        tokenizer: theirs.
        material: what they are scored on.
        block_size: tokens a window of text, and the most a probe may have.
    """

    def __init__(self, tokenizer: Any, material: Material, block_size: int) -> None:
        self._tokenizer = tokenizer
        self._material = material
        self._block_size = block_size
        self._text = {
            name: _windows(documents, tokenizer, block_size)
            for name, documents in material.text.items()
        }

    def measured(self, model: torch.nn.Module) -> dict[str, Any]:
        """What a run's record says under "scores", for the weights that the model has now."""
        text = {name: evaluate_text(model, batches) for name, batches in self._text.items()}
        return {
            "probes": {kind: _finite(score) for kind, score in self._probes(model, "measured")},
            "text": {name: _finite(score) for name, score in text.items()},
        }

    def validation(self, model: torch.nn.Module) -> dict[str, float]:
        """Mean nll in nats a token: "learn" of updated and new facts, "forget" of others."""
        nll = {kind: score.nll for kind, score in self._probes(model, "validation")}
        learn = sum(nll[kind] for kind in LEARN_KINDS) / len(LEARN_KINDS)
        return {"learn": learn, "forget": nll[FORGET_KIND]}

    def _probes(self, model: torch.nn.Module, part: str) -> Any:
        # Of equal length side by side: less padding, and the scores do not depend on it.
        probes = sorted(getattr(self._material, part), key=lambda probe: len(probe.text))
        return evaluate_probes(
            model, self._tokenizer, probes, batch_size=_BATCH, max_length=self._block_size
        ).items()


def _windows(documents: Any, tokenizer: Any, block_size: int) -> list[dict[str, torch.Tensor]]:
    rows = pack_documents(documents, tokenizer, block_size=block_size)
    ids = torch.tensor([list(row["input_ids"]) for row in rows])
    return [{"input_ids": part, "labels": part.clone()} for part in torch.split(ids, _BATCH)]


def _finite(score: Any) -> dict[str, Any]:
    """JSON has neither nan nor inf: null says that there is no number."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(score).items()
    }
