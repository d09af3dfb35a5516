"""Per-batch gradient norms of probes and of ordinary text, each batch traced once.

The norms of every batch are kept apart, so that profiles of any resample are means of kept rows.
Says nothing about what the profiles show (`profile_tests` does) and writes no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradloc.layers import LayerMap
from gradloc.matched_spans import IGNORED, SpanDealer, span_lengths
from gradloc.trace import trace_gradients
from gradloc.trace_batches import Batch

# A causal language model predicts nothing at position 0.
_FIRST = 1


@dataclass(frozen=True, kw_only=True)
class TracedBatches:
    """What one set of batches gave, a row a batch.

    Args:
        norms: float64 [num_batches, num_layers], each batch's gradient norm of every layer.
        losses: mean loss of each batch, nats a token.
        num_tokens: tokens that each batch's loss fell on.

    Raises:
        ValueError: the three do not have equally many batches, or a number is not finite.
    """

    norms: NDArray[np.float64]
    losses: tuple[float, ...]
    num_tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        norms = np.asarray(self.norms, dtype=np.float64)
        counts = (len(norms) if norms.ndim == 2 else 0, len(self.losses), len(self.num_tokens))
        if norms.ndim != 2 or len(set(counts)) != 1 or not norms.size:
            raise ValueError(
                f"norms has shape {norms.shape}, with {counts[1]} losses and {counts[2]} token "
                "counts: expected [num_batches, num_layers] and one of each a batch"
            )
        if not np.isfinite(norms).all() or not np.isfinite(self.losses).all():
            raise ValueError("norms or losses are not all finite: trace the batches again")
        norms.flags.writeable = False
        object.__setattr__(self, "norms", norms)

    def to_json(self) -> dict[str, Any]:
        """Plain lists; norms and losses with seven digits, which is what float32 holds."""
        return {
            "norms": [[float(f"{norm:.7g}") for norm in row] for row in self.norms.tolist()],
            "losses": [float(f"{loss:.7g}") for loss in self.losses],
            "num_tokens": list(self.num_tokens),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TracedBatches:
        """Read what `to_json` gave.

        Raises:
            ValueError: a field is missing or malformed.
        """
        try:
            return cls(
                norms=np.array(content["norms"], dtype=np.float64),
                losses=tuple(map(float, content["losses"])),
                num_tokens=tuple(map(int, content["num_tokens"])),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the traced batches that were saved: {error!r}") from error


def trace_each(
    model: torch.nn.Module, batches: Sequence[Batch], *, layers: LayerMap
) -> TracedBatches:
    """Trace every batch once and keep each one's norms apart.

    Args:
        model: a transformers model (its output has `.loss`); left as it was.
        batches: at least two, as `trace_gradients` takes them.
        layers: what to measure.

    Raises:
        ValueError: fewer than two batches, or what `trace_gradients` raises.
    """
    if len(batches) < 2:
        raise ValueError(f"batches holds {len(batches)}: at least 2, so that they can be resampled")
    # A kind of its own for each batch keeps its norms apart. The last one takes the place of the
    # reference that trace_gradients asks for, so that it is measured too and none twice.
    kinds = {str(index): [batch] for index, batch in enumerate(batches[:-1])}
    with _recorded_losses(model) as losses:
        profile = trace_gradients(model, kinds, [batches[-1]], layers=layers, progress=False)
    rows = [profile.probes[kind].norms for kind in kinds]
    rows.append(profile.references["all"]["0"].norms)
    return TracedBatches(
        norms=np.array(rows),
        losses=tuple(torch.stack(losses).cpu().double().tolist()),
        num_tokens=tuple(sum(span_lengths(batch["labels"], first=_FIRST)) for batch in batches),
    )


@contextmanager
def _recorded_losses(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the loss of every forward pass, for which tracing has no use of its own."""
    losses: list[torch.Tensor] = []
    handle = model.register_forward_hook(
        lambda module, arguments, output: losses.append(output.loss.detach().reshape(()))
    )
    try:
        yield losses
    finally:
        handle.remove()


def first_tokens(batches: Sequence[Batch], count: int) -> list[dict[str, Any]]:
    """The same batches with the loss on the first `count` labelled tokens of each sequence.

    So that probes of different kinds have spans of the same length. What comes after the last
    labelled token is cut off: it cannot influence a causal loss.

    Raises:
        ValueError: count below 1, or a sequence with fewer labelled tokens.
    """
    if count < 1:
        raise ValueError(f"count={count}: must be at least 1")
    shortened = []
    for index, batch in enumerate(batches):
        labels = batch["labels"]
        scored = labels.ne(IGNORED)
        scored[:, :_FIRST] = False
        if int(scored.sum(dim=1).min()) < count:
            raise ValueError(
                f"count={count}, but a sequence of batch {index} has only "
                f"{int(scored.sum(dim=1).min())} labelled tokens: leave such probes out"
            )
        kept = scored & (scored.cumsum(dim=1) <= count)
        shortened.append(_cut(batch, labels.masked_fill(~kept, IGNORED)))
    return shortened


def matched_spans(
    text: Sequence[Batch], probes: Sequence[Batch], *, seed: int, kind: str
) -> list[dict[str, Any]]:
    """Ordinary text with its loss on random spans, as long as those of the probes.

    The spans are those of `reference_loss="matched-spans"` of `trace_gradients` for the same seed
    and kind; what follows the last span of a batch is cut off.

    Args:
        text: batches with labels on all tokens.
        probes: the batches of one kind.
        seed: of the draws.
        kind: mixed into the seed.
    """
    lengths = [length for batch in probes for length in span_lengths(batch["labels"], _FIRST)]
    dealer = SpanDealer(lengths, seed, kind)
    return [_cut(batch, dealer.labels(batch["labels"])) for batch in text]


def placed_spans(text: Sequence[Batch], probes: Sequence[Batch]) -> list[dict[str, Any]]:
    """Ordinary text in the probes' shape: as many tokens of context, then a span as long.

    A stricter control than `matched_spans`: with little context before it a token is harder to
    predict, whatever it is, and probes are short.

    Args:
        text: batches with labels on all tokens, of as many sequences as the probes'.
        probes: the batches of one kind; the first is matched with the first of the text, and so
            on, from the start again where there are more batches of text.

    Raises:
        ValueError: a batch of text that is smaller than its probes, in sequences or tokens.
    """
    placed = []
    for index, batch in enumerate(text):
        shape = probes[index % len(probes)]["labels"]
        labels = batch["labels"]
        if labels.shape[0] != shape.shape[0] or labels.shape[1] < shape.shape[1]:
            raise ValueError(
                f"batch {index} of text has shape {tuple(labels.shape)}, its probes "
                f"{tuple(shape.shape)}: give text of as many sequences, at least as long"
            )
        kept = labels[:, : shape.shape[1]].masked_fill(shape.eq(IGNORED), IGNORED)
        cut = {name: tensor[:, : shape.shape[1]] for name, tensor in batch.items()}
        placed.append(_cut(cut, kept))
    return placed


def surprising_spans(
    model: torch.nn.Module, text: Sequence[Sequence[Batch]], probes: Sequence[Batch]
) -> list[dict[str, Any]]:
    """Ordinary text in the probes' shape, chosen to be about as hard to predict as they are.

    The strictest control: a loss that is larger has a larger gradient, whatever the text says. For
    every probe the text is chosen, of as many as there are, whose span's loss is nearest to its
    own; how near that is shows in the losses of the trace.

    Args:
        model: a transformers model in eval mode; only run forward.
        text: candidates: each a list of batches as `placed_spans` takes them.
        probes: the batches of one kind, matched with the text in the order of `placed_spans`.

    Raises:
        ValueError: no candidates, or what `placed_spans` raises.
    """
    if not text:
        raise ValueError("text holds no candidates: give at least one list of batches")
    candidates = [placed_spans(batches, probes) for batches in text]
    chosen = []
    for index, same_place in enumerate(zip(*candidates, strict=True)):
        wanted = _row_losses(model, probes[index % len(probes)])
        losses = torch.stack([_row_losses(model, batch) for batch in same_place])
        nearest = (losses - wanted).abs().argmin(dim=0).tolist()
        rows = [
            {name: tensor[row] for name, tensor in same_place[best].items()}
            for row, best in enumerate(nearest)
        ]
        chosen.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    return chosen


def _row_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean loss of each sequence over its labelled tokens, nats, [batch]."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none"
    )
    means: torch.Tensor = losses.sum(dim=1) / labels.ne(IGNORED).sum(dim=1)
    return means


def _cut(batch: Batch, labels: torch.Tensor) -> dict[str, Any]:
    """The batch with these labels, up to the last position that has one."""
    stop = int(labels.ne(IGNORED).any(dim=0).nonzero().max()) + 1
    return {name: tensor[:, :stop] for name, tensor in {**batch, "labels": labels}.items()}
