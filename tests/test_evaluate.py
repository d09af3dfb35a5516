import dataclasses
import json
import math

import pytest
import torch
from conftest import fact, make_gpt2, sentences

from gradloc.evaluate import (
    ProbeScore,
    TextScore,
    evaluate_probes,
    evaluate_text,
    probes_matched,
    save_scores,
)
from gradloc.files import read_json
from gradloc.probes import Probe, encode_probe, probe_batches


def probe(index, *, answers=(), kind="updated", shift=0):
    text, town = fact(index, shift)
    start = text.index(town)
    return Probe(
        text, ((start, start + len(town)),), kind=kind, source=f"here:{index}", answers=answers
    )


PROBES = [
    *(probe(index, kind="updated" if index % 3 else "new") for index in range(10)),
    Probe("Ulmo is a town, and so is Vestry.", ((0, 4), (26, 32)), kind="new", source="here"),
]


def by_hand(model, tokenizer, probes):
    """float64, one probe at a time: (nll of each token, whether each is the most probable)."""
    rows = []
    model.double().eval()
    for one in probes:
        encoded = encode_probe(one, tokenizer, 64)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0]
        nll, right = [], []
        for position, label in enumerate(encoded["labels"]):
            if label != -100:
                row = logits[position - 1]
                nll.append(float(row.logsumexp(0) - row[label]))
                right.append(int(row.argmax()) == label)
        rows.append((nll, right))
    return rows


def test_probes_against_float64(tokenizer):
    found = evaluate_probes(make_gpt2(tokenizer), tokenizer, PROBES, batch_size=3)
    assert list(found) == ["new", "updated"]
    for kind, score in found.items():
        members = [one for one in PROBES if one.kind == kind]
        rows = by_hand(make_gpt2(tokenizer), tokenizer, members)
        losses = [loss for nll, _ in rows for loss in nll]
        assert score.num_tokens == len(losses)
        assert score.num_probes == len(members)
        assert score.nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(score.nll))
        assert score.exact_match == sum(all(right) for _, right in rows) / len(rows)


@pytest.fixture(scope="module")
def knowing(tokenizer):
    """A model that knows the towns with shift 0, and nothing else."""
    model = make_gpt2(tokenizer)
    batch = probe_batches([probe(index) for index in range(10)], tokenizer, batch_size=10)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_exact_match_is_greedy_decoding(knowing, tokenizer):
    right = [probe(index, kind="right") for index in range(5)]
    wrong = [probe(index, kind="wrong", shift=3) for index in range(5)]
    mixed = [probe(0, kind="mixed"), probe(1, kind="mixed", shift=3)]
    scores = evaluate_probes(knowing, tokenizer, [*right, *wrong, *mixed], batch_size=4)
    assert scores["right"].exact_match == 1.0
    assert scores["wrong"].exact_match == 0.0
    assert scores["mixed"].exact_match == 0.5
    assert scores["right"].nll < 0.3 < 3 < scores["wrong"].nll
    for one in (*right, *wrong):
        encoded = encode_probe(one, tokenizer, 64)
        first = next(i for i, label in enumerate(encoded["labels"]) if label != -100)
        wanted = encoded["input_ids"][first:]
        written = knowing.generate(
            torch.tensor([encoded["input_ids"][:first]]),
            attention_mask=torch.ones(1, first, dtype=torch.int64),
            max_new_tokens=len(wanted),
            do_sample=False,
            pad_token_id=0,
        )[0, first:].tolist()
        assert (written == wanted) == (one.kind == "right")


def test_another_acceptable_answer_counts_and_the_nll_is_the_texts_own(knowing, tokenizer):
    """Five probes that state the wrong town; for three the right one is an answer too."""
    wrong = [probe(index, shift=3) for index in range(5)]
    known = [fact(index)[1] for index in range(5)]
    helped = [
        dataclasses.replace(one, answers=("Nowhere", known[number]) if number < 3 else ("Nowhere",))
        for number, one in enumerate(wrong)
    ]
    plain = evaluate_probes(knowing, tokenizer, wrong, batch_size=2)["updated"]
    score = evaluate_probes(knowing, tokenizer, helped, batch_size=2)["updated"]
    assert plain.exact_match == 0.0
    assert score.exact_match == pytest.approx(3 / 5)
    right = [True] * 3 + [False] * 2
    assert probes_matched(knowing, tokenizer, helped, batch_size=2) == right
    assert probes_matched(knowing, tokenizer, helped[::-1], batch_size=100) == right[::-1]
    assert score.num_probes == 5
    assert score.num_tokens == plain.num_tokens
    assert score.nll == pytest.approx(plain.nll, rel=1e-5)


def test_answers_of_a_probe_with_two_spans_are_left_aside(gpt2, tokenizer):
    two = dataclasses.replace(PROBES[-1], answers=("Mirek",))
    found = evaluate_probes(gpt2, tokenizer, [two])
    assert found["new"] == evaluate_probes(gpt2, tokenizer, [PROBES[-1]])["new"]


def batches_of(tokenizer):
    rows = [tokenizer(text)["input_ids"][:8] for text in sentences(6)]
    rows = [row + [0] * (8 - len(row)) for row in rows]
    ids = torch.tensor(rows)
    labels = ids.clone()
    labels[4:, 3:] = -100
    return [
        {"input_ids": ids[:4], "labels": labels[:4]},
        {"input_ids": ids[4:], "labels": labels[4:], "attention_mask": torch.ones(2, 8).long()},
    ]


def test_text_is_weighted_by_token(tokenizer):
    """Batches with unlike numbers of tokens: a mean of batch means would be wrong."""
    batches = batches_of(tokenizer)
    found = evaluate_text(make_gpt2(tokenizer), batches)
    model = make_gpt2(tokenizer).double()
    total = count = 0.0
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        wanted = batch["labels"][:, 1:]
        flat = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=-100
        )
        total += float(flat)
        count += int((wanted != -100).sum())
    assert found.num_tokens == count == 4 * 7 + 2 * 2
    assert found.nll == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_the_model_is_left_as_it_was(gpt2, tokenizer):
    gpt2.train()
    gpt2.transformer.h[0].eval()
    modes = {name: module.training for name, module in gpt2.named_modules()}
    state = torch.get_rng_state()
    evaluate_probes(gpt2, tokenizer, PROBES)
    evaluate_text(gpt2, batches_of(tokenizer))
    assert {name: module.training for name, module in gpt2.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state), "dropout was on"
    floats = {"input_ids": torch.zeros(1, 4), "labels": torch.zeros(1, 4).long()}
    with pytest.raises(RuntimeError):
        evaluate_text(gpt2, [floats])
    assert {name: module.training for name, module in gpt2.named_modules()} == modes
    (batch, _) = batches_of(tokenizer)
    gpt2(**batch).loss.backward()  # nothing of inference mode is left


def test_nothing_to_score(gpt2, tokenizer):
    with pytest.raises(ValueError, match="probes is empty"):
        evaluate_probes(gpt2, tokenizer, [])
    blank = {"input_ids": torch.zeros(1, 4).long(), "labels": torch.full((1, 4), -100)}
    with pytest.raises(ValueError, match="1 batches with no token to score"):
        evaluate_text(gpt2, [blank])
    with pytest.raises(ValueError, match="0 batches"):
        evaluate_text(gpt2, [])
    with pytest.raises(ValueError, match="max_length=2"):
        evaluate_probes(gpt2, tokenizer, PROBES, max_length=2)


def test_scores_as_a_file(tmp_path):
    probes = {"new": ProbeScore(math.inf, 800.0, 0.25, 4, 9)}
    save_scores(tmp_path / "s.json", probes, TextScore(2.0, math.log(2), 10), model="tiny")
    body = read_json(tmp_path / "s.json", schema="gradloc.scores", version=1)
    assert body["model"] == "tiny"
    assert body["probes"]["new"] == {
        "perplexity": None,
        "nll": 800.0,
        "exact_match": 0.25,
        "num_probes": 4,
        "num_tokens": 9,
    }
    assert body["text"]["nll"] == math.log(2)
    json.loads((tmp_path / "s.json").read_text(), parse_constant=lambda name: pytest.fail(name))
