"""Self-replay: what a model itself generates before training stands in for old data.

Samples documents, for users who do not have what the model was trained on. Packs no rows and mixes
none: that is `gradloc.training.corpus.pack_documents` and `gradloc.training.mixing`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from gradloc.trace_guard import keeping_random_state
from gradloc.training.corpus import document_tokens
from gradloc.training.model_guard import keeping_flags

# Sequences in a row without any text after which a model is taken to have none to give. One that
# ends nine of ten documents at once is taken so once in a thousand times.
_EMPTY_ROWS = 64


@dataclass(frozen=True)
class SelfReplay:
    """Replay of the model's own samples (compare arXiv 2605.26097).

    Args:
        ratio: generated rows for every new row, at least 0.
        temperature: of the sampling, above 0; 1 samples from the model's own distribution.
        share_facts: share of the generated tokens, 0 to 1, that continue prompts about facts; the
            rest is text from its beginning.

    Raises:
        ValueError: a setting out of range.
    """

    ratio: float
    _: KW_ONLY
    temperature: float = 1.0
    share_facts: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio >= 0):
            raise ValueError(f"ratio={self.ratio!r}: rows for every new row, at least 0")
        _check_sampling("share_facts", self.share_facts, self.temperature)


@dataclass(frozen=True, kw_only=True)
class GeneratedText:
    """What a model has generated.

    Args:
        documents: the texts, prompts included, without special tokens; none is blank.
        num_tokens: tokens that packing makes of them, an end-of-sequence token each included.
        num_generated_tokens: tokens that the model produced, also for what was dropped.
        num_prompt_tokens: tokens that it read before: beginnings and prompts. The two together are
            what the documents have cost.
    """

    documents: tuple[str, ...]
    num_tokens: int
    num_generated_tokens: int
    num_prompt_tokens: int


def generate_replay(
    model: Any,
    tokenizer: Any,
    *,
    num_tokens: int,
    prompts: Sequence[str] = (),
    share_prompts: float = 0.5,
    temperature: float = 1.0,
    block_size: int,
    batch_size: int = 16,
    seed: int,
) -> GeneratedText:
    """Sample documents from a model, on the device where it is.

    Text is sampled from where a document begins: what the tokenizer puts there, or else the
    end-of-sequence token, as between packed documents. Facts are sampled as continuations of
    `prompts`, each after such a beginning; prompts come in fresh permutations. A document ends with
    an end-of-sequence token of the tokenizer or of the model, or at `block_size`. Nothing but the
    temperature changes the model's distribution (no top-k, no penalties, whatever its generation
    config says). Documents without any generated text are dropped.

    The modes of the model's modules, its generation config and the global random states are put
    back.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        num_tokens: tokens wanted, counted as in `GeneratedText.num_tokens`; a few more come, as
            documents are kept whole.
        prompts: beginnings of facts, such as "The capital of France is".
        share_prompts: share of `num_tokens` that continues prompts, 0 to 1; without prompts all is
            text.
        temperature: of the sampling, above 0.
        block_size: tokens a sequence at most, its beginning and prompt included.
        batch_size: sequences generated at once, at most.
        seed: of all that is drawn: the same seed gives the same documents on the same device.

    Returns:
        The documents, those from prompts first, and what they cost.

    Raises:
        ValueError: a setting out of range; a prompt that fills a block; a block that is longer than
            the model's positions; a tokenizer without an end-of-sequence token; a model that cannot
            generate, or that gave nothing but empty documents.
    """
    _check_sampling("share_prompts", share_prompts, temperature)
    for name, value in (("num_tokens", num_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value!r}: at least 1")
    _check_model(model, tokenizer, block_size)
    share = share_prompts if prompts else 0.0
    from_prompts = math.ceil(share * num_tokens)
    # Random(str) is unrelated to the streams that the same number seeds elsewhere.
    draw = random.Random(f"gradloc self-replay {seed}")
    start = _start(tokenizer)
    parts = [
        (
            from_prompts,
            _shuffled_for_ever(_prompt_tokens(prompts, tokenizer, start, block_size), draw),
        ),
        (num_tokens - from_prompts, itertools.repeat(start)),
    ]
    with keeping_random_state(), keeping_flags(model), _sampling(model, tokenizer, temperature):
        model.eval()
        torch.manual_seed(draw.getrandbits(63))
        done = [
            _sample_until(wanted, beginnings, model, tokenizer, len(start), block_size, batch_size)
            for wanted, beginnings in parts
        ]
    return GeneratedText(
        documents=tuple(text for part in done for text in part.documents),
        num_tokens=sum(part.num_tokens for part in done),
        num_generated_tokens=sum(part.num_generated_tokens for part in done),
        num_prompt_tokens=sum(part.num_prompt_tokens for part in done),
    )


def _sample_until(
    wanted: int,
    beginnings: Iterator[list[int]],
    model: Any,
    tokenizer: Any,
    num_start: int,
    block_size: int,
    batch_size: int,
) -> GeneratedText:
    """Documents of `wanted` tokens at least; each sequence goes on from the next beginning."""
    documents: list[str] = []
    kept = generated = read = num_rows = empty = 0
    while kept < wanted:
        # As many rows as are still needed by the mean so far: what is generated beyond that is
        # paid for too.
        typical = max(1.0, kept / num_rows) if num_rows else block_size
        rows = list(
            itertools.islice(beginnings, min(batch_size, math.ceil((wanted - kept) / typical)))
        )
        texts = []
        for beginning, ids in zip(rows, _continue(model, tokenizer, rows, block_size), strict=True):
            generated += len(ids)
            read += len(beginning)
            if _text(tokenizer, ids).strip():
                # Together, as tokenizers decode a first token otherwise than one inside a text.
                texts.append(_text(tokenizer, [*beginning[num_start:], *ids]))
        documents += texts
        kept += sum(len(ids) for ids in document_tokens(texts, tokenizer))
        num_rows += len(rows)
        empty = 0 if texts else empty + len(rows)
        if empty >= _EMPTY_ROWS:
            raise ValueError(
                f"the model generates empty documents only ({generated} tokens without any text, "
                f"{kept} of {wanted} tokens reached): check that it is a language model trained "
                "with this tokenizer, or give real old data"
            )
    return GeneratedText(
        documents=tuple(documents),
        num_tokens=kept,
        num_generated_tokens=generated,
        num_prompt_tokens=read,
    )


def _continue(
    model: Any, tokenizer: Any, rows: Sequence[list[int]], block_size: int
) -> Iterator[list[int]]:
    """What the model writes after each row, up to and with its end-of-sequence token."""
    # Any token will do, as it is masked. One that ends no row, where some versions of transformers
    # would take it for padding on the right.
    pad = next(token for token in itertools.count() if all(row[-1] != token for row in rows))
    ends = set(model.generation_config.eos_token_id)
    length = max(len(row) for row in rows)
    # On the left, so that each row goes on from its last token.
    padded = [[pad] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    device = next(model.parameters()).device
    output = model.generate(
        torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=block_size - length,
        pad_token_id=pad,
    )
    for ids in output[:, length:].tolist():
        end = next((at for at, token in enumerate(ids) if token in ends), len(ids))
        yield ids[: end + 1]


@contextmanager
def _sampling(model: Any, tokenizer: Any, temperature: float) -> Iterator[None]:
    """Give the model a generation config of ours; one given to `generate` is merged with its own.

    Top-k and top-p are switched off in so many words, as transformers has defaults for them.
    """
    from transformers import GenerationConfig

    before = model.generation_config
    own = getattr(before, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])} - {None}
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=float(temperature),
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(ends),
    )
    try:
        yield
    finally:
        model.generation_config = before


def _start(tokenizer: Any) -> list[int]:
    """What stands before a document's first token: what the tokenizer puts there, or else eos."""
    text = "a"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return list(whole[:at]) or [tokenizer.eos_token_id]


def _prompt_tokens(
    prompts: Sequence[str], tokenizer: Any, start: list[int], block_size: int
) -> list[list[int]]:
    rows = []
    for prompt in prompts:
        # Without special tokens, as some tokenizers end a text with one.
        rows.append([*start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        if not prompt.strip() or len(rows[-1]) >= block_size:
            raise ValueError(
                f"prompt {prompt!r} takes {len(rows[-1])} tokens: give prompts that are not blank "
                f"and leave room in a block of block_size={block_size}"
            )
    return rows


def _shuffled_for_ever(rows: list[list[int]], draw: random.Random) -> Iterator[list[int]]:
    while rows:
        yield from draw.sample(rows, len(rows))


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _check_sampling(share_name: str, share: float, temperature: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{share_name}={share!r}: give a share in [0, 1]")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature!r}: above 0")


def _check_model(model: Any, tokenizer: Any, block_size: int) -> None:
    if getattr(model, "generation_config", None) is None:
        raise ValueError(
            f"model={type(model).__name__} cannot generate: give a causal language model of "
            "transformers"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token to end documents with: set "
            "tokenizer.eos_token"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if block_size < 2:
        raise ValueError(
            f"block_size={block_size}: at least 2, what a document begins with and more"
        )
    if positions is not None and block_size > positions:
        raise ValueError(f"block_size={block_size}: the model has {positions} positions only")
