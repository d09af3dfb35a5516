"""Scores what a model knows: probes by kind, and ordinary text. Neither trains nor traces.

A probe's loss falls on its span only, given the text before it, so a score says how well the model
knows the fact and not how well it writes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gradloc.files import write_json
from gradloc.probes import Probe, by_kind, probe_batches

_SCHEMA = "gradloc.scores"
_VERSION = 1
_IGNORED = -100


@dataclass(frozen=True)
class ProbeScore:
    """How well a model knows the probes of one kind.

    Args:
        perplexity: exp(nll).
        nll: mean negative log-likelihood in nats of a span token, given all before it; every token
            weighs the same, so that long spans weigh more than short ones.
        exact_match: share of the probes, 0 to 1, of which some acceptable answer is what greedy
            decoding would write: at each of its tokens the most probable token is the right one.
        num_probes: probes scored.
        num_tokens: span tokens scored.
    """

    perplexity: float
    nll: float
    exact_match: float
    num_probes: int
    num_tokens: int


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts ordinary text.

    Args:
        perplexity: exp(nll).
        nll: mean negative log-likelihood in nats of a token, given those before it in its window.
        num_tokens: tokens scored: all but the first of each window.
    """

    perplexity: float
    nll: float
    num_tokens: int


def evaluate_probes(
    model: torch.nn.Module,
    tokenizer: Any,
    probes: Iterable[Probe],
    *,
    batch_size: int = 8,
    max_length: int = 512,
    progress: bool = False,
) -> dict[str, ProbeScore]:
    """Score probes, kind by kind.

    The likelihood is that of the span as it stands in the text. For the exact match the other
    acceptable answers (`Probe.answers`) are tried in its place too; they need a probe with one
    span and are left aside where there are several.

    Args:
        model: a causal language model; the modes of its modules are put back afterwards.
        tokenizer: a fast tokenizer.
        probes: what to score.
        batch_size: sequences a forward pass.
        max_length: tokens a sequence; longer texts lose their start.
        progress: show a progress bar.

    Returns:
        kind -> score, kinds in the order of their first probe.

    Raises:
        ValueError: no probes, or one that cannot be encoded (see `encode_probe`).
    """
    grouped = by_kind(probes)
    if not grouped:
        raise ValueError("probes is empty: give at least one probe")
    # Everything is encoded before the model runs, so that a bad probe shows at once.
    work = {}
    for kind, members in grouped.items():
        texts, owners = _with_answers(members)
        work[kind] = (
            probe_batches(texts, tokenizer, batch_size=batch_size, max_length=max_length),
            owners,
        )
    scores = {}
    total = sum(len(batches) for batches, _ in work.values())
    with _evaluating(model), _progress(total if progress else None, "scoring probes") as advance:
        for kind, (batches, owners) in work.items():
            rows = [
                row for batch in batches for row in _advanced(_score_rows(model, batch), advance)
            ]
            scores[kind] = _probe_score(rows, owners)
    return scores


def probes_matched(
    model: torch.nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    *,
    batch_size: int = 8,
    max_length: int = 512,
    progress: bool = False,
) -> list[bool]:
    """Say of each probe whether the model answers it right: the exact match of `evaluate_probes`.

    Args:
        model: a causal language model; the modes of its modules are put back afterwards.
        tokenizer: a fast tokenizer.
        probes: what to ask, of any kinds.
        batch_size: sequences a forward pass.
        max_length: tokens a sequence; longer texts lose their start.
        progress: show a progress bar.

    Returns:
        A value a probe, in their order.

    Raises:
        ValueError: no probes, or one that cannot be encoded (see `encode_probe`).
    """
    if not probes:
        raise ValueError("probes is empty: give at least one probe")
    texts, owners = _with_answers(probes)
    batches = probe_batches(texts, tokenizer, batch_size=batch_size, max_length=max_length)
    total = len(batches) if progress else None
    with _evaluating(model), _progress(total, "asking") as advance:
        rows = [row for batch in batches for row in _advanced(_score_rows(model, batch), advance)]
    return _matched(rows, owners)


def evaluate_text(
    model: torch.nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    progress: bool = False,
) -> TextScore:
    """Perplexity over windows of text, such as `gradloc.training.corpus.text_batches` makes.

    Each window is scored on its own: its first tokens have little before them, so the value is a
    little higher than that of a sliding window. Compare models on the same windows.

    Args:
        model: a causal language model; the modes of its modules are put back afterwards.
        batches: dicts of `input_ids`, `labels` (-100 where not scored) and, if need be,
            `attention_mask`, each [sequences, tokens].
        progress: show a progress bar.

    Raises:
        ValueError: no batches, or no token to score in them.
    """
    losses: list[torch.Tensor] = []
    num_tokens = 0
    with (
        _evaluating(model),
        _progress(len(batches) if progress else None, "scoring text") as advance,
    ):
        for batch in batches:
            for nll, _ in _advanced(_score_rows(model, batch), advance):
                losses.append(nll.double().sum())
                num_tokens += len(nll)
    if num_tokens == 0:
        raise ValueError(f"{len(batches)} batches with no token to score: give more text")
    nll = float(torch.stack(losses).sum()) / num_tokens
    return TextScore(perplexity=_exp(nll), nll=nll, num_tokens=num_tokens)


def save_scores(
    path: str | os.PathLike[str],
    probes: Mapping[str, ProbeScore],
    text: TextScore | None = None,
    **about: Any,
) -> None:
    """Write scores as JSON (schema "gradloc.scores"), whole or not at all.

    Args:
        path: the file.
        probes: as `evaluate_probes` returns.
        text: as `evaluate_text` returns.
        about: what else the file should say, such as model="gpt2". A number that is not finite
            becomes null.
    """
    content: dict[str, Any] = {
        **about,
        "probes": {kind: asdict(score) for kind, score in probes.items()},
        "text": None if text is None else asdict(text),
    }
    write_json(path, _finite(content), schema=_SCHEMA, version=_VERSION)


def _with_answers(probes: Sequence[Probe]) -> tuple[list[Probe], list[int | None]]:
    """Each probe followed by its variants; owner None marks a probe itself, else its number."""
    texts: list[Probe] = []
    owners: list[int | None] = []
    for number, probe in enumerate(probes):
        texts.append(probe)
        owners.append(None)
        if len(probe.spans) == 1:
            own = probe.span_texts[0].strip()
            others = [a for a in dict.fromkeys(a.strip() for a in probe.answers) if a and a != own]
            texts.extend(probe.with_answer(answer) for answer in others)
            owners.extend(number for _ in others)
    return texts, owners


def _matched(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]], owners: Sequence[int | None]
) -> list[bool]:
    """Whether each probe, or one of its variants, has the right top token all along."""
    matched: list[bool] = []
    for (_, hits), owner in zip(rows, owners, strict=True):
        right = bool(hits.all())
        if owner is None:
            matched.append(right)
        elif right:
            matched[owner] = True
    return matched


def _probe_score(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]], owners: Sequence[int | None]
) -> ProbeScore:
    total = 0.0
    num_tokens = 0
    for (nll, _), owner in zip(rows, owners, strict=True):
        if owner is None:
            total += float(nll.double().sum())
            num_tokens += len(nll)
    matched = _matched(rows, owners)
    nll_mean = total / num_tokens
    return ProbeScore(
        perplexity=_exp(nll_mean),
        nll=nll_mean,
        exact_match=sum(matched) / len(matched),
        num_probes=len(matched),
        num_tokens=num_tokens,
    )


def _score_rows(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each sequence: nll and whether the top token is right, at each labelled token."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    labels = batch["labels"].to(device)
    output = model(**inputs)
    logits = output["logits"] if isinstance(output, Mapping) else output[0]
    rows = []
    # A row at a time: float32 log-probabilities of a whole batch may take gigabytes.
    for row, row_labels in zip(logits[:, :-1], labels[:, 1:], strict=True):
        where = row_labels != _IGNORED
        scored, wanted = row[where].float(), row_labels[where]
        nll = torch.nn.functional.cross_entropy(scored, wanted, reduction="none")
        rows.append((nll.cpu(), (scored.argmax(dim=-1) == wanted).cpu()))
    return rows


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No dropout and no gradients; every module's mode is put back.

    no_grad and not inference_mode: models that recompute buffers in forward (dynamic rotary
    embeddings) would keep inference tensors, and training them afterwards would fail.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _progress(total: int | None, what: str) -> Iterator[Any]:
    if total is None:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit="batch", leave=False) as bar:
        yield bar.update


def _advanced(rows: list[Any], advance: Any) -> list[Any]:
    advance()
    return rows


def _exp(nll: float) -> float:
    """Give inf where a float ends: a hopeless model should not raise."""
    return math.exp(nll) if nll < 709 else math.inf if nll == nll else math.nan


def _finite(value: Any) -> Any:
    """JSON has neither nan nor inf; null says "no number"."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
