"""The profile's heatmap: where each layer lies, its colour, and the files written."""

from __future__ import annotations

import math

import numpy as np
import pytest
from profiles import gpt2_layers, profile_of

from gradloc.measurement import ProfiledLayer
from gradloc.profile import GradientProfile
from gradloc.profile_layout import OUTSIDE, sections_of

SMALL = GradientProfile.from_norms(
    {"new": {"a": 2.0, "b": 1.0, "c": 0.0}}, {"a": 1.0, "b": 1.0, "c": 0.0}
)


def t5_layers(blocks):
    parts = {
        "encoder.block": ("layer.0.SelfAttention", "layer.1.DenseReluDense"),
        "decoder.block": (
            "layer.0.SelfAttention",
            "layer.1.EncDecAttention",
            "layer.2.DenseReluDense",
        ),
    }
    inside = [
        ProfiledLayer(
            f"{stack}.{block}.{part}", "attention" if "Att" in part else "mlp", stack, block
        )
        for stack, names in parts.items()
        for block in range(blocks)
        for part in names
    ]
    ends = [f"{stack}.final_layer_norm" for stack in ("encoder", "decoder")]
    return [
        ProfiledLayer("shared", "embedding"),
        *inside,
        *(ProfiledLayer(n, "norm") for n in ends),
    ]


def test_layout_groups_sublayers_and_keeps_the_rest():
    stack, outside = sections_of(gpt2_layers(3))
    assert (stack.stack, stack.rows) == ("transformer.h", ("0", "1", "2"))
    assert [group.title for group in stack.groups] == ["attention", "MLP"]
    assert stack.groups[1].layers[2] == "transformer.h.2.mlp"
    assert outside.rows == ("wte", "ln_f")
    assert outside.groups[0].title == OUTSIDE


def test_layout_of_two_stacks_and_of_none():
    encoder, decoder, outside = sections_of(t5_layers(2))
    assert [group.title for group in encoder.groups] == ["attention", "MLP"]
    assert [group.title for group in decoder.groups] == ["SelfAttention", "EncDecAttention", "MLP"]
    # Names whose last parts are equal are kept whole.
    assert outside.rows == ("shared", "encoder.final_layer_norm", "decoder.final_layer_norm")
    (only,) = sections_of([ProfiledLayer("net.0"), ProfiledLayer("net.1")])
    assert only.rows == ("net.0", "net.1")


def test_layout_of_blocks_that_differ():
    layers = [
        ProfiledLayer("m.0.mamba", "other", "m", 0),
        ProfiledLayer("m.1.self_attn", "attention", "m", 1),
        ProfiledLayer("m.1.mlp", "mlp", "m", 1),
    ]
    (section,) = sections_of(layers)
    assert [dict(group.layers) for group in section.groups] == [
        {0: "m.0.mamba"},
        {1: "m.1.self_attn"},
        {1: "m.1.mlp"},
    ]


def cells_of(figure):
    """Values of every heatmap of a figure, in drawing order."""
    from matplotlib.collections import QuadMesh

    found = []
    for axes in figure.axes:
        meshes = [item for item in axes.collections if isinstance(item, QuadMesh)]
        if meshes and axes.get_label() != "colour bar":
            found.append(np.asarray(meshes[0].get_array().filled(np.nan)).reshape(-1))
    return np.concatenate(found)


def test_colours_are_ratios_against_the_columns_mean():
    profile = profile_of(gpt2_layers(4), kinds=("new",), matched=False)
    figure = profile.plot()
    attention = [f"transformer.h.{block}.attn" for block in range(4)]
    mlp = [f"transformer.h.{block}.mlp" for block in range(4)]
    order = [*attention, *mlp, "transformer.wte", "transformer.ln_f"]
    expected = [math.log2(profile.relative[name] / profile.mean_relative) for name in order]
    np.testing.assert_allclose(cells_of(figure), expected, rtol=1e-12)
    # A dot for each chosen layer, and only for these.
    dots = sum(len(axes.lines) for axes in figure.axes)
    assert dots == len(profile.above_mean)
    words = [text.get_text() for text in figure.texts]
    assert f"● above the mean: {len(profile.above_mean)} of 10 layers" in words


@pytest.mark.parametrize("kinds", [1, 3, 5])
@pytest.mark.parametrize(
    "layers", [gpt2_layers(80), t5_layers(3), [ProfiledLayer("x"), ProfiledLayer("y")]], ids=len
)
def test_heatmap_has_a_cell_for_each_layer_and_column(layers, kinds):
    names = ("updated", "new", "unchanged", "outdated", "mean")[:kinds]
    figure = profile_of(layers, kinds=names).plot()
    columns = kinds + (kinds > 1)
    assert cells_of(figure).size == 2 * len(layers) * columns
    titles = [text.get_text() for text in figure.texts]
    assert "Reference: all tokens" in titles
    assert "Reference: matched spans" in titles
    width, height = figure.get_size_inches()
    assert width < 18
    assert height < 14
    for axes in figure.axes:
        box = axes.get_position()
        assert 0 <= box.x0 < box.x1 <= 1
        assert 0 <= box.y0 < box.y1 <= 1


def test_a_ratio_of_zero_has_the_lowest_colour():
    figure = SMALL.plot()
    assert np.isfinite(cells_of(figure)).all()


@pytest.mark.parametrize(
    ("name", "magic"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml"), ("p", b"\x89PNG")]
)
def test_plot_writes_whole_files(tmp_path, name, magic):
    SMALL.plot(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_plot_refuses_unknown_formats(tmp_path):
    with pytest.raises(ValueError, match=r"p\.doc.*choose a suffix of .*png"):
        SMALL.plot(tmp_path / "p.doc")
    assert not list(tmp_path.iterdir())


def test_plot_leaves_pyplot_alone():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    SMALL.plot()
    assert plt.get_fignums() == before
