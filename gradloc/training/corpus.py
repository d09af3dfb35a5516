"""Training text, tokenised and packed into blocks without losing a token.

Reads through Hugging Face datasets, so that a corpus larger than memory works. Knows nothing of
probes, models or the training itself.

Documents (see `gradloc.training.documents`) follow one another in the order given, each ended by
the tokenizer's end-of-sequence token, and the stream of tokens is cut into blocks of equal size.
Only what remains after the last whole block is dropped.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkstemp
from typing import Any

import torch

from gradloc.training.documents import DOCUMENT_UNITS, Paths, checked_files, read_documents

_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class PackedCorpus:
    """A packed corpus, and how it came about.

    Args:
        dataset: `datasets.Dataset` with columns `input_ids` and `labels`, each [block_size] int32 a
            row; they are equal.
        num_documents: documents that were not blank.
        num_tokens: tokens in the blocks, end-of-sequence tokens included.
        num_dropped_tokens: tokens after the last whole block, fewer than a block.
    """

    dataset: Any
    num_documents: int
    num_tokens: int
    num_dropped_tokens: int


def packed_corpus(
    paths: Paths,
    tokenizer: Any,
    *,
    block_size: int,
    text_field: str = "text",
    documents: str = "line",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """The dataset of `pack_corpus`, for those who don't need the counts."""
    return pack_corpus(
        paths,
        tokenizer,
        block_size=block_size,
        text_field=text_field,
        documents=documents,
        cache_dir=cache_dir,
    ).dataset


def pack_corpus(
    paths: Paths,
    tokenizer: Any,
    *,
    block_size: int,
    text_field: str = "text",
    documents: str = "line",
    cache_dir: str | os.PathLike[str] | None = None,
) -> PackedCorpus:
    """Tokenise files and pack them into blocks.

    Args:
        paths: one file or several: .txt, .jsonl, .json or .parquet, in this order.
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        block_size: tokens a block.
        text_field: the field of a JSON or parquet row that holds the text.
        documents: what a document of a .txt file is: "line", "paragraph" or "file".
        cache_dir: where the Arrow files go. None, the default, is a temporary folder that goes away
            with the dataset, so that nothing is reused by mistake and nothing is left behind.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is empty, malformed (with its line), of an unknown kind, lacks
            `text_field`, or all the text makes less than one block.
    """
    files = checked_files(paths)
    _check_options(tokenizer, block_size, documents)
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    with ExitStack() as stack:
        if cache_dir is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="gradloc-corpus-")))
        else:
            folder = Path(cache_dir)
            folder.mkdir(parents=True, exist_ok=True)
        handle, target = mkstemp(prefix="packed-", suffix=".arrow", dir=folder)
        os.close(handle)
        count = _Count()
        num_blocks = 0
        writer = ArrowWriter(features=_features(block_size), path=target)
        try:
            stream = _token_lists(files, tokenizer, text_field, documents, folder, count)
            for blocks in _batched(_blocks(stream, block_size, count), _ROWS_AT_ONCE):
                writer.write_batch({"input_ids": blocks, "labels": blocks})
                num_blocks += len(blocks)
        finally:
            writer.finalize()
        _check_enough(num_blocks, _named(files), block_size, count)
        dataset = Dataset.from_file(target)
        # The files stay mapped into memory for as long as the dataset lives, and go with it.
        weakref.finalize(dataset, stack.pop_all().close)
    return PackedCorpus(dataset, count.documents, num_blocks * block_size, count.dropped)


def pack_documents(documents: Iterable[str], tokenizer: Any, *, block_size: int) -> Any:
    """Pack documents that are in memory, as `pack_corpus` packs those of files.

    Args:
        documents: texts, in this order; blank ones are left out.
        tokenizer: as in `pack_corpus`.
        block_size: tokens a block.

    Returns:
        A `datasets.Dataset` in memory, with the columns of `PackedCorpus.dataset`.

    Raises:
        TypeError: `documents` is one text.
        ValueError: all the text makes less than one block.
    """
    _check_options(tokenizer, block_size, "line")
    if isinstance(documents, str):
        raise TypeError("documents is one text: give a list of them, such as [text]")
    from datasets import Dataset

    count = _Count()
    texts = (text for text in documents if text.strip())
    blocks = list(_blocks(document_tokens(texts, tokenizer), block_size, count))
    _check_enough(len(blocks), "the text of the documents", block_size, count)
    return Dataset.from_dict(
        {"input_ids": blocks, "labels": blocks}, features=_features(block_size)
    )


def document_tokens(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """The tokens of each document: what the tokenizer gives by default, and eos at the end."""
    eos = tokenizer.eos_token_id
    for batch in _batched(texts, _ROWS_AT_ONCE):
        # verbose=False: a document may be longer than the model's context, it is cut into blocks
        # afterwards.
        for ids in tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]:
            yield ids if ids and ids[-1] == eos else [*ids, eos]


def text_batches(
    path: Paths,
    tokenizer: Any,
    *,
    block_size: int,
    batch_size: int,
    max_batches: int | None = None,
    text_field: str = "text",
    documents: str = "line",
) -> list[dict[str, torch.Tensor]]:
    """Packed text as batches for tracing and evaluation, with the loss on every token.

    Args:
        path: as `paths` of `pack_corpus`.
        tokenizer: as there.
        block_size: tokens a sequence.
        batch_size: sequences a batch; the last batch may have fewer.
        max_batches: how many batches to read from the start; None is all. What comes after is not
            tokenised.
        text_field: as in `pack_corpus`.
        documents: as in `pack_corpus`.

    Returns:
        dicts of `input_ids`, `attention_mask` and `labels`, each int64 [sequences, block_size].

    Raises:
        FileNotFoundError, ValueError: as `pack_corpus`.
    """
    files = checked_files(path)
    _check_options(tokenizer, block_size, documents)
    if batch_size < 1 or (max_batches is not None and max_batches < 1):
        raise ValueError(f"batch_size={batch_size}, max_batches={max_batches}: both are at least 1")
    count = _Count()
    with TemporaryDirectory(prefix="gradloc-text-") as folder:
        stream = _token_lists(files, tokenizer, text_field, documents, Path(folder), count)
        batches = []
        for blocks in itertools.islice(
            _batched(_blocks(stream, block_size, count), batch_size), max_batches
        ):
            ids = torch.tensor(blocks, dtype=torch.int64)
            batches.append(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
            )
        stream.close()
    _check_enough(len(batches), _named(files), block_size, count)
    return batches


@dataclass
class _Count:
    documents: int = 0
    dropped: int = 0


def _check_options(tokenizer: Any, block_size: int, documents: str) -> None:
    if block_size < 2:
        raise ValueError(
            f"block_size={block_size}: at least 2, as the first token of a block is not predicted"
        )
    if documents not in DOCUMENT_UNITS:
        raise ValueError(f"documents={documents!r}: one of {', '.join(DOCUMENT_UNITS)}")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token to end documents with: set "
            "tokenizer.eos_token"
        )


def _token_lists(
    files: Iterable[Path],
    tokenizer: Any,
    text_field: str,
    documents: str,
    folder: Path,
    count: _Count,
) -> Generator[list[int], None, None]:
    for file in files:
        before = count.documents
        for ids in document_tokens(read_documents(file, text_field, documents, folder), tokenizer):
            count.documents += 1
            yield ids
        if count.documents == before:
            raise ValueError(
                f"corpus file {str(file)!r} holds no text: every document in it is blank"
            )


def _blocks(documents: Iterable[list[int]], block_size: int, count: _Count) -> Iterator[list[int]]:
    rest: list[int] = []
    for ids in documents:
        rest.extend(ids)
        whole = len(rest) // block_size * block_size
        yield from (rest[start : start + block_size] for start in range(0, whole, block_size))
        rest = rest[whole:]
    count.dropped = len(rest)


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _features(block_size: int) -> Any:
    from datasets import Features, Value
    from datasets import Sequence as SequenceOf

    row = SequenceOf(Value("int32"), length=block_size)
    return Features({"input_ids": row, "labels": row})


def _named(files: list[Path]) -> str:
    one = len(files) == 1
    return f"text file {str(files[0])!r}" if one else f"the text of {len(files)} files"


def _check_enough(num_blocks: int, shown: str, block_size: int, count: _Count) -> None:
    if num_blocks == 0:
        raise ValueError(
            f"{shown} makes {count.dropped} tokens, fewer than one block of "
            f"block_size={block_size}: "
            "give more text or a smaller block size"
        )
