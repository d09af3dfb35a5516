"""GradientProfile: its arithmetic and its file."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pytest
from profiles import NAN, SMALL, gpt2_layers, measured, profile_of

from gradloc.layers import LayerMap
from gradloc.measurement import ProfiledLayer
from gradloc.profile import GradientProfile


def test_ratios_against_all_tokens():
    assert SMALL.names == ("a", "b", "c")
    assert SMALL.probe_norms["new"] == {"a": 2.0, "b": 4.0, "c": 0.0}
    assert SMALL.reference_norms == {"a": 2.0, "b": 1.0, "c": 0.0}
    assert SMALL.relative == {"a": 2.0, "b": 3.0, "c": 0.0}
    assert SMALL.relative_by_kind["updated"] == {"a": 3.0, "b": 2.0, "c": 0.0}
    assert SMALL.mean_relative == 5 / 3
    assert SMALL.above_mean == ("a", "b")
    error = SMALL.standard_errors
    assert error["reference"] == {"a": 0.1, "b": 0.1, "c": 0.0}
    assert math.isnan(error["new"]["b"])
    relative = SMALL.relative_standard_errors
    # The sum 8 of the probes has error √(0.3² + 0.4²) = 0.5.
    assert relative["a"] == pytest.approx(2.0 * math.sqrt((0.5 / 8) ** 2 + (0.1 / 2) ** 2))
    assert math.isnan(relative["b"])
    assert relative["c"] == 0


def test_ratios_against_matched_spans():
    matched = SMALL.with_reference("matched-spans")
    assert matched.reference_loss == "matched-spans"
    assert SMALL.reference_loss == "all"
    assert matched.reference_norms == {"a": 2.0, "b": 4.0, "c": 0.0}
    assert matched.relative == {"a": 2.0, "b": 0.75, "c": 0.0}
    assert matched.relative_by_kind["updated"] == {"a": 2.0, "b": 0.5, "c": 0.0}
    assert matched.relative_by_kind["new"] == {"a": 2.0, "b": 1.0, "c": 0.0}
    assert matched.standard_errors["reference"] == pytest.approx({"a": 0.3, "b": 0.3, "c": 0.0})
    one = matched.with_kinds(["new"])
    assert one.kinds == ("new",)
    assert one.reference_norms == {"a": 1.0, "b": 4.0, "c": 0.0}


def test_errors_by_monte_carlo():
    random = np.random.default_rng(0)
    draws = 200_000
    probe = (random.normal(6, 0.3, draws) + random.normal(2, 0.4, draws)) / 2
    spread = (probe / random.normal(2, 0.1, draws)).std()
    assert SMALL.relative_standard_errors["a"] == pytest.approx(spread, rel=0.02)


def test_unknown_reference_and_kinds():
    with pytest.raises(ValueError, match="reference_loss='some' was not measured"):
        SMALL.with_reference("some")
    for kinds in ([], ["old"], "new"):
        with pytest.raises(ValueError, match=r"choose one or more .*'updated', 'new'"):
            SMALL.with_kinds(kinds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "0 names"),
        ({"layers": (ProfiledLayer("a"),) * 3}, "3 names, 1 different"),
        ({"probes": {}}, "probes is empty"),
        ({"references": {}}, "references is empty"),
        ({"reference_loss": "some"}, "reference_loss='some'"),
        ({"references": {"some": SMALL.probes}}, "reference_loss='some'"),
        ({"references": {"all": {"new": SMALL.probes["new"]}}}, "has kinds"),
        ({"probes": {"updated": measured([1.0]), "new": measured([1.0])}}, "1 values for 3 layers"),
        (
            {"probes": dict.fromkeys(("updated", "new"), measured([1.0, -1.0, 0.0]))},
            "'b' has norm -1.0",
        ),
        (
            {"probes": dict.fromkeys(("updated", "new"), measured([NAN, 1.0, 0.0]))},
            "'a' has norm nan",
        ),
        (
            {"probes": dict.fromkeys(("updated", "new"), measured([1.0, 1.0, 1.0]))},
            "'c' get a gradient from the 'updated' probes and none",
        ),
    ],
    ids=str,
)
def test_parts_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        GradientProfile(**{**vars(SMALL), **change})


def test_a_kind_named_reference():
    with pytest.raises(ValueError, match="kind='reference'"):
        GradientProfile.from_norms({"reference": {"a": 1.0}}, {"a": 1.0})


def test_from_norms_checks_names():
    profile = GradientProfile.from_norms(
        {"new": {"b": 4.0, "a": 2.0}}, {"a": 1.0, "b": 1.0}, step=4
    )
    assert profile.relative == {"a": 2.0, "b": 4.0}
    assert profile.step == 4
    with pytest.raises(ValueError, match=r"probe_norms\['new'\] names 1 layers"):
        GradientProfile.from_norms({"new": {"a": 2.0}}, {"a": 1.0, "b": 1.0})


# The file.


@pytest.mark.parametrize(
    "profile",
    [
        SMALL,
        profile_of(gpt2_layers(3)),
        profile_of(gpt2_layers(1), matched=False),
        SMALL.with_reference("matched-spans"),
    ],
    ids=["nan", "both", "one", "matched"],
)
def test_file_round_trip(tmp_path, profile):
    path = tmp_path / "deep" / "profile.json"
    profile.save(path)
    assert GradientProfile.load(path) == profile
    assert [p.name for p in path.parent.iterdir()] == ["profile.json"]
    body = json.loads(path.read_text())
    assert (body["schema"], body["version"]) == ("gradloc.profile", 1)
    assert list(body["references"]["all"]) == ["shared"]
    assert "NaN" not in path.read_text()


def test_copies():
    profile = profile_of(gpt2_layers(2))
    assert copy.deepcopy(profile) == profile
    assert pickle.loads(pickle.dumps(profile)) == profile


def damaged(change):
    def apply(body):
        change(body)
        return json.dumps(body)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda body: json.dumps(body)[:200], "is not a JSON file"),
        (lambda body: "[]", "schema=None"),
        (damaged(lambda b: b.update(schema="gradloc.plan")), "schema='gradloc.plan'"),
        (damaged(lambda b: b.update(version=2)), "upgrade gradloc"),
        (damaged(lambda b: b.pop("layers")), "layers is None, not list"),
        (damaged(lambda b: b["layers"].__setitem__(1, "b")), r"layers\[1\] is 'b', not dict"),
        (damaged(lambda b: b["layers"][0].pop("name")), r"layers\[0\].name is None, not str"),
        (damaged(lambda b: b["layers"][0].update(block="0")), r"layers\[0\].block is '0', not int"),
        (damaged(lambda b: b["probes"]["new"].pop("norms")), r"probes\['new'\].norms is None"),
        (damaged(lambda b: b["probes"]["new"]["norms"].pop()), "2 values for 3 layers"),
        (
            damaged(lambda b: b["probes"]["new"]["norms"].__setitem__(0, None)),
            "norms is None, not float",
        ),
        (damaged(lambda b: b["probes"]["new"]["norms"].__setitem__(0, True)), "norms is True"),
        (damaged(lambda b: b["probes"]["new"]["norms"].__setitem__(0, -1)), "'a' has norm -1.0"),
        (
            damaged(lambda b: b["probes"]["new"].update(num_tokens="9")),
            "num_tokens is '9', not int",
        ),
        (damaged(lambda b: b.pop("references")), "references is None"),
        (damaged(lambda b: b["references"].pop("all")), "reference_loss='all' is not among"),
        (damaged(lambda b: b["references"]["matched-spans"]["by_kind"].pop("new")), "has kinds"),
        (damaged(lambda b: b.update(step=1.5)), "step is 1.5, not int"),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    path = tmp_path / "profile.json"
    SMALL.save(path)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message) as caught:
        GradientProfile.load(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        GradientProfile.load(tmp_path / "none.json")


def test_check_recognises_the_model():
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    layers = LayerMap.from_model(model)
    mine = [ProfiledLayer(one.name, num_elements=one.num_elements) for one in layers]
    profile_of(mine).check(layers)
    profile_of([ProfiledLayer(name) for name in layers.names]).check(layers)
    with pytest.raises(ValueError, match=r"another model \(layers of another size: '0'\): trace"):
        profile_of([ProfiledLayer("0", num_elements=8), mine[1]]).check(layers)
    with pytest.raises(
        ValueError, match=r"only in the profile: 'x'; layers only in the model: '1'"
    ):
        profile_of([mine[0], ProfiledLayer("x")]).check(layers)
    with pytest.raises(ValueError, match="'l3' and 2 more"):
        profile_of([ProfiledLayer(f"l{index}") for index in range(6)]).check(layers)
