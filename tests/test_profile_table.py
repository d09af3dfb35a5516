"""The profile's table: every number, bars in proportion, and lines that fit the terminal."""

from __future__ import annotations

import re

import pytest
from profiles import SMALL, gpt2_layers, profile_of

from gradloc.measurement import ProfiledLayer
from gradloc.profile import GradientProfile


def test_table_shows_every_number():
    text = SMALL.table()
    first, second = text.split("\n\nRelative gradient norm")
    assert "reference loss on all tokens" in first
    assert "random spans" in second
    rows = {line.split()[0]: line for line in first.splitlines() if line.strip()}
    numbers = re.findall(r"\d+\.\d+", rows["a"])
    assert numbers == ["3.00", "1.00", "2.00", f"{SMALL.relative_standard_errors['a']:.2f}"]
    # No error is shown where it is not known.
    assert "±" not in rows["b"]
    assert "●" in rows["a"]
    assert "●" not in rows["c"]
    assert re.findall(r"\d+\.\d+", rows["mean"]) == ["1.67", "1.67", "1.67"]
    # Bars are as long as the ratios: b's is the longest, a's two thirds of it.
    bars = {name: rows[name].count("█") for name in "abc"}
    assert bars["b"] == 40
    assert abs(bars["a"] - 40 * 2 / 3) <= 1
    assert bars["c"] == 0
    assert "● above the mean: 2 of 3 layers" in first
    assert "4 tokens (2.0 a batch)" in first


@pytest.mark.parametrize("width", [60, 72, 100, 160])
@pytest.mark.parametrize("kinds", [1, 3, 5])
def test_table_fits_the_terminal(width, kinds):
    names = ("updated", "new", "unchanged", "a very long kind of probe", "popular")[:kinds]
    layers = [
        *gpt2_layers(80),
        ProfiledLayer("a.module.path.that.is.longer.than.any.sensible.one.last"),
    ]
    text = profile_of(layers, kinds=names, spread=5).table(width=width)
    table = [
        line for line in text.splitlines() if line.startswith(("transformer", "…", "layer", "─"))
    ]
    assert len(table) == 2 * (len(layers) + 2)
    assert max(map(len, table)) <= width, max(table, key=len)
    # Kinds without a column are counted.
    means = next(line for line in text.splitlines() if line.startswith("mean over"))
    columns = len(re.findall(r"\d+\.\d+", means)) - 1
    left_out = re.search(r"the mean has (\d+) more kinds", text)
    assert columns + (int(left_out[1]) if left_out else 0) == (kinds if kinds > 1 else 0)
    assert left_out is None or width < 160


def test_table_cuts_the_bar_of_an_outlier():
    ratios = {f"l{index}": 1.0 for index in range(9)} | {"far": 50.0}
    profile = GradientProfile.from_norms({"new": ratios}, dict.fromkeys(ratios, 1.0))
    rows = {line.split()[0]: line for line in profile.table().splitlines() if line.strip()}
    assert rows["far"].endswith("█▶")
    assert 12 <= rows["l0"].count("█") <= 14


def test_table_needs_room():
    with pytest.raises(ValueError, match="width=40"):
        SMALL.table(width=40)
