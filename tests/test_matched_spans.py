"""Random spans: how long, where, and how often each length is dealt."""

from __future__ import annotations

from collections import Counter

import torch

from gradloc.matched_spans import SpanDealer, span_lengths


def test_dealt_spans_are_contiguous_labelled_and_never_first():
    labels = torch.arange(20).repeat(300, 1)
    labels[:, 9:12] = -100  # padding, or a masked part, in the middle
    labels[::3, 15:] = -100
    lengths = [1, 2, 2, 5]
    kept = SpanDealer(lengths, seed=1, kind="new").labels(labels)
    found = Counter()
    starts = set()
    for row, original in zip(kept, labels, strict=True):
        places = (row != -100).nonzero().flatten().tolist()
        assert places == list(range(places[0], places[-1] + 1))
        assert places[0] > 0
        assert torch.equal(row[places], original[places])
        assert (original[places] != -100).all()
        found[len(places)] += 1
        starts.add(places[0])
    assert found == {1: 75, 2: 150, 5: 75}
    assert starts == set(range(1, 9)) | set(range(12, 20))
    again = SpanDealer(lengths, seed=1, kind="new").labels(labels)
    assert torch.equal(again, kept)
    assert not torch.equal(SpanDealer(lengths, seed=2, kind="new").labels(labels), kept)
    assert not torch.equal(SpanDealer(lengths, seed=1, kind="old").labels(labels), kept)


def test_dealt_span_is_cut_where_the_text_is_shorter():
    labels = torch.full((2, 6), -100)
    labels[0, 0:4] = 7  # three of them have a loss
    kept = SpanDealer([5], seed=0, kind="new").labels(labels)
    assert kept.tolist() == [[-100, 7, 7, 7, -100, -100], [-100] * 6]


def test_span_lengths_leave_out_position_0_and_empty_rows():
    labels = torch.tensor([[1, 1, -100, 1], [-100] * 4, [1, -100, -100, -100]])
    assert span_lengths(labels, first=1) == [2]
    assert span_lengths(labels, first=0) == [3, 1]
