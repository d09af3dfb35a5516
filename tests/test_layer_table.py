"""print(layers): a short table whose numbers add up, however many blocks there are."""

from __future__ import annotations

import re

import pytest
from architectures import TinyModel
from torch import nn

from gradloc.layers import LayerMap


def test_table_of_80_blocks_is_short_and_adds_up():
    model = TinyModel(tied=False, depth=80)
    model.blocks[7].down = nn.Linear(8, 4, bias=True)  # one block is unlike the others
    layers = LayerMap.from_model(model)
    lines = str(layers).splitlines()
    assert len(lines) < 16
    rows = [re.split(r" {2,}", line.strip()) for line in lines[2:-2]]
    assert ["blocks.{0–79}.attn", "attention", "80"] == rows[2][:3]
    assert ["blocks.{0–6, 8–79}.mlp", "mlp", "79"] in [row[:3] for row in rows]
    assert ["blocks.7.mlp", "mlp", "1"] in [row[:3] for row in rows]
    assert sum(int(row[2]) for row in rows) == len(layers) == 244
    assert sum(float(row[-1].removesuffix(" %")) for row in rows) == pytest.approx(100, abs=0.5)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert lines[-1] == f"244 layers (granularity submodule), 886 tensors, {total:,} parameters"
    assert len({len(line) for line in lines[1:2] + lines[2:-2]}) == 1  # aligned
    assert repr(layers) == f"LayerMap(244 layers, granularity='submodule', {total:,} parameters)"


@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_table_collapses_other_granularities_too(granularity):
    layers = LayerMap.from_model(TinyModel(depth=12), granularity=granularity)
    text = str(layers)
    assert "blocks.{0–11}" in text
    assert len(text.splitlines()) == {"block": 8, "tensor": 19}[granularity]


def test_table_of_alternating_blocks_names_the_stride():
    model = TinyModel(depth=8)
    for block in model.blocks[::2]:
        block.up = nn.Linear(4, 8, bias=True)
    text = str(LayerMap.from_model(model))
    assert "blocks.{0, 2, …, 6}.mlp" in text
    assert "blocks.{1, 3, …, 7}.mlp" in text
