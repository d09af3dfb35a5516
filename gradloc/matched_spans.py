"""Random spans in reference text, as long as the probes': the reference loss "matched-spans".

A mean over few tokens has a larger gradient than one over many, whatever the tokens are. With the
loss on equally many tokens the ratio of probe to reference is freed of that. Only makes labels;
measures nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

IGNORED = -100


def span_lengths(labels: torch.Tensor, first: int) -> list[int]:
    """Labelled tokens of each sequence that has any.

    Args:
        labels: [batch, length], -100 where there is no loss.
        first: first position whose label counts: 1 in a causal language model, which predicts
            nothing at 0.
    """
    counts = (labels[:, first:] != IGNORED).sum(dim=1).tolist()
    return [count for count in counts if count > 0]


class SpanDealer:
    """Draws lengths and places of spans for one kind of probe, the same for the same arguments.

    Lengths are dealt like cards: every length is used once, in random order, before any is used
    again. So the spans have the probes' distribution of lengths, and exactly so whenever the cards
    are used up.

    Args:
        lengths: span lengths of the probes, each >= 1.
        seed: of the draws; the global random state is neither read nor changed.
        kind: the probes' kind, mixed into the seed: what one kind gets does not depend on the
            others.
    """

    def __init__(self, lengths: Sequence[int], seed: int, kind: str) -> None:
        self._lengths = tuple(lengths)
        self._hand: list[int] = []
        mixed = (seed * 0x9E3779B1 + zlib.crc32(kind.encode())) % 2**63
        self._generator = torch.Generator().manual_seed(mixed)

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Keep one random span of each sequence's labels.

        A span lies on labelled tokens only, never on position 0, where a causal model has no loss.
        Where no labelled run is long enough, the span is the (first) longest run.

        Args:
            labels: [batch, length].

        Returns:
            A new tensor like `labels`, -100 outside the spans. A sequence without labels stays
            without.
        """
        rows = labels.cpu()
        kept = torch.full_like(rows, IGNORED)
        for row, target in zip(rows, kept, strict=True):
            runs = _runs(row)
            if not runs:
                continue
            length = min(self._next_length(), max(stop - start for start, stop in runs))
            start = self._start(runs, length)
            target[start : start + length] = row[start : start + length]
        return kept.to(labels.device)

    def _next_length(self) -> int:
        if not self._hand:
            order = torch.randperm(len(self._lengths), generator=self._generator).tolist()
            self._hand = [self._lengths[index] for index in order]
        return self._hand.pop()

    def _start(self, runs: Sequence[tuple[int, int]], length: int) -> int:
        # Uniform over every place where the span fits, whichever run it is in.
        places = [max(0, stop - start - length + 1) for start, stop in runs]
        drawn = int(torch.randint(sum(places), (1,), generator=self._generator))
        for (start, _), count in zip(runs, places, strict=True):
            if drawn < count:
                return start + drawn
            drawn -= count
        raise AssertionError("drawn < sum(places)")


def _runs(row: torch.Tensor) -> list[tuple[int, int]]:
    """Half-open ranges of neighbouring labelled positions, from position 1 on."""
    labelled = (row != IGNORED).to(torch.int8)
    labelled[:1] = 0
    edges = torch.diff(labelled, prepend=labelled.new_zeros(1), append=labelled.new_zeros(1))
    starts = (edges == 1).nonzero().flatten().tolist()
    stops = (edges == -1).nonzero().flatten().tolist()
    return list(zip(starts, stops, strict=True))
