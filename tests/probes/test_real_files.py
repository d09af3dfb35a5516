"""The real probe files: the labelled tokens of every probe say its span."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gradloc.probes import (
    by_kind,
    definitions,
    encode_probe,
    read_ecbd,
    read_probes,
    read_templama,
    templama_dates,
)

DATA = Path(os.environ.get("GRADLOC_DATA", Path(__file__).parents[2].parent / "shared" / "data"))

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (DATA / "templama").is_dir(),
        reason="the real data is not beside the repository; set GRADLOC_DATA to its folder",
    ),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    model.train([str(DATA / "wikitext2" / "valid.txt")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def test_dynamic_templama(tokenizer: Any) -> None:
    path = DATA / "templama" / "dynamic_templama_p54.jsonl"
    probes = read_templama(path, "2019-Q2", "2022-Q2", include_outdated=True)
    counts = Counter(probe.kind for probe in probes)
    assert counts == {"unchanged": 327, "updated": 103, "outdated": 103, "new": 41}
    messi = [p for p in probes if p.query == "Lionel Messi plays for _X_."]
    assert [(p.kind, p.span_texts[0]) for p in messi] == [
        ("updated", "Paris Saint-Germain F.C."),
        ("outdated", "FC Barcelona"),
    ]
    says_its_span(probes, tokenizer)


def test_templama(tokenizer: Any) -> None:
    path = DATA / "templama" / "templama_p54.jsonl"
    assert templama_dates(path) == [str(year) for year in range(2010, 2021)]
    probes = read_probes(path, dates=("2010", "2020"))
    assert Counter(probe.kind for probe in probes) == {"updated": 22, "unchanged": 5, "new": 2}
    says_its_span(probes, tokenizer)


def test_ecbd(tokenizer: Any) -> None:
    new = read_probes(DATA / "ecbd" / "ecbd_2020_2021_np.jsonl")
    popular = read_ecbd(DATA / "ecbd" / "ecbd_popular.jsonl", "popular")
    sizes = {kind: len(group) for kind, group in by_kind(new + popular).items()}
    assert sizes == {"new": 500, "popular": 40}
    says_its_span(new + popular, tokenizer)
    assert new[0].span_texts == ("its official YouTube page",)


def test_definitions() -> None:
    found = definitions(DATA / "ecbd" / "ecbd_2020_2021_np.jsonl")
    assert found[0] == (
        "The Not Fucking Around Coalition (NFAC) is a black nationalist militia group in the "
        "United States."
    )
    assert 140 <= len(found) <= 170
    for text in found:
        assert "extra_id" not in text
        assert "  " not in text
        assert "( " not in text
        assert "()" not in text
        assert " ." not in text.replace(" .NET", ""), text


def says_its_span(probes: list[Any], tokenizer: Any) -> None:
    wrong = []
    for probe in probes:
        labels = encode_probe(probe, tokenizer, 512)["labels"]
        said = tokenizer.decode([label for label in labels if label != -100]).strip()
        if said != probe.span_texts[0]:
            wrong.append((probe.source, probe.span_texts[0], said))
    assert not wrong, wrong[:5]
