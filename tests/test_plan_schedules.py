"""Properties of LocalizedAdamW over random schedules of plans.

A schedule is a list of plans, each in force for a few steps, over float32 and bfloat16 layers in
param groups of their own. The judge is torch.optim.AdamW with a param group a parameter, whose
gradient is None where the plan freezes. Single plans and their refusals are in test_optim_plan.py.
"""

import copy
import io
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from numerics import assert_same_bits, assert_within, within_ulps
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW

NAMES = ("a", "b", "c", "d")
BACKENDS = pytest.mark.parametrize("fused", [None, False], ids=["core", "plain-torch"])
RUN = settings(max_examples=25, deadline=None, derandomize=True)  # the same ones every time

# 0 is a third of them.
_SCALE = st.one_of(st.just(0.0), st.sampled_from([0.5, 1.0, 2.0]), st.floats(2**-7, 4.0))
_SCALES = st.tuples(*[_SCALE] * len(NAMES)).filter(any)
# Frozen layers have gradients in some phases and none in others; a bias may lack one anywhere.
_PHASE = st.tuples(
    st.one_of(st.none(), _SCALES), st.integers(1, 3), st.booleans(), st.sampled_from([None, *NAMES])
)
_GROUP = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.sampled_from([0.0, 1e-4, 0.02]),
        "weight_decay": st.sampled_from([0.0, 0.4]),
        "betas": st.sampled_from([(0.5, 0.9), (0.0, 0.99)]),
    },
)


@dataclass(frozen=True)
class Setting:
    """A model and an optimizer's options, and the plans that come into force one after another."""

    phases: list[tuple[Any, int, bool, str | None]]
    halves: tuple[bool, ...] = (False,) * len(NAMES)  # which layers are bfloat16
    group_of: tuple[int, ...] = (0,) * 2 * len(NAMES)  # param group of each parameter
    groups: list[dict[str, Any]] = field(default_factory=lambda: [{}, {}])
    amsgrad: bool = False
    maximize: bool = False
    max_grad_norm: float | None = None

    def model(self) -> nn.ModuleDict:
        torch.manual_seed(len(self.phases))
        layers = {name: nn.Linear(5, 3 + i) for i, name in enumerate(NAMES)}
        for name, half in zip(NAMES, self.halves, strict=True):
            layers[name].to(torch.bfloat16 if half else torch.float32)
        return nn.ModuleDict(layers)

    def optimizer(self, model: nn.Module, **options: Any) -> LocalizedAdamW:
        groups: list[dict[str, Any]] = []
        for g, own in enumerate(self.groups):
            members = zip(model.named_parameters(), self.group_of, strict=True)
            chosen = [named for named, at in members if at == g]
            if chosen:
                groups.append({"params": chosen, **own})
        options = {"max_grad_norm": self.max_grad_norm, **options}
        return LocalizedAdamW(
            groups,
            lr=0.01,
            amsgrad=self.amsgrad,
            maximize=self.maximize,
            layers=LayerMap.from_model(model),
            **options,
        )

    def judge(self, params: list[nn.Parameter]) -> torch.optim.AdamW:
        """A param group a parameter, so that each can have the learning rate of its layer."""
        pairs = zip(params, self.group_of, strict=True)
        groups = [{"params": [p], "lr": 0.01, **self.groups[g]} for p, g in pairs]
        for group in groups:
            group["base_lr"] = group["lr"]
        return torch.optim.AdamW(
            groups, amsgrad=self.amsgrad, maximize=self.maximize, foreach=False
        )

    def steps(self) -> list[tuple[int, Any, bool, bool, str | None]]:
        """Of each step: its number, scales, whether the plan is new, gradients as in `_PHASE`."""
        spread = [
            (scales, i == 0, frozen_too, bare)
            for scales, count, frozen_too, bare in self.phases
            for i in range(count)
        ]
        return [(number, *step) for number, step in enumerate(spread)]


@st.composite
def setting_strategy(draw: st.DrawFn) -> Setting:
    return Setting(
        phases=draw(st.lists(_PHASE, min_size=2, max_size=6)),
        halves=draw(st.tuples(*[st.booleans()] * len(NAMES))),
        group_of=draw(st.tuples(*[st.integers(0, 1)] * 2 * len(NAMES))),
        groups=draw(st.lists(_GROUP, min_size=2, max_size=2)),
        amsgrad=draw(st.booleans()),
        maximize=draw(st.booleans()),
        max_grad_norm=draw(st.sampled_from([None, 0.3])),
    )


SETTINGS = setting_strategy()


def plan_of(scales: tuple[float, ...] | None) -> LayerPlan | None:
    return None if scales is None else LayerPlan(dict(zip(NAMES, scales, strict=True)))


def scale_of(name: str, scales: tuple[float, ...] | None) -> float:
    """The scale of a parameter's layer."""
    return 1.0 if scales is None else scales[NAMES.index(name.split(".")[0])]


def give_gradients(model, number, scales, frozen_too, bare) -> None:
    """Random gradients, the same for the same step number."""
    generator = torch.Generator().manual_seed(1000 + number)
    for name, p in model.named_parameters():
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        absent = name == f"{bare}.bias" or (not frozen_too and scale_of(name, scales) == 0)
        p.grad = None if absent else grad


def one_step(opt, model, step) -> None:
    number, scales, new, frozen_too, bare = step
    if new:
        opt.set_plan(plan_of(scales))
    give_gradients(model, number, scales, frozen_too, bare)
    opt.step()


def frozen_bits(opt, model, scales):
    """Everything of the frozen layers that a step could change."""
    found = {}
    for name, p in model.named_parameters():
        if scale_of(name, scales) == 0:
            found[name] = p.detach().clone()
            for key, tensor in opt.state.get(p, {}).items():
                found[f"{name} {key}"] = tensor.clone()
    return found


def everything(opt, model):
    found = {}
    for name, p in model.named_parameters():
        found[name] = p.detach()
        for key, tensor in opt.state.get(p, {}).items():
            found[f"{name} {key}"] = tensor
    return found


def assert_all_same_bits(ours, expected, what) -> None:
    assert ours.keys() == expected.keys(), what
    for key in ours:
        assert_same_bits(ours[key], expected[key], f"{what}: {key}")


def judge_step(judge, params, model, scales, max_grad_norm) -> None:
    """Torch's step on float32 copies: learning rate lr·s, no gradient where s is 0."""
    for group, p, (name, ours) in zip(
        judge.param_groups, params, model.named_parameters(), strict=True
    ):
        scale = scale_of(name, scales)
        group["lr"] = group["base_lr"] * scale
        p.grad = None if ours.grad is None or scale == 0 else ours.grad.float()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(params, max_grad_norm, foreach=False)
    judge.step()


def assert_agrees(opt, judge, model, params, what) -> None:
    """Parameters, moments and steps; bfloat16 parameters to the other side of a tie at most."""
    for (name, ours), theirs in zip(model.named_parameters(), params, strict=True):
        if ours.dtype == torch.bfloat16:
            ulp = torch.finfo(torch.bfloat16).eps
            assert_within(ours, theirs.bfloat16(), 1.01 * ulp * theirs.abs(), f"{what}: {name}")
            theirs.data.copy_(ours.data)  # that side counts from here on
        else:
            within_ulps([ours], [theirs], 8, f"{what}: {name}")
        state, expected = opt.state.get(ours, {}), judge.state.get(theirs, {})
        assert state.keys() == expected.keys(), f"{what}: {name}"
        if state:
            assert float(state["step"]) == float(expected["step"]), f"{what}: {name}"
            for key in [key for key in state if key != "step"]:
                # Gradients of size 1 may cancel in the first moment; squares add up.
                bound = (1e-7 if key == "exp_avg" else 1e-8) + 4e-6 * expected[key].abs()
                assert_within(state[key], expected[key], bound, f"{what}: {name} {key}")


@BACKENDS
@pytest.mark.parametrize("on_freeze", ["keep", "offload", "drop"])
@RUN
@given(SETTINGS)
def test_any_schedule_is_torch_whose_grad_was_none(fused, on_freeze, setting):
    """A layer that returns goes on, with "drop" starts afresh; a scale is a learning rate."""
    model = setting.model()
    params = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    opt = setting.optimizer(model, fused=fused, on_freeze=on_freeze)
    judge = setting.judge(params)
    for step in setting.steps():
        _, scales, new, _, _ = step
        if new:
            opt.set_plan(plan_of(scales))
            if on_freeze == "drop":
                for p, (name, _) in zip(params, model.named_parameters(), strict=True):
                    if scale_of(name, scales) == 0:
                        judge.state.pop(p, None)
        before = frozen_bits(opt, model, scales)
        one_step(opt, model, step)
        judge_step(judge, params, model, scales, setting.max_grad_norm)
        assert_all_same_bits(frozen_bits(opt, model, scales), before, f"step {step}")
        assert_agrees(opt, judge, model, params, f"step {step}")
        if before:
            event("froze something")


@BACKENDS
@RUN
@given(SETTINGS, st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])] * 4).filter(any))
def test_a_scale_is_a_param_group_of_lr_times_s(fused, setting, scales):
    """To the bit where lr·s is exact, against param groups of this optimizer without a plan."""
    model, other = setting.model(), setting.model()
    opt = setting.optimizer(model, fused=fused, plan=plan_of(scales))
    trained = [
        {"params": [p], **setting.groups[g], "lr": setting.groups[g].get("lr", 0.01) * scale}
        for (name, p), g in zip(other.named_parameters(), setting.group_of, strict=True)
        if (scale := scale_of(name, scales))
    ]
    judge = LocalizedAdamW(
        trained,
        amsgrad=setting.amsgrad,
        maximize=setting.maximize,
        max_grad_norm=setting.max_grad_norm,
        fused=fused,
    )
    for number in range(5):
        give_gradients(model, number, scales, True, None)
        give_gradients(other, number, scales, True, None)
        opt.step()
        judge.step()
        if setting.max_grad_norm is None:
            assert_all_same_bits(everything(opt, model), everything(judge, other), f"{number}")
        else:  # sums over layers and over parameters round differently, one bit of float32
            halves = [p.dtype == torch.bfloat16 for p in model.parameters()]
            for a, b, half in zip(model.parameters(), other.parameters(), halves, strict=True):
                ulp = torch.finfo(torch.bfloat16 if half else torch.float32).eps
                assert_within(a, b, 4 * ulp * b.detach().abs().clamp(min=2**-3), f"{number}")


@BACKENDS
@RUN
@given(SETTINGS, st.data())
def test_a_saved_state_goes_on_to_the_same_bits(fused, setting, data):
    """Saved at any step, loaded into an optimizer that knows no plan, clipping or seed."""
    steps = setting.steps()
    at = data.draw(st.integers(0, len(steps)), label="saved before step")
    options = {"on_freeze": data.draw(st.sampled_from(["keep", "offload", "drop"]))}
    rounding = {"stochastic_rounding": data.draw(st.booleans()), "seed": 7}
    model = setting.model()
    opt = setting.optimizer(model, fused=fused, **options, **rounding)
    file = io.BytesIO()
    for step in steps[:at]:
        one_step(opt, model, step)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    plan, sizes = opt.plan, (opt.state_bytes(), opt.offloaded_bytes())
    for step in steps[at:]:
        one_step(opt, model, step)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = setting.model()
    resumed.load_state_dict(saved["model"])
    second = setting.optimizer(resumed, fused=fused, max_grad_norm=None, **options)
    second.load_state_dict(saved["optimizer"])
    assert second.plan == plan
    assert (second.state_bytes(), second.offloaded_bytes()) == sizes
    for step in steps[at:]:
        one_step(second, resumed, step)
    assert_all_same_bits(everything(second, resumed), everything(opt, model), f"saved at {at}")
    assert second.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


@BACKENDS
@RUN
@given(SETTINGS, st.booleans())
def test_offloaded_moments_come_back_bit_for_bit(fused, setting, stochastic_rounding):
    runs = []
    for on_freeze in ("keep", "offload"):
        model = setting.model()
        opt = setting.optimizer(
            model, fused=fused, on_freeze=on_freeze, stochastic_rounding=stochastic_rounding
        )
        runs.append([])
        for step in setting.steps():
            one_step(opt, model, step)
            runs[-1].append(copy.deepcopy(everything(opt, model)))
        if on_freeze == "keep":
            assert opt.offloaded_bytes() == 0
    for number, (kept, offloaded) in enumerate(zip(*runs, strict=True)):
        assert_all_same_bits(offloaded, kept, f"step {number}")


@BACKENDS
@pytest.mark.parametrize("on_freeze", ["keep", "offload", "drop"])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.booleans())
def test_bytes_after_twenty_plans_are_those_of_the_active_layers(
    fused, on_freeze, state_dtype, draw, amsgrad
):
    """A quarter of 8 layers at a time; some biases never have a gradient and thus no moments."""
    names = [f"layer{i}" for i in range(8)]
    model = nn.ModuleDict({name: nn.Linear(4 + i, 3) for i, name in enumerate(names)})
    for name in names[::3]:
        model[name].bfloat16()
    opt = LocalizedAdamW(
        model.named_parameters(),
        layers=LayerMap.from_model(model),
        amsgrad=amsgrad,
        fused=fused,
        on_freeze=on_freeze,
        state_dtype=state_dtype,
    )
    size = (3 if amsgrad else 2) * (4 if state_dtype is None else 2)  # bytes an element
    had_gradient: set[str] = set()  # parameters that have moments somewhere
    for _ in range(20):
        active = draw.sample(names, 2)
        opt.set_plan(LayerPlan({name: float(name in active) for name in names}))
        if on_freeze == "drop":
            had_gradient = {name for name in had_gradient if name.split(".")[0] in active}
        for name, p in model.named_parameters():
            p.grad = None if name in ("layer1.bias", "layer6.bias") else torch.randn_like(p)
            if p.grad is not None and name.split(".")[0] in active:
                had_gradient.add(name)
        opt.step()
        elements = {True: 0, False: 0}  # by whether the layer is active
        for name in had_gradient:
            elements[name.split(".")[0] in active] += model.get_parameter(name).numel()
        here = sum(elements.values()) if on_freeze == "keep" else elements[True]
        assert opt.state_bytes() == here * size
        assert opt.offloaded_bytes() == (elements[False] * size if on_freeze == "offload" else 0)
    if on_freeze != "keep":
        assert (
            0
            < elements[True]
            <= sum(sorted((p.numel() for p in model.parameters()), reverse=True)[:4])
        )


def test_the_strategy_reaches_what_it_is_for():
    """A strategy that misses freezing, returning or mixed dtypes would prove nothing."""
    seen = set()

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(SETTINGS)
    def look(setting):
        scales = [phase[0] for phase in setting.phases]
        if None in scales:
            seen.add("everything trains")
        if len(set(setting.halves)) == 2:
            seen.add("mixed dtypes")
        if len(set(setting.group_of)) == 2:
            seen.add("two groups")
        for column in zip(*(s for s in scales if s is not None), strict=True):
            kinds = [bool(s) for s, _ in itertools.groupby(column, key=bool)]
            if any(kinds[i : i + 3] == [True, False, True] for i in range(len(kinds))):
                seen.add("deselected and selected again")

    look()
    assert seen == {
        "everything trains",
        "mixed dtypes",
        "two groups",
        "deselected and selected again",
    }
