"""LayerPlan: what it accepts, says about itself, and keeps through files, pickles and copies."""

import copy
import json
import math
import pickle

import pytest
import torch

from gradloc import LayerPlan


def test_active_and_frozen_keep_the_order():
    plan = LayerPlan({"c": 0.0, "a": 2, "b": 0.5, "d": -0.0})
    assert plan.active == ("a", "b")
    assert plan.frozen == ("c", "d")
    assert dict(plan.scales) == {"c": 0.0, "a": 2.0, "b": 0.5, "d": 0.0}
    assert plan.policy == "by hand"
    assert str(plan) == "LayerPlan(2 of 4 layers train; by hand)"


def test_scales_are_numbers_of_any_kind_and_become_floats():
    plan = LayerPlan({"a": 1, "b": torch.tensor(0.25), "c": True})
    assert [type(scale) for scale in plan.scales.values()] == [float] * 3
    assert list(plan.scales.values()) == [1.0, 0.25, 1.0]


def test_a_plan_cannot_be_changed():
    given = {"a": 1.0}
    plan = LayerPlan(given)
    given["a"] = 5.0
    assert plan.scales["a"] == 1.0
    with pytest.raises(TypeError):
        plan.scales["a"] = 2.0
    with pytest.raises(AttributeError):
        plan.policy = "other"


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf, -1e-300, None, "much", [1.0]])
def test_scales_that_are_none(scale):
    with pytest.raises(ValueError, match=r"scales\['b'\]=.*a scale is a finite number >= 0"):
        LayerPlan({"a": 1.0, "b": scale})


def test_no_layers():
    with pytest.raises(ValueError, match="scales is empty: a plan names every layer"):
        LayerPlan({})


def test_check():
    plan = LayerPlan({"a": 1.0, "b": 0.0})
    plan.check(("b", "a"))
    plan.check(name for name in "ab")
    with pytest.raises(
        ValueError, match=r"unknown layers 'b'\. Make the plan .*1 layers, the plan 2"
    ):
        plan.check(["a"])
    with pytest.raises(ValueError, match="unknown layers 'b'; layers without a scale 'c'"):
        plan.check(["a", "c"])
    many = [f"h.{i}" for i in range(9)]
    with pytest.raises(ValueError, match=r"without a scale 'h\.0', .*'h\.3' and 5 more"):
        plan.check(["a", "b", *many])


@pytest.mark.parametrize(
    "through", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))]
)
def test_copies_are_equal(through):
    plan = LayerPlan({"a": 0.1, "b": 0.0}, policy="mean")
    assert through(plan) == plan
    assert through(plan).policy == "mean"
    assert plan != LayerPlan({"a": 0.1, "b": 0.1}, policy="mean")


def test_round_trip(tmp_path):
    """Scales come back bit for bit, names with their accents, layers in their order."""
    plan = LayerPlan({"z.é": 0.1 + 0.2, "a": 5e-324, "m": 0.0, "b": 1e308}, policy="mean, R > 1")
    plan.save(tmp_path / "deep" / "plan.json")
    loaded = LayerPlan.load(tmp_path / "deep" / "plan.json")
    assert loaded == plan
    assert list(loaded.scales) == list(plan.scales)


def written(tmp_path, **change):
    LayerPlan({"a": 1.0}).save(tmp_path / "plan.json")
    body = {**json.loads((tmp_path / "plan.json").read_text()), **change}
    (tmp_path / "plan.json").write_text(json.dumps(body))
    return tmp_path / "plan.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "gradloc.profile"}, "holds schema='gradloc.profile', not 'gradloc.plan'"),
        ({"version": 99}, "version=99; this gradloc reads up to 1: upgrade"),
        ({"scales": None}, "has no scales: it is not a whole plan file"),
        ({"scales": [1.0]}, "has no scales"),
        ({"scales": {}}, "scales is empty"),
        ({"scales": {"a": None}}, r"scales\['a'\]=None: a scale is a finite number"),
        ({"scales": {"a": -2}}, r"scales\['a'\]=-2"),
        ({"scales": {"a": math.nan}}, r"scales\['a'\]=nan"),
    ],
)
def test_files_that_are_no_plans(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        LayerPlan.load(written(tmp_path, **change))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*plan\.json"):
        LayerPlan.load(tmp_path / "plan.json")
