"""Batches that trace_gradients refuses: the message says which, the model is never called."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradloc.trace import trace_gradients


class Bigram(nn.Module):
    """The smallest causal language model: each token predicts the next by a table."""

    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 9)
        self.num_calls = 0

    def forward(self, input_ids, labels):
        self.num_calls += 1
        logits = self.table(input_ids[:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


def batch(seed, rows=2):
    ids = torch.randint(9, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


GOOD = [batch(0), batch(1)]


def unlabelled(batch):
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def only_first(batch):
    labels = torch.full_like(batch["labels"], -100)
    labels[:, 0] = 3
    return {**batch, "labels": labels}


@pytest.mark.parametrize(
    ("probes", "reference", "message"),
    [
        ([], GOOD, "no batches in the 'probe' probes"),
        ({"new": GOOD, "old": []}, GOOD, "no batches in the 'old' probes"),
        (GOOD, [], "no batches in the reference"),
        ({}, GOOD, "probes is empty"),
        ({"reference": GOOD}, GOOD, "kind='reference'"),
        (GOOD[0], GOOD, "probes is a single batch"),
        (GOOD, GOOD[0], "reference is a single batch"),
        (GOOD, {"new": GOOD}, "reference is a dict"),
        (
            {"new": [GOOD[0], {"input_ids": GOOD[0]["input_ids"]}]},
            GOOD,
            "batch 1 of the 'new' probes has no labels",
        ),
        ([GOOD[0]["input_ids"]], GOOD, "batch 0 .* has no labels .*Tensor"),
        (
            {"new": [GOOD[0], unlabelled(GOOD[1])]},
            GOOD,
            "batch 1 of the 'new' probes has no labelled",
        ),
        (GOOD, [GOOD[0], only_first(GOOD[1])], "batch 1 of the reference .*position 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_batches(probes, reference, message):
    model = Bigram()
    model.table.weight.grad = grad = torch.ones(9, 9)
    with pytest.raises(ValueError, match=message):
        trace_gradients(model, probes, reference, progress=False)
    assert model.num_calls == 0
    assert model.training
    assert model.table.weight.grad is grad
    assert torch.equal(grad, torch.ones(9, 9))


def test_generators_are_read_once_for_all_passes():
    model = Bigram()
    read = []

    def reference():
        for item in GOOD:
            read.append(1)
            yield item

    probes = {"new": iter(GOOD), "old": iter(GOOD[:1])}
    both = ("all", "matched-spans")
    profile = trace_gradients(model, probes, reference(), reference_loss=both, progress=False)
    assert len(read) == 2
    # 3 batches of probes, 2 of the reference, and 2 for each of the two kinds.
    assert model.num_calls == 3 + 2 + 4
    assert profile.kinds == ("new", "old")


@pytest.mark.parametrize(
    ("probe", "reference", "what"),
    [((2,), (2, 6), "the 'probe' probes"), ((2, 6), (2,), "the reference")],
    ids=["probe", "reference"],
)
def test_matched_spans_need_positions(probe, reference, what):
    sets = [[{**batch(0), "labels": torch.ones(shape).long()}] for shape in (probe, reference)]
    with pytest.raises(
        ValueError, match=rf"\[batch, length\].*batch 0 of {what} have shape \(2,\)"
    ):
        trace_gradients(Bigram(), *sets, reference_loss="matched-spans", progress=False)


@pytest.mark.parametrize("loss", ["some", [], ["all", "all"], ["all", "some"]], ids=str)
def test_unknown_reference_loss(loss):
    with pytest.raises(ValueError, match="reference_loss="):
        trace_gradients(Bigram(), GOOD, GOOD, reference_loss=loss, progress=False)


def test_one_batch_has_no_standard_error():
    profile = trace_gradients(Bigram(), GOOD[:1], GOOD, progress=False)
    assert math.isnan(profile.standard_errors["probe"]["table"])
    assert profile.standard_errors["reference"]["table"] > 0


def test_progress_counts_every_batch(capsys):
    arguments = (Bigram(), {"new": GOOD}, [*GOOD, batch(2)])
    trace_gradients(*arguments, reference_loss=["all", "matched-spans"])
    assert "8/8" in capsys.readouterr().err
    trace_gradients(*arguments, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("probes", "reference", "shown"),
    [
        (
            {"new": [*GOOD, batch(2, rows=1)], "old": GOOD},
            GOOD,
            "the 'new' probes: 1, 2; the 'old'",
        ),
        ({"new": GOOD, "old": [batch(2, rows=3)]}, GOOD, "'old' probes: 3; the reference: 2"),
        (GOOD, [batch(2, rows=4)], "the 'probe' probes: 2; the reference: 4"),
        (GOOD, [*GOOD, batch(2, rows=1)], "the reference: 1, 2"),
    ],
    ids=["tail", "kinds", "reference", "tail of the reference"],
)
def test_unequal_batches_are_warned_of_once(probes, reference, shown):
    both = ("all", "matched-spans")
    with pytest.warns(UserWarning, match="number of sequences") as caught:
        trace_gradients(Bigram(), probes, reference, reference_loss=both, progress=False)
    assert len(caught) == 1
    assert shown in str(caught[0].message)
    assert "whole_batches=True" in str(caught[0].message)
    assert caught[0].filename == __file__, "should point at the call"


def test_equal_batches_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace_gradients(Bigram(), {"new": GOOD, "old": GOOD[:1]}, GOOD, progress=False)
