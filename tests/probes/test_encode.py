"""encode: the labelled tokens are the span's, with each sort of tokenizer, wherever it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from gradloc.probes import Probe, encode_probe, probe_batches

WORDS = (
    "Ada keeps the grey cat in Madrid near Ibrahimović's Åland house über 東京 Þórhildur "
    "snow-covered 1940 naïve Ελλάδα "
    "it"
).split()
PICTURES = ["🐈", "👩‍🚀", "🇫🇮"]
TRAINING = [" ".join(WORDS), " ".join(reversed(WORDS)), ". ".join(WORDS) + ", (a) b; c!"] * 4


def wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )


def byte_level(trim_offsets: bool, prefix: bool) -> PreTrainedTokenizerFast:
    """GPT-2's kind; with trim_offsets=False a token's leading space belongs to its offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    return wrap(tokenizer, eos_token="<eos>", pad_token="<eos>")


def word_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<eos>", "<unk>"]
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*TRAINING, " ".join(PICTURES)], trainer)
    return wrap(tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """T5's kind: "▁" for spaces, and an end token that the tokenizer adds by itself."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    alphabet = sorted(set("".join(TRAINING + PICTURES).replace(" ", "▁")))
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING + PICTURES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return wrap(tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a beginning token, "▁" from the normalizer, bytes for rare characters."""
    special = ["<s>", "</s>", "<unk>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(set("".join(WORDS).replace("ć", "").replace("東", "")) | set("▁.,();!-ab"))
    merges = [("▁", "a"), ("▁", "c"), ("▁c", "a"), ("▁ca", "t"), ("i", "t"), ("▁", "it")]
    pieces += [left + right for left, right in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(dict.fromkeys(pieces))},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


MAKERS = {
    "byte-level": lambda: byte_level(trim_offsets=True, prefix=False),
    "byte-level-untrimmed": lambda: byte_level(trim_offsets=False, prefix=False),
    "byte-level-prefix": lambda: byte_level(trim_offsets=True, prefix=True),
    "word-level": word_level,
    "unigram": unigram,
    "byte-fallback": byte_fallback,
}
TOKENIZERS = {name: make() for name, make in MAKERS.items()}
each_tokenizer = pytest.mark.parametrize("name", list(TOKENIZERS))


def made(text: str, *spans: str) -> Probe:
    starts = [text.index(span) for span in spans]
    return Probe(
        text,
        tuple((at, at + len(span)) for at, span in zip(starts, spans, strict=True)),
        "new",
        "test:1",
    )


def squeezed(text: str) -> str:
    """Without spaces: a word-level tokenizer can't tell where they were."""
    return "".join(text.split())


def pieces(tokenizer: Any, encoded: dict[str, list[int]]) -> tuple[str, str]:
    """What the tokens before the first labelled one say, and what the labelled ones say."""
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert labels[0] == -100, "nothing predicts the first token"
    assert labels[-1] != -100, "tokens after the span are cut off"
    first = next(index for index, label in enumerate(labels) if label != -100)
    before = tokenizer.decode(ids[:first], skip_special_tokens=True)
    return before, tokenizer.decode([label for label in labels if label != -100])


@each_tokenizer
@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("the grey cat in Madrid", "grey cat"),
        ("the cat in Madrid", "Madrid"),
        ("Madrid, it keeps", "Madrid"),
        ("Ada keeps Ada.", "Ada"),
        ("the cat (Madrid), it", "Madrid"),
        ("near Åland; it", "Åland"),
        ("in Ελλάδα. it", "Ελλάδα"),
        ("in 東京, it", "東京"),
        ("the 🐈 keeps it", "🐈"),
        ("🐈 keeps it", "🐈"),
        ("it keeps the 👩‍🚀", "👩‍🚀"),
        ("near the Ibrahimović house, it", "Ibrahimović house"),
        ("  the  cat   keeps", "cat   keeps"),
        ("in 1940. it", "1940"),
    ],
)
def test_the_labels_say_the_span(name: str, text: str, span: str) -> None:
    tokenizer = TOKENIZERS[name]
    before, labelled = pieces(tokenizer, encode_probe(made(text, span), tokenizer, 64))
    if name == "word-level":
        assert squeezed(labelled) == squeezed(span)
        assert squeezed(before) == squeezed(text[: text.index(span)])
    else:
        assert labelled.strip() == span
        assert before.strip() == text[: text.index(span)].strip()


@each_tokenizer
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_texts_and_spans_at_word_boundaries(name: str, data: st.DataObject) -> None:
    # Pictures are no words to a regular expression: punctuation beside them is in their token.
    words = data.draw(st.lists(st.sampled_from(WORDS + PICTURES), min_size=1, max_size=12))
    gaps = data.draw(
        st.lists(
            st.sampled_from([" ", "  ", ", ", ". ", " (", ") ", "; "]), min_size=12, max_size=12
        )
    )
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    text, spans = "", []
    for word, gap in zip(words, gaps, strict=False):
        spans.append((len(text), len(text) + len(word)))
        text += word + (" " if word in PICTURES else gap)
        if gap == " (" and word not in PICTURES:
            text += "it, "
    start, end = spans[first][0], spans[last][1]
    tokenizer = TOKENIZERS[name]
    encoded = encode_probe(Probe(text, ((start, end),), "new", "test:1"), tokenizer, 512)
    before, labelled = pieces(tokenizer, encoded)
    assert squeezed(labelled) == squeezed(text[start:end])
    assert squeezed(before) == squeezed(text[:start])


def test_a_character_of_several_tokens_is_labelled_whole() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    labels = encode_probe(made("the 🐈", "🐈"), tokenizer, 64)["labels"]
    assert sum(label != -100 for label in labels) >= 4


@pytest.mark.parametrize("name", ["byte-level", "byte-level-untrimmed", "byte-fallback"])
def test_one_of_two_characters_that_share_no_token(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    before, labelled = pieces(tokenizer, encode_probe(made("in 中国 it", "国"), tokenizer, 64))
    assert (before.strip(), labelled) == ("in 中", "国")


@each_tokenizer
def test_spaces_around_a_span_change_nothing(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    text = "the cat  in   Madrid it"
    exact = Probe(text, ((4, 11),), "new", "test:1")
    wide = Probe(text, ((3, 14),), "new", "test:1")
    assert encode_probe(wide, tokenizer, 64) == encode_probe(exact, tokenizer, 64)


def test_several_spans() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    probe = made("the grey cat in Madrid, near it", "cat", "Madrid")
    encoded = encode_probe(probe, tokenizer, 64)
    labelled = [label for label in encoded["labels"] if label != -100]
    assert tokenizer.decode(labelled) == " cat Madrid"
    assert tokenizer.decode(encoded["input_ids"]) == "the grey cat in Madrid"


def test_a_straddling_token_counts_and_a_neighbouring_one_does_not() -> None:
    tokenizer = TOKENIZERS["word-level"]
    probe = Probe("the 東京 house", ((5, 6),), "new", "test:1")
    assert tokenizer.decode(encode_probe(probe, tokenizer, 64)["labels"][-1]) == "東京"
    spaced = Probe("the cat house", ((3, 8),), "new", "test:1")
    labels = encode_probe(spaced, TOKENIZERS["byte-level-untrimmed"], 64)["labels"]
    decoded = TOKENIZERS["byte-level-untrimmed"].decode([one for one in labels if one != -100])
    assert decoded == " cat", "a token that shares only its leading space with the span"


def test_the_tokenizers_own_special_tokens() -> None:
    llama, t5 = TOKENIZERS["byte-fallback"], TOKENIZERS["unigram"]
    probe = made("it keeps the cat", "cat")
    assert encode_probe(probe, llama, 64)["input_ids"].count(llama.bos_token_id) == 1
    assert t5.eos_token_id not in encode_probe(probe, t5, 64)["input_ids"]
    at_start = made("cat keeps it", "cat")
    assert encode_probe(at_start, llama, 64)["input_ids"].count(llama.bos_token_id) == 1
    assert encode_probe(at_start, t5, 64)["input_ids"][0] == t5.eos_token_id
    gpt2 = TOKENIZERS["byte-level"]
    assert encode_probe(at_start, gpt2, 64)["input_ids"][0] == gpt2.eos_token_id
    assert gpt2.eos_token_id not in encode_probe(probe, gpt2, 64)["input_ids"]


def test_bos_is_preferred_to_eos_and_neither_is_an_error() -> None:
    backend = TOKENIZERS["word-level"].backend_tokenizer
    probe = made("cat keeps it", "cat")
    both = wrap(backend, bos_token="<pad>", eos_token="<eos>")
    assert encode_probe(probe, both, 64)["input_ids"][0] == both.bos_token_id
    neither = wrap(backend, pad_token="<pad>")
    with pytest.raises(ValueError, match=r"test:1.*neither bos_token nor eos_token"):
        encode_probe(probe, neither, 64)
    assert encode_probe(made("the cat", "cat"), neither, 64)["labels"][0] == -100


@each_tokenizer
def test_truncation_takes_the_beginning_and_keeps_the_span(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    probe = made("the grey cat in Madrid near the house keeps Ada there", "Ada")
    full = encode_probe(probe, tokenizer, 512)
    span_length = sum(label != -100 for label in full["labels"])
    num_special = int(name == "byte-fallback")
    for max_length in range(span_length + 1, len(full["input_ids"]) + 2):
        cut = encode_probe(probe, tokenizer, max_length)
        kept = min(max_length, len(full["input_ids"])) - num_special
        for field in ("input_ids", "labels"):
            assert cut[field] == full[field][:num_special] + full[field][-kept:], max_length
        assert len(cut["input_ids"]) == min(max_length, len(full["input_ids"]))
    with pytest.raises(ValueError, match=rf"test:1: max_length={max(2, span_length)}") as caught:
        encode_probe(made("the Ada Ada Ada", "Ada Ada Ada"), tokenizer, max(2, span_length))
    needed = int(str(caught.value).split("max_length >= ")[1].split()[0])
    longest = encode_probe(made("the Ada Ada Ada", "Ada Ada Ada"), tokenizer, needed)
    assert len(longest["input_ids"]) == needed


def test_other_errors_say_what_to_do() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    probe = made("the cat", "cat")
    with pytest.raises(ValueError, match="max_length=1: must be at least 2"):
        encode_probe(probe, tokenizer, 1)
    with pytest.raises(ValueError, match="batch_size=0"):
        probe_batches([probe], tokenizer, batch_size=0)

    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ValueError, match="SlowTokenizer is not a fast tokenizer"):
        probe_batches([probe], SlowTokenizer())  # type: ignore[arg-type]
    dropping = Tokenizer(models.WordLevel({"the": 0, "<unk>": 1}, unk_token="<unk>"))
    dropping.normalizer = normalizers.Replace("cat", "")
    dropping.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"test:1: no token covers the span 'cat' at \[4, 7\]"):
        encode_probe(made("the cat the", "cat"), wrap(dropping, unk_token="<unk>"), 8)


def test_batches_are_padded_on_the_right() -> None:
    tokenizer = TOKENIZERS["word-level"]
    texts = [("it keeps the cat", "cat"), ("Ada in Madrid", "in"), ("cat", "cat")]
    probes = [made(*one) for one in texts]
    batches = probe_batches(probes, tokenizer, batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 4), (1, 2)]
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    rows = [encode_probe(probe, tokenizer, 64) for probe in probes]
    short = rows[1]
    assert batches[0]["input_ids"][1].tolist() == [*short["input_ids"], 0, 0]
    assert batches[0]["labels"][1].tolist() == [*short["labels"], -100, -100]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batches[0]["input_ids"][0].tolist() == rows[0]["input_ids"]
    assert probe_batches([], tokenizer) == []
    without_pad = wrap(tokenizer.backend_tokenizer, eos_token="<eos>")
    padded = probe_batches(probes, without_pad, batch_size=3)[0]["input_ids"]
    assert padded[1].tolist() == [*short["input_ids"], 1, 1]


def sizes(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [len(batch["labels"]) for batch in batches]


@pytest.mark.parametrize(
    ("count", "whole", "expected"),
    [
        (41, True, [8] * 5),
        (41, False, [8] * 5 + [1]),
        (40, True, [8] * 5),
        (9, True, [8]),
        (3, True, [3]),
        (0, True, []),
    ],
)
def test_an_incomplete_last_batch_can_be_left_out(
    count: int, whole: bool, expected: list[int]
) -> None:
    tokenizer = TOKENIZERS["word-level"]
    probes = [made("the cat", "cat")] * (count - 1) + [made("the house", "house")] * (count > 0)
    batches = probe_batches(probes, tokenizer, batch_size=8, whole_batches=whole)
    assert sizes(batches) == expected
    every = probe_batches(probes, tokenizer, batch_size=8)
    for left, right in zip(batches, every, strict=False):
        assert torch.equal(left["input_ids"], right["input_ids"])
