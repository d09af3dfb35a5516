"""LocalizedAdamW with a plan: frozen layers, scales, changes of plan, clipping, norms, non-finite.

The judge is torch.optim.AdamW with a param group a layer.
"""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_same_bits, assert_within, max_error, within_ulps
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW

NAMES = ("a", "b", "c")
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def make_model(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(6, 4 + i, dtype=dtype) for i, name in enumerate(NAMES)})


def plan_of(*scales: float) -> LayerPlan:
    return LayerPlan(dict(zip(NAMES, scales, strict=True)))


def make(plan=None, dtype=torch.float32, **options):
    model = make_model(dtype)
    layers = LayerMap.from_model(model)
    opt = LocalizedAdamW(model.named_parameters(), lr=0.01, layers=layers, plan=plan, **options)
    return model, opt


def give_gradients(*models: nn.Module) -> None:
    """The same random gradients to all models, frozen layers too."""
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        grad = torch.randn_like(parameters[0])
        for parameter in parameters:
            parameter.grad = grad.clone()


def snapshot(model, opt):
    """Everything that a step may change, by parameter name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
        for key, tensor in opt.state.get(parameter, {}).items():
            found[f"{name} {key}"] = tensor.clone()
    return found


def assert_unchanged(before, after, prefix=""):
    chosen = {k for k in before | after if k.startswith(prefix)}
    assert chosen, prefix
    for key in chosen:
        assert_same_bits(after[key], before[key], key)


@DTYPE
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_frozen_means_bit_identical_and_without_state(dtype, max_grad_norm):
    model, opt = make(plan_of(1, 0, 0.5), dtype, max_grad_norm=max_grad_norm, weight_decay=0.5)
    before = snapshot(model, opt)
    for _ in range(3):
        give_gradients(model)
        opt.step()
    after = snapshot(model, opt)
    assert_unchanged(before, after, "b")
    assert all(p not in opt.state for p in model["b"].parameters())
    assert max_error(after["a.weight"], before["a.weight"]) > 0
    trained = sum(p.numel() for name in "ac" for p in model[name].parameters())
    assert opt.state_bytes() == trained * 2 * (8 if dtype == torch.float64 else 4)


def test_a_frozen_layer_keeps_its_moments_and_its_step():
    model, opt = make(plan_of(1, 1, 1), amsgrad=True)
    for _ in range(2):
        give_gradients(model)
        opt.step()
    full_bytes = opt.state_bytes()
    opt.set_plan(plan_of(1, 0, 1))
    before = snapshot(model, opt)
    for _ in range(2):
        give_gradients(model)
        opt.step()
    assert_unchanged(before, snapshot(model, opt), "b")
    assert opt.state_bytes() == full_bytes
    assert [int(opt.state[model[n].weight]["step"]) for n in NAMES] == [4, 2, 4]


def judge_of(model: nn.ModuleDict, **options) -> torch.optim.AdamW:
    groups = [{"params": list(model[name].parameters())} for name in NAMES]
    return torch.optim.AdamW(groups, lr=0.01, foreach=False, **options)


def judge_step(judge, model, scales, lr=0.01):
    """Torch's step with learning rate lr·s, and no gradients where s is 0."""
    for group, name, scale in zip(judge.param_groups, NAMES, scales, strict=True):
        group["lr"] = lr * scale
        if scale == 0:
            for parameter in model[name].parameters():
                parameter.grad = None
    judge.step()


scales = st.one_of(st.just(0.0), st.floats(0.0078125, 4.0))
schedules = st.lists(st.tuples(scales, scales, scales).filter(any), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(schedules, st.booleans(), st.sampled_from([None, 0.5]))
def test_any_schedule_of_plans_is_torch_with_groups(schedule, amsgrad, max_grad_norm):
    """A scale is a learning rate; a layer that returns is one whose gradient was None meanwhile."""
    torch.manual_seed(1)
    options = {"amsgrad": amsgrad, "weight_decay": 0.2}
    model, opt = make(None, max_grad_norm=max_grad_norm, **options)
    other = copy.deepcopy(model)
    judge = judge_of(other, **options)
    for step in schedule:
        opt.set_plan(plan_of(*step))
        give_gradients(model, other)
        active = [p for n, s in zip(NAMES, step, strict=True) if s for p in other[n].parameters()]
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(active, max_grad_norm, foreach=False)
        opt.step()
        judge_step(judge, other, step)
    within_ulps(model.parameters(), other.parameters(), 8)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert opt.state.get(ours, {}).keys() == judge.state.get(theirs, {}).keys()
        if ours in opt.state:
            assert opt.state[ours]["step"] == judge.state[theirs]["step"]


def test_no_plan_after_a_plan_trains_everything():
    model, opt = make(plan_of(0, 0, 1))
    give_gradients(model)
    opt.step()
    opt.set_plan(None)
    assert opt.plan is None
    opt.step()
    assert [int(opt.state[model[n].weight]["step"]) for n in NAMES] == [1, 1, 2]


def test_unnamed_groups_find_their_layers_by_identity():
    model = make_model()
    other = copy.deepcopy(model)
    layers = LayerMap.from_model(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.3},
    ]
    opt = LocalizedAdamW(groups, lr=0.01, layers=layers, plan=plan_of(0, 2, 1))
    judge = torch.optim.AdamW(
        [
            {"params": [other["b"].bias], "lr": 0.02, "weight_decay": 0.0},
            {"params": [other["c"].bias], "lr": 0.01, "weight_decay": 0.0},
            {"params": [other["b"].weight], "lr": 0.02, "weight_decay": 0.3},
            {"params": [other["c"].weight], "lr": 0.01, "weight_decay": 0.3},
        ],
        foreach=False,
    )
    for _ in range(3):
        give_gradients(model, other)
        opt.step()
        judge.step()
    within_ulps(model.parameters(), other.parameters(), 4)


def test_clipping_counts_active_layers_only():
    """A huge frozen gradient must not shrink the others'."""
    model, opt = make(plan_of(1, 0, 1), max_grad_norm=0.7)
    other = copy.deepcopy(model)
    judge = judge_of(other)
    for _ in range(4):
        give_gradients(model, other)
        model["b"].weight.grad.fill_(1e20)
        active = [*other["a"].parameters(), *other["c"].parameters()]
        nn.utils.clip_grad_norm_(active, 0.7, foreach=False)
        opt.step()
        judge_step(judge, other, (1, 0, 1))
    within_ulps(model.parameters(), other.parameters(), 4)
    # AdamW's step hardly sees a factor on all gradients; the first moment does.
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        if ours in opt.state:
            expected = judge.state[theirs]["exp_avg"]
            assert_within(opt.state[ours]["exp_avg"], expected, 1e-8 + 1e-6 * expected.abs(), "m")


@DTYPE
@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
@pytest.mark.parametrize("fused", [None, False])
def test_grad_norms_before_clipping(dtype, max_grad_norm, fused):
    model, opt = make(plan_of(1, 0, 2), dtype, max_grad_norm=max_grad_norm, fused=fused)
    give_gradients(model)
    before = [p.grad.clone() for p in model.parameters()]
    opt.step()
    norms = opt.grad_norms()
    assert norms.dtype == torch.float32
    assert norms.shape == (3,)
    assert norms[1].isnan()
    for i, name in ((0, "a"), (2, "c")):
        exact = math.sqrt(
            sum(float(p.grad.double().square().sum()) for p in model[name].parameters())
        )
        assert float(norms[i]) == pytest.approx(exact, rel=1e-6)
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert_same_bits(parameter.grad, grad, "gradient")


def test_grad_norms_follow_the_gradients():
    model, opt = make(plan_of(1, 1, 1))
    with pytest.raises(ValueError, match="call grad_norms\\(\\) after a step"):
        opt.grad_norms()
    give_gradients(model)
    opt.step()
    assert opt.grad_norms().isfinite().all()
    for parameter in model["c"].parameters():
        parameter.grad = None
    model["b"].weight.grad = None
    opt.step()
    norms = opt.grad_norms()
    assert norms.isnan().tolist() == [False, False, True]
    assert float(norms[1]) == pytest.approx(float(model["b"].bias.grad.norm()), rel=1e-6)
    opt.zero_grad()
    opt.step()
    assert opt.grad_norms().isnan().all(), "nothing of the step before is left"


def test_grad_norms_without_layers_is_the_total():
    params = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4, 4))]
    opt = LocalizedAdamW(params)
    for parameter in params:
        parameter.grad = torch.randn_like(parameter)
    opt.step()
    total = nn.utils.get_total_norm([p.grad for p in params])
    assert_within(opt.grad_norms(), total[None], 1e-5, "total")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "later"])
def test_nonfinite_steps_leave_everything_as_it_was(value, on_nonfinite, warm):
    model, opt = make(plan_of(1, 0, 1), on_nonfinite=on_nonfinite)
    give_gradients(model)
    if warm:
        opt.step()
    before, state = snapshot(model, opt), copy.deepcopy(opt.state_dict())
    model["c"].bias.grad[2] = value
    if on_nonfinite == "raise":
        with pytest.raises(
            FloatingPointError, match="non-finite gradient in c: nothing was changed"
        ):
            opt.step()
    else:
        assert opt.step(lambda: "the loss") == "the loss"
    assert opt.num_skipped_steps == 1
    assert_unchanged(before, snapshot(model, opt))
    after = opt.state_dict()
    assert after["state"].keys() == state["state"].keys()
    skipped = json.loads(after["param_groups"][0].pop("localization"))
    expected = json.loads(state["param_groups"][0].pop("localization"))
    assert skipped == {**expected, "num_skipped_steps": 1}
    assert after["param_groups"] == state["param_groups"]
    norms = opt.grad_norms()
    assert norms.isfinite().tolist() == [True, False, False]
    give_gradients(model)
    opt.step()
    assert opt.num_skipped_steps == 1
    assert int(opt.state[model["c"].bias]["step"]) == 1 + warm
    assert max_error(model["c"].bias, before["c.bias"]) > 0


def test_nonfinite_gradients_of_frozen_layers_do_not_matter():
    model, opt = make(plan_of(1, 0, 1), max_grad_norm=1.0, on_nonfinite="raise")
    give_gradients(model)
    model["b"].weight.grad.fill_(math.nan)
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_ignore_does_what_torch_does(max_grad_norm):
    """Unclipped, one element is spoilt; clipped, the coefficient spoils all."""
    model, opt = make(plan_of(1, 0, 1), max_grad_norm=max_grad_norm, on_nonfinite="ignore")
    other = copy.deepcopy(model)
    judge = judge_of(other)
    give_gradients(model, other)
    for m in (model, other):
        m["c"].bias.grad[2] = math.nan
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_([*other["a"].parameters(), *other["c"].parameters()], 1.0)
    opt.step()
    judge_step(judge, other, (1, 0, 1))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert ours.isnan().tolist() == theirs.isnan().tolist()
    assert opt.num_skipped_steps == 0


def test_skipping_is_the_default_exactly_where_clipping_is():
    for max_grad_norm, skipped in ((None, 0), (1.0, 1)):
        model, opt = make(max_grad_norm=max_grad_norm)
        give_gradients(model)
        model["a"].bias.grad[0] = math.inf
        opt.step()
        assert opt.num_skipped_steps == skipped


def test_a_finite_norm_beyond_float32_is_clipped_not_skipped():
    model, opt = make(max_grad_norm=1.0, eps=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3e38)
    opt.step()
    assert opt.num_skipped_steps == 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert opt.state[model["a"].bias]["exp_avg"].gt(0).all()
