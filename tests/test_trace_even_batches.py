"""even_batches: every batch to trace with holds equally many sequences, and notes say how."""

from __future__ import annotations

import pytest
import torch
from conftest import fact

from gradloc.probes import Probe, encode_probe
from gradloc.probes.encode import even_batches


def probe():
    text, town = fact(3)
    start = text.index(town)
    return Probe(text, ((start, start + len(town)),), "new", "test:1")


def sizes(batches):
    return [len(batch["labels"]) for batch in batches]


@pytest.mark.parametrize(
    ("counts", "num_reference", "batch_size", "kept", "notes"),
    [
        ({"new": 16, "old": 8}, 24, 8, ([8, 8], [8], [8, 8, 8]), []),
        (
            {"new": 41, "old": 16},
            19,
            8,
            ([8] * 5, [8, 8], [8, 8]),
            [
                "left out 1 of the 41 sequences of the 'new' probes: they fill no batch of 8",
                "left out 3 of the 19 sequences of the reference: they fill no batch of 8",
            ],
        ),
        (
            {"new": 10, "old": 3},
            6,
            8,
            ([3] * 3, [3], [3, 3]),
            [
                "sequences a batch: 3 and not 8, as there are no more in the 'old' probes",
                "left out 1 of the 10 sequences of the 'new' probes: they fill no batch of 3",
            ],
        ),
        (
            {"new": 8, "old": 5},
            2,
            8,
            ([2] * 4, [2, 2], [2]),
            [
                "sequences a batch: 2 and not 8, as there are no more in the reference",
                "left out 1 of the 5 sequences of the 'old' probes: they fill no batch of 2",
            ],
        ),
        # An empty kind is for the trace to refuse.
        ({"new": 8, "old": 0}, 8, 8, ([8], [], [8]), []),
    ],
    ids=["nothing", "tails", "few probes", "little text", "no probes"],
)
def test_even_batches(tokenizer, counts, num_reference, batch_size, kept, notes):
    probes = {kind: [probe()] * count for kind, count in counts.items()}

    def read_reference(size):
        rows = torch.arange(num_reference)[:, None].expand(-1, 4)
        return [{"input_ids": part, "labels": part} for part in rows.split(size)]

    batches, reference, said = even_batches(
        probes, read_reference, tokenizer, batch_size=batch_size
    )
    assert (*map(sizes, batches.values()), sizes(reference)) == kept
    assert tuple(batches) == tuple(counts)
    assert said == notes
    read = torch.cat([batch["labels"] for batch in reference])[:, 0].tolist()
    assert read == list(range(len(read))), "the reference's beginning"


def test_long_probes_are_cut(tokenizer):
    assert len(encode_probe(probe(), tokenizer, 64)["input_ids"]) > 8
    probes = {"new": [probe()]}
    reference = [{"labels": torch.zeros(1, 4, dtype=torch.int64)}]
    batches, *_ = even_batches(
        probes, lambda size: reference, tokenizer, batch_size=1, max_length=8
    )
    assert batches["new"][0]["input_ids"].shape == (1, 8)
