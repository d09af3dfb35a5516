"""Turns probes into batches for a causal language model, with labels on the spans' tokens only.

Reads no files and runs no model. Labels are Hugging Face's: `labels[i]` is `input_ids[i]` where
that token is scored and -100 elsewhere; the model itself shifts them by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from gradloc.probes.probe import Probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of tokens that are not scored, as torch's cross entropy has it."""


def encode_probe(
    probe: Probe, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    """Tokenise a probe and label the tokens of its spans.

    The whole text is tokenised once, with the special tokens that the tokenizer adds by itself, so
    that the span has the tokens that it has in running text. The labelled tokens are those from the
    first to the last that cover a character of the span that is not a space: a token's own leading
    space counts for nothing, all tokens of one non-ASCII character are labelled, and so is a token
    that straddles the span's edge. Tokens after the last span are cut off, because they cannot
    influence a causal loss. A text that is longer than `max_length` loses its beginning (special
    tokens at the start stay). A span at the very start gets the beginning-of-sequence token (or the
    end-of-sequence token, where there is none) before it, since nothing else predicts its first
    token.

    Args:
        probe: what to encode.
        tokenizer: a fast tokenizer: only those know which characters a token covers.
        max_length: the most tokens, at least 2.

    Returns:
        "input_ids" and "labels", lists of the same length, at most `max_length`.

    Raises:
        ValueError: the tokenizer is not a fast one, the spans do not fit in `max_length` with one
            token before them, no token covers a span, or a span stands at the start and the
            tokenizer has neither bos nor eos.
    """
    _check(tokenizer, max_length)
    encoding = tokenizer(
        probe.text,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        # No warning about a text longer than the model takes: what is too long is cut below.
        verbose=False,
    )
    ids = list(encoding["input_ids"])
    labelled = _labelled(probe, encoding["offset_mapping"])
    num_leading = 0
    for special in encoding["special_tokens_mask"]:
        if not special:
            break
        num_leading += 1

    first, last = labelled.index(True), len(labelled) - 1 - labelled[::-1].index(True)
    ids, labelled = ids[: last + 1], labelled[: last + 1]
    if first == 0:
        start_id = tokenizer.bos_token_id
        if start_id is None:
            start_id = tokenizer.eos_token_id
        if start_id is None:
            raise ValueError(
                f"{probe.source}: the span is at the start of the text, where no token predicts "
                "it, and the tokenizer "
                "has neither bos_token nor eos_token: set one, or put text before the span"
            )
        ids, labelled = [start_id, *ids], [False, *labelled]
        first, num_leading = 1, 1

    if len(ids) > max_length:
        needed = len(ids) - first + max(num_leading, 1)
        if needed > max_length:
            raise ValueError(
                f"{probe.source}: max_length={max_length}, but the span and what must stand "
                f"before it take {needed} "
                f"tokens: choose max_length >= {needed} or leave the probe out"
            )
        cut = len(ids) - (max_length - num_leading)
        ids = ids[:num_leading] + ids[cut:]
        labelled = labelled[:num_leading] + labelled[cut:]
    labels = [token if scored else IGNORED for token, scored in zip(ids, labelled, strict=True)]
    return {"input_ids": ids, "labels": labels}


def probe_batches(
    probes: Iterable[Probe],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_length: int = 512,
    whole_batches: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """Encode probes and stack them, in their order, into batches.

    Args:
        probes: what to encode.
        tokenizer: a fast tokenizer.
        batch_size: probes a batch; the last one may hold fewer.
        max_length: the most tokens a probe.
        whole_batches: leave the last batch out if it holds fewer and is not the only one. For
            tracing, where every batch counts the same and a small one has a larger gradient.

    Returns:
        Dicts of int64 tensors [batch, longest]: "input_ids" (padded on the right), "attention_mask"
        (1 for tokens, 0 for padding), "labels" (-100 outside the spans and on padding).

    Raises:
        ValueError: batch_size below 1, or what `encode_probe` raises.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    _check(tokenizer, max_length)
    encoded = [encode_probe(probe, tokenizer, max_length) for probe in probes]
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        # The attention mask hides padding, so any valid token serves.
        pad_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    batches = [
        _stack(encoded[start : start + batch_size], pad_id)
        for start in range(0, len(encoded), batch_size)
    ]
    return _whole(batches) if whole_batches else batches


def even_batches(
    probes: Mapping[str, Sequence[Probe]],
    read_reference: Callable[[int], list[dict[str, torch.Tensor]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> tuple[dict[str, list[dict[str, torch.Tensor]]], list[dict[str, torch.Tensor]], list[str]]:
    """Make batches to trace with, all of equally many sequences: the probes' and the reference's.

    A batch of fewer sequences has a larger gradient norm, so what does not fill a whole batch is
    left out, and where a kind or the reference has less than one batch, all batches are made that
    small.

    Args:
        probes: by kind.
        read_reference: gives batches of a size; only its last may be smaller.
        tokenizer: a fast tokenizer.
        batch_size: the most sequences a batch.
        max_length: the most tokens a probe.

    Returns:
        Batches by kind, those of the reference, and sentences for the user: whether batches are
        smaller than `batch_size` and why, and how many sequences of what were left out.

    Raises:
        ValueError: what `probe_batches` raises.
    """
    counts = {f"the {kind!r} probes": len(members) for kind, members in probes.items()}
    fewest = min((count for count in counts.values() if count), default=batch_size)
    size = min(batch_size, fewest)
    reference = read_reference(size)
    if len(reference) == 1:
        size = min(size, len(reference[0]["labels"]))
    batches = {
        kind: probe_batches(
            members, tokenizer, batch_size=size, max_length=max_length, whole_batches=True
        )
        for kind, members in probes.items()
    }
    counts["the reference"] = sum(len(batch["labels"]) for batch in reference)
    notes = []
    if size < batch_size:
        scarce = next(what for what, count in counts.items() if count == size)
        notes.append(
            f"sequences a batch: {size} and not {batch_size}, as there are no more in {scarce}"
        )
    notes += [
        f"left out {count % size} of the {count} sequences of {what}: they fill no batch of {size}"
        for what, count in counts.items()
        if count % size
    ]
    return batches, _whole(reference), notes


def _whole(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Leave out a last batch of fewer sequences than the first."""
    if len(batches) > 1 and len(batches[-1]["labels"]) < len(batches[0]["labels"]):
        return batches[:-1]
    return batches


def _check(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__} is not a fast tokenizer, so the characters of "
            "a token are unknown: "
            "load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: must be at least 2, a token and one before it")


def _labelled(probe: Probe, offsets: list[tuple[int, int]]) -> list[bool]:
    """Say for each token whether it is one of a span's."""
    labelled = [False] * len(offsets)
    for start, end in probe.spans:
        span = probe.text[start:end]
        start += len(span) - len(span.lstrip())
        end -= len(span) - len(span.rstrip())
        covering = [
            index
            for index, (token_start, token_end) in enumerate(offsets)
            if probe.text[max(token_start, start) : min(token_end, end)].strip()
        ]
        if not covering:
            raise ValueError(
                f"{probe.source}: no token covers the span {span!r} at [{start}, {end}]: the "
                "tokenizer drops these characters or gives no offsets; upgrade tokenizers or use "
                "another tokenizer"
            )
        # Tokens of spaces only, between two words of the span, may have no offsets of their own.
        for index in range(covering[0], covering[-1] + 1):
            labelled[index] = True
    return labelled


def _stack(rows: list[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[index, :length] = torch.tensor(row["input_ids"], dtype=torch.int64)
        attention_mask[index, :length] = 1
        labels[index, :length] = torch.tensor(row["labels"], dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
