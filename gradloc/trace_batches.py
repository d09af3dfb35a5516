"""The batches that trace_gradients reads: checked before the model is touched. Runs no model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from gradloc.matched_spans import IGNORED, SpanDealer, span_lengths

Batch: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class BatchSet:
    """Batches whose gradient norms are averaged.

    Args:
        what: what messages call them.
        batches: dicts with `labels`, [batch, length] or [batch].
        first: the first position whose label has a loss.
    """

    what: str
    batches: Sequence[Batch]
    first: int

    def labels(self, index: int) -> torch.Tensor:
        """The labels of one batch."""
        labels = self.batches[index]["labels"]
        assert isinstance(labels, torch.Tensor)
        return labels

    def num_tokens(self, index: int) -> int:
        """Tokens of one batch that the loss falls on."""
        labels = self.labels(index)
        return int((labels[:, self.first :] if labels.dim() > 1 else labels).ne(IGNORED).sum())

    def check(self) -> None:
        """Check that every batch can be measured.

        Raises:
            ValueError: no batches; a batch without labels or without a labelled token.
        """
        if not self.batches:
            raise ValueError(
                f"no batches in {self.what}: give at least one (a generator gives them only once)"
            )
        for index, batch in enumerate(self.batches):
            where = f"batch {index} of {self.what}"
            if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), torch.Tensor):
                found = list(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
                raise ValueError(
                    f"{where} has no labels tensor (it is or holds {found}): give dicts of tensors "
                    "with labels, -100 where there is no loss"
                )
            if self.labels(index).dim() == 0:
                raise ValueError(
                    f"{where}: labels have no batch dimension, expected [batch, length]"
                )
            if self.num_tokens(index) == 0:
                raise ValueError(
                    f"{where} has no labelled token: all labels are {IGNORED}"
                    f"{' or at position 0, where a causal model has no loss' if self.first else ''}"
                    ". Leave it out, or label the span's tokens"
                )


def read_batches(
    probes: Iterable[Batch] | Mapping[str, Iterable[Batch]], reference: Iterable[Batch]
) -> tuple[dict[str, list[Batch]], list[Batch]]:
    """Read every iterable once.

    Returns:
        The probes by kind (batches alone are of the kind "probe"), and the reference.

    Raises:
        ValueError: a single batch instead of several, no kinds, or a kind named "reference".
    """
    for what, given in (("probes", probes), ("reference", reference)):
        if isinstance(given, Mapping) and any(
            isinstance(value, torch.Tensor) for value in given.values()
        ):
            raise ValueError(f"{what} is a single batch: give a list of batches, [batch]")
    if isinstance(reference, Mapping):
        raise ValueError(
            "reference is a dict: only probes have kinds; give the reference as a list of batches"
        )
    by_kind = probes if isinstance(probes, Mapping) else {"probe": probes}
    if not by_kind:
        raise ValueError("probes is empty: give batches, or {kind: batches}")
    if "reference" in by_kind:
        raise ValueError(
            "kind='reference' is the reference's own name: call the probes something else"
        )
    return {str(kind): list(batches) for kind, batches in by_kind.items()}, list(reference)


def warn_of_sizes(sets: Sequence[BatchSet]) -> None:
    """Warn, once for all, where batches differ in their number of sequences.

    Every batch counts the same in a mean over batches, and the gradient of a mean over fewer
    sequences is larger, whatever they are: one small batch at the end lifts a kind's ratio in every
    layer.
    """
    sizes = {
        one.what: sorted({len(one.labels(index)) for index in range(len(one.batches))})
        for one in sets
    }
    if len({size for found in sizes.values() for size in found}) < 2:
        return
    shown = "; ".join(f"{what}: {', '.join(map(str, found))}" for what, found in sizes.items())
    warnings.warn(
        f"batches differ in their number of sequences ({shown}), so their gradient norms differ "
        "for that reason alone: give every batch, of every kind and of the reference, equally many "
        "sequences (gradloc.probes.even_batches does, probe_batches with whole_batches=True "
        "leaves out a smaller last one)",
        UserWarning,
        stacklevel=3,  # the caller of trace_gradients
    )


def matched_to(general: BatchSet, probes: BatchSet, seed: int, kind: str) -> BatchSet:
    """The reference with its loss on random spans as long as those of one kind of probes.

    Raises:
        ValueError: labels that are not [batch, length].
    """
    lengths: list[int] = []
    for one in (probes, general):
        for index in range(len(one.batches)):
            if one.labels(index).dim() != 2:
                shape = tuple(one.labels(index).shape)
                raise ValueError(
                    "reference_loss='matched-spans' needs labels [batch, length]; those of batch "
                    f"{index} of {one.what} have shape {shape}: use reference_loss='all'"
                )
            if one is probes:
                lengths += span_lengths(one.labels(index), one.first)
    dealer = SpanDealer(lengths, seed, kind)
    batches = [{**batch, "labels": dealer.labels(batch["labels"])} for batch in general.batches]
    matched = BatchSet(f"the reference matched to {kind!r}", batches, general.first)
    matched.check()
    return matched
