"""Policies: exact choices on profiles made by hand, and what they refuse."""

from __future__ import annotations

import math
import random
import textwrap
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradloc.plan import LayerPlan
from gradloc.policies import (
    AllLayers,
    Complement,
    RandomLayers,
    RandomLike,
    Retrace,
    TracedGradientPolicy,
    needs_profile,
    retrace_every,
)
from gradloc.policies import policy as policy_module
from gradloc.profile import GradientProfile

NAMES = ("wte", "h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp")


def profile_with(
    ratios: dict[str, float], matched: dict[str, float] | None = None
) -> GradientProfile:
    """R = ratios against a reference of norm 2 everywhere; with `matched`, R = matched there."""
    return GradientProfile.from_norms(
        {"probe": {name: 2 * ratio for name, ratio in ratios.items()}},
        dict.fromkeys(ratios, 2.0),
        matched_norms=matched and {name: 2 * ratios[name] / matched[name] for name in ratios},
    )


# Mean 3, median 2.
PROFILE = profile_with(dict(zip(NAMES, (7.0, 1.0, 2.0, 4.0, 1.0), strict=True)))


@pytest.mark.parametrize(
    ("threshold", "active"),
    [
        ("mean", {"wte", "h.1.attn"}),
        (("quantile", 0.5), {"wte", "h.1.attn"}),
        # Between 1 and 2, at position 0.3 · 4 = 1.2 of the sorted values: 1 + 0.2 · (2 − 1).
        (("quantile", 0.3), {"wte", "h.0.mlp", "h.1.attn"}),
        (("quantile", 0), {"wte", "h.0.mlp", "h.1.attn"}),
        (("top_k", 1), {"wte"}),
        (["top_k", 3], {"wte", "h.1.attn", "h.0.mlp"}),
        # The fourth and fifth are equal: the first in model order is taken.
        (("top_k", 4), {"wte", "h.1.attn", "h.0.mlp", "h.0.attn"}),
        (("top_k", 5), set(NAMES)),
        # The second and fifth are equal: the first in model order is taken here as well.
        (("bottom_k", 1), {"h.0.attn"}),
        (["bottom_k", 2], {"h.0.attn", "h.1.mlp"}),
        (("bottom_k", 4), {"h.0.attn", "h.1.mlp", "h.0.mlp", "h.1.attn"}),
        (("bottom_k", 5), set(NAMES)),
        (4, {"wte"}),  # strictly above
        (3.99, {"wte", "h.1.attn"}),
        (0.0, set(NAMES)),
    ],
    ids=str,
)
def test_freeze_thresholds(threshold, active):
    plan = TracedGradientPolicy(threshold=threshold)(PROFILE)
    assert plan.scales == {name: float(name in active) for name in NAMES}
    assert tuple(plan.scales) == NAMES


@pytest.mark.parametrize(("normaliser", "divisor"), [("mean", 3.0), ("max", 7.0)])
def test_scale(normaliser, divisor):
    plan = TracedGradientPolicy("scale", normaliser=normaliser)(PROFILE, step=3)
    for name, ratio in PROFILE.relative.items():
        assert plan.scales[name] == pytest.approx(ratio / divisor, rel=1e-15), name


def test_scale_freezes_a_layer_without_gradient():
    profile = GradientProfile.from_norms({"probe": {"a": 0.0, "b": 3.0}}, {"a": 0.0, "b": 1.0})
    assert TracedGradientPolicy("scale")(profile).scales == {"a": 0.0, "b": 2.0}


def test_reference_loss_is_all_unless_asked():
    ratios = dict(zip(NAMES, (7.0, 1.0, 2.0, 4.0, 1.0), strict=True))
    matched = dict(zip(NAMES, (1.0, 1.0, 1.0, 1.0, 6.0), strict=True))
    both = profile_with(ratios, matched)
    # Which one the profile uses for itself plays no part.
    for profile in (both, both.with_reference("matched-spans")):
        assert TracedGradientPolicy()(profile).active == ("wte", "h.1.attn")
        policy = TracedGradientPolicy(reference_loss="matched-spans")
        assert policy(profile).active == ("h.1.mlp",)
    with pytest.raises(ValueError, match=r"'matched-spans' was not measured .*trace again"):
        TracedGradientPolicy(reference_loss="matched-spans")(PROFILE)


def test_kinds_restrict_the_mean():
    profile = GradientProfile.from_norms(
        {"updated": {"a": 9.0, "b": 1.0}, "new": {"a": 1.0, "b": 3.0}}, {"a": 1.0, "b": 1.0}
    )
    assert TracedGradientPolicy()(profile).active == ("a",)
    assert TracedGradientPolicy(kinds=["new"])(profile).active == ("b",)
    with pytest.raises(ValueError, match=r"kinds=\['old'\]"):
        TracedGradientPolicy(kinds=["old"])(profile)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "prune"}, "mode='prune'"),
        ({"normaliser": "sum", "mode": "scale"}, "normaliser='sum'"),
        ({"reference_loss": "some"}, "reference_loss='some'"),
        ({"threshold": "median"}, "threshold='median'"),
        ({"threshold": ("quantile", 1.0)}, "quantile"),
        ({"threshold": ("quantile", -0.1)}, "quantile"),
        ({"threshold": ("top_k", 0)}, "top_k"),
        ({"threshold": ("top_k", 1.5)}, "top_k"),
        ({"threshold": ("top_k", True)}, "top_k"),
        ({"threshold": ("bottom_k", 0)}, "bottom_k"),
        ({"threshold": ("bottom_k", 1.0)}, "bottom_k"),
        ({"threshold": ("bottom_k", True)}, "bottom_k"),
        ({"threshold": ("middle_k", 2)}, "middle_k"),
        ({"threshold": True}, "threshold=True"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"threshold": None}, "threshold=None"),
        ({"mode": "scale", "threshold": 2.0}, "threshold=2.0 is for mode='freeze'"),
        ({"mode": "scale", "threshold": ("bottom_k", 2)}, "is for mode='freeze'"),
        ({"mode": "freeze", "normaliser": "max"}, "normaliser='max' is for mode='scale'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        TracedGradientPolicy(**arguments)


def test_nothing_would_train():
    flat = profile_with(dict.fromkeys(NAMES, 2.0))
    with pytest.raises(ValueError, match="nothing would train"):
        TracedGradientPolicy()(flat)
    with pytest.raises(ValueError, match=r"no layer is above 100 .*between 1 and 7"):
        TracedGradientPolicy(threshold=100)(PROFILE)
    for end in ("top_k", "bottom_k"):
        with pytest.raises(ValueError, match=f"'{end}', 6.*only 5 layers"):
            TracedGradientPolicy(threshold=(end, 6))(PROFILE)
    silent = GradientProfile.from_norms({"probe": {"a": 0.0}}, {"a": 0.0})
    with pytest.raises(ValueError, match="nothing would train"):
        TracedGradientPolicy("scale")(silent)
    with pytest.raises(ValueError, match="needs a GradientProfile"):
        TracedGradientPolicy()(SimpleNamespace(names=NAMES))


@given(
    ratios=st.lists(st.floats(0.01, 100), min_size=2, max_size=20),
    k=st.integers(1, 20),
)
def test_top_k_takes_k_and_none_below_what_it_leaves(ratios, k):
    profile = profile_with({f"l{index}": ratio for index, ratio in enumerate(ratios)})
    k = min(k, len(ratios))
    plan = TracedGradientPolicy(threshold=("top_k", k))(profile)
    relative = profile.relative
    assert len(plan.active) == k
    taken = min(relative[name] for name in plan.active)
    assert all(relative[name] <= taken for name in plan.frozen)


@given(
    ratios=st.lists(st.floats(0.01, 100), min_size=2, max_size=20, unique=True),
    data=st.data(),
)
def test_the_complement_of_the_highest_are_the_lowest(ratios, data):
    profile = profile_with({f"l{index}": ratio for index, ratio in enumerate(ratios)})
    k = data.draw(st.integers(1, len(ratios) - 1))
    highest = TracedGradientPolicy(threshold=("top_k", k))
    lowest = TracedGradientPolicy(threshold=("bottom_k", len(ratios) - k))
    assert Complement(highest)(profile).scales == lowest(profile).scales
    assert Complement(Complement(highest))(profile).scales == highest(profile).scales


@given(ratios=st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_scales_by_the_mean_average_one(ratios):
    profile = profile_with({f"l{index}": ratio for index, ratio in enumerate(ratios)})
    scales = TracedGradientPolicy("scale")(profile).scales
    assert math.fsum(scales.values()) / len(scales) == pytest.approx(1, rel=1e-12)


def test_all_layers():
    plan = AllLayers()(SimpleNamespace(names=NAMES), step=5)
    assert plan.scales == dict.fromkeys(NAMES, 1.0)
    assert not needs_profile(AllLayers())


def test_random_layers_are_drawn_by_seed_and_step_alone():
    source = SimpleNamespace(names=tuple(f"l{index}" for index in range(40)))
    random.seed(1)
    state = random.getstate()
    plan = RandomLayers(count=15, seed=3)(source, step=7)
    assert random.getstate() == state
    random.seed(2)
    assert RandomLayers(count=15, seed=3)(source, step=7).scales == plan.scales
    assert len(plan.active) == 15
    assert set(plan.scales.values()) == {0.0, 1.0}
    assert RandomLayers(count=15, seed=3)(source, step=8).active != plan.active
    assert RandomLayers(count=15, seed=4)(source, step=7).active != plan.active
    assert not needs_profile(RandomLayers())


def test_random_layers_reach_every_layer():
    source = SimpleNamespace(names=NAMES)
    plans = [RandomLayers(count=2, seed=seed)(source) for seed in range(500)]
    counts = {name: sum(name in plan.active for plan in plans) for name in NAMES}
    # Binomial with mean 200 and standard deviation 11.
    assert all(150 < count < 250 for count in counts.values()), counts


@pytest.mark.parametrize(
    ("arguments", "count"),
    [({}, 2), ({"share": 0.5}, 2), ({"share": 0.7}, 4), ({"share": 0.01}, 1), ({"share": 1.0}, 5)],
    ids=str,
)
def test_random_share(arguments, count):
    assert len(RandomLayers(**arguments)(SimpleNamespace(names=NAMES)).active) == count


@pytest.mark.parametrize(
    "arguments",
    [{"count": 0}, {"count": 1.5}, {"share": 0.0}, {"share": 1.1}, {"count": 1, "share": 0.5}],
    ids=str,
)
def test_random_bad_arguments(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        RandomLayers(**arguments)


def test_random_count_above_the_layers():
    with pytest.raises(ValueError, match="count=6: there are only 5 layers"):
        RandomLayers(count=6)(SimpleNamespace(names=NAMES))


def test_retrace_passes_through():
    policy = Retrace(RandomLayers(count=2, seed=1), every=10)
    source = SimpleNamespace(names=NAMES)
    assert policy(source, step=20).scales == RandomLayers(count=2, seed=1)(source, step=20).scales
    assert retrace_every(policy) == 10
    assert retrace_every(policy.policy) is None
    assert not needs_profile(policy)
    assert needs_profile(Retrace(TracedGradientPolicy(), every=1))
    for every in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="every="):
            Retrace(AllLayers(), every=every)
    with pytest.raises(ValueError, match="not callable"):
        Retrace("mean", every=1)


def test_complement_trains_what_the_other_freezes():
    plan = Complement(TracedGradientPolicy())(PROFILE)
    assert plan.active == ("h.0.attn", "h.0.mlp", "h.1.mlp")
    assert plan.frozen == TracedGradientPolicy()(PROFILE).active
    assert set(plan.scales.values()) == {0.0, 1.0}
    assert tuple(plan.scales) == NAMES
    assert plan.policy == f"complement of ({TracedGradientPolicy()(PROFILE).policy})"


def test_complement_of_scales_is_one_where_they_are_zero():
    def scaled(source, step=0):
        return LayerPlan({"a": 0.0, "b": 0.3, "c": 0.0, "d": 2.0})

    assert Complement(scaled)(PROFILE).scales == {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0}


def test_complement_passes_through():
    source = SimpleNamespace(names=NAMES)
    drawn = RandomLayers(count=2, seed=1)
    policy = Complement(Retrace(drawn, every=10))
    assert retrace_every(policy) == 10
    assert not needs_profile(policy)
    assert retrace_every(Complement(drawn)) is None
    assert needs_profile(Complement(TracedGradientPolicy()))
    plans = {policy(source, step=step).active for step in (0, 10, 20)}
    assert len(plans) > 1
    for step in (0, 10, 20):
        assert policy(source, step=step).active == drawn(source, step=step).frozen
        # Retrace outside asks the complement again: the same thing.
        assert Retrace(Complement(drawn), every=10)(source, step=step) == policy(source, step=step)


def test_complement_of_everything_is_refused():
    with pytest.raises(ValueError, match=r"nothing would train: .*5 of 5 .*freezes no layer"):
        Complement(AllLayers())(SimpleNamespace(names=NAMES))
    with pytest.raises(ValueError, match="not callable"):
        Complement("mean")


DEEP = SimpleNamespace(
    names=("wte", *(f"h.{n}.{part}" for n in range(6) for part in ("attn", "mlp")), "ln_f")
)


def chosen_by_hand(*active):
    def policy(source, step=0):
        return LayerPlan({name: float(name in active) for name in source.names}, policy="by hand")

    policy.needs_profile = False
    return policy


def test_random_like_trains_as_many_and_leaves_what_stands_alone():
    inner = chosen_by_hand("wte", "h.0.attn", "h.0.mlp", "h.1.attn", "h.5.mlp")
    seen = set()
    for seed in range(200):
        plan = RandomLike(inner, seed=seed)(DEEP)
        assert set(plan.scales.values()) == {0.0, 1.0}
        assert tuple(plan.scales) == DEEP.names
        assert len(plan.active) == 5
        assert "wte" in plan.active
        assert "ln_f" not in plan.active
        seen.update(plan.active)
    assert seen == set(DEEP.names) - {"ln_f"}
    without = RandomLike(chosen_by_hand("h.0.attn", "ln_f"), seed=1)(DEEP)
    assert len(without.active) == 2
    assert "ln_f" in without.active


def test_random_like_draws_by_seed_and_step():
    policy = RandomLike(chosen_by_hand("h.0.attn", "h.1.attn", "h.2.attn"), seed=3)
    assert policy(DEEP) == policy(DEEP)
    assert policy(DEEP).active != policy(DEEP, step=10).active
    assert len({RandomLike(policy.policy, seed=s)(DEEP).active for s in range(20)}) > 15
    assert not needs_profile(policy)
    assert retrace_every(policy) is None
    assert retrace_every(RandomLike(Retrace(policy, every=7))) == 7
    assert needs_profile(RandomLike(TracedGradientPolicy()))


def test_random_like_has_no_control_for_scales():
    with pytest.raises(ValueError, match="scales 0 and 1"):
        RandomLike(TracedGradientPolicy(mode="scale"))(PROFILE)
    with pytest.raises(ValueError, match="not callable"):
        RandomLike("mean")


def test_a_policy_in_five_lines():
    def strongest_attention(profile, step=0):
        ratios = {name: r for name, r in profile.relative.items() if name.endswith("attn")}
        best = max(ratios, key=ratios.get)
        return LayerPlan({name: float(name == best) for name in profile.names})

    assert strongest_attention(PROFILE).active == ("h.1.attn",)
    assert Retrace(strongest_attention, every=5)(PROFILE, step=5).active == ("h.1.attn",)
    assert needs_profile(strongest_attention)
    assert retrace_every(strongest_attention) is None


def test_the_example_in_the_docstring_runs():
    lines = policy_module.__doc__.splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    names = {"LayerPlan": LayerPlan}
    exec(code, names)
    plan = names["attention_only"](PROFILE)
    assert plan.active == ("h.0.attn", "h.1.attn")
    assert plan.policy == "attention only"
