"""LocalizedAdamW without a plan is torch.optim.AdamW.

A thousand steps are in test_optim_long_runs.py, plans, clipping and norms in test_optim_plan.py,
state dicts in test_optim_state.py, refusals in test_optim_errors.py.
"""

import copy
import itertools
import warnings

import pytest
import torch
from numerics import (
    assert_same_bits,
    assert_within,
    give_gradients,
    make_params,
    max_error,
    twins,
    within_ulps,
)
from torch import nn

from gradloc import LocalizedAdamW, ops

BACKENDS = pytest.mark.parametrize("fused", [None, False], ids=["core", "plain-torch"])
OPTIONS = {
    "defaults": {},
    "all-other": {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3},
    "no-decay": {"lr": 0.1, "weight_decay": 0.0},
    "no-momentum": {"betas": (0.0, 0.0), "eps": 1e-3},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.5)},
    "both": {"amsgrad": True, "maximize": True, "lr": 0.01},
    "no-length": {"lr": 0.0},
    "tensor-lr": {"lr": torch.tensor(0.003)},
}


@BACKENDS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, fused):
    ours = make_params()
    theirs = twins(ours)
    opt = LocalizedAdamW(ours, **options, fused=fused)
    judge = torch.optim.AdamW(theirs, **options, foreach=False)
    before = twins(ours)
    for _ in range(30):
        give_gradients(ours, theirs)
        opt.step()
        judge.step()
    within_ulps(ours, theirs, 4)
    if options.get("lr") != 0.0:
        assert all(max_error(a, b) > 1e-3 for a, b in zip(ours, before, strict=True) if a.numel())
    for a, b in zip(ours, theirs, strict=True):
        assert opt.state[a].keys() == judge.state[b].keys()
        assert float(opt.state[a]["step"]) == 30


@BACKENDS
def test_param_groups_with_other_hyperparameters(fused):
    ours = make_params()
    theirs = twins(ours)

    def groups(params):
        return [
            {"params": params[:2], "lr": 0.01, "betas": (0.7, 0.9)},
            {"params": params[2:3], "weight_decay": 0.5, "maximize": True},
            {"params": params[3:], "eps": 1e-2, "amsgrad": True},
        ]

    opt = LocalizedAdamW(groups(ours), lr=0.002, fused=fused)
    judge = torch.optim.AdamW(groups(theirs), lr=0.002, foreach=False)
    late = nn.Parameter(torch.randn(6))
    for step in range(12):
        if step == 5:
            ours.append(late)
            theirs.append(copy.deepcopy(late))
            opt.add_param_group({"params": [ours[-1]], "lr": 0.3})
            judge.add_param_group({"params": [theirs[-1]], "lr": 0.3})
        give_gradients(ours, theirs)
        opt.step()
        judge.step()
    within_ulps(ours, theirs, 4)


SCHEDULERS = {
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=9),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 7)),
}


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(schedule):
    """OneCycleLR also cycles betas."""
    ours = make_params()
    theirs = twins(ours)
    opt, judge = LocalizedAdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01, foreach=False)
    schedules = [schedule(opt), schedule(judge)]
    seen = set()
    for _ in range(19):
        give_gradients(ours, theirs)
        for optimizer, scheduler in zip((opt, judge), schedules, strict=True):
            optimizer.step()
            scheduler.step()
        seen.add((opt.param_groups[0]["lr"], opt.param_groups[0]["betas"]))
        assert opt.param_groups[0]["lr"] == judge.param_groups[0]["lr"]
    assert len(seen) > 5
    within_ulps(ours, theirs, 4)


def test_closure():
    param = nn.Parameter(torch.tensor([2.0]))
    opt = LocalizedAdamW([param], lr=0.5, weight_decay=0.0)
    calls = []

    def closure():
        opt.zero_grad()
        assert torch.is_grad_enabled()
        loss = (param**2).sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    assert float(opt.step(closure).detach()) == 4.0
    assert calls == [4.0]
    assert float(param.detach()) == pytest.approx(1.5)
    assert opt.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    """A zero gradient decays and moves on; a missing one leaves everything as it is."""
    ours = make_params()
    theirs = twins(ours)
    opt, judge = LocalizedAdamW(ours), torch.optim.AdamW(theirs, foreach=False)
    give_gradients(ours, theirs)
    for optimizer in (opt, judge):
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    between = twins(ours)
    opt.step()
    judge.step()
    within_ulps(ours, theirs, 2)
    moved = any(max_error(a, b) > 0 for a, b in zip(ours, between, strict=True) if a.numel())
    assert moved is not set_to_none
    assert (ours[0].grad is None) is set_to_none


def test_hooks():
    opt = LocalizedAdamW(make_params(((3,),)))
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    opt.register_state_dict_post_hook(lambda o, d: seen.append("saved"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert seen == ["pre", "post", "saved", "loaded"]


def test_named_parameters_are_the_same():
    module = nn.Linear(4, 3)
    other = copy.deepcopy(module)
    opts = [LocalizedAdamW(module.named_parameters()), LocalizedAdamW(other.parameters())]
    give_gradients(list(module.parameters()), list(other.parameters()))
    for opt in opts:
        opt.step()
    assert_same_bits(module.weight, other.weight)
    assert opts[0].param_groups[0]["param_names"] == ["weight", "bias"]


def test_step_counts_are_per_tensor():
    """Counted by group, as apex does, a tensor that joins late gets a wrong bias correction."""
    ours = make_params()
    theirs = twins(ours)
    opt, judge = LocalizedAdamW(ours), torch.optim.AdamW(theirs, foreach=False)
    for skip in [(0, 2), (0,), (), (1,), (0, 1, 2, 3, 4), ()]:
        give_gradients(ours, theirs, skip)
        opt.step()
        judge.step()
    within_ulps(ours, theirs, 2)
    assert [int(opt.state[p]["step"]) for p in ours] == [3, 4, 4, 5, 5]


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_scaler(enabled):
    """An overflowing step is skipped and the scale halved, as with torch's optimizer."""
    ours = make_params(((6, 5),))
    theirs = twins(ours)
    runs = []
    for params, opt in (
        (ours, LocalizedAdamW(ours, lr=0.01)),
        (theirs, torch.optim.AdamW(theirs, lr=0.01, foreach=False)),
    ):
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
        for step in range(5):
            opt.zero_grad()
            factor = torch.inf if enabled and step == 2 else 1.0 + step
            scaler.scale((params[0] ** 3).sum() * factor).backward()
            scaler.step(opt)
            scaler.update()
        runs.append((scaler.get_scale(), int(opt.state[params[0]]["step"])))
    assert runs[0] == runs[1] == ((512.0, 4) if enabled else (1.0, 5))
    within_ulps(ours, theirs, 2)


def awkward_params():
    base = torch.randn(12, 10)
    return {
        "transposed": torch.randn(7, 9).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "zero-dim": torch.randn(()),
        "empty": torch.randn(3, 0),
        "strided": base[:, ::2],
        "columns": base[:, 1::2],
        "float64": torch.randn(11, dtype=torch.float64),
        "size-one-dims": torch.randn(1, 5, 1),
        "dense": torch.randn(33),
    }


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_layouts_in_one_optimizer(max_grad_norm):
    """The core takes the dense ones, plain torch the rest; clipping goes over both together."""
    ours = {k: nn.Parameter(t) for k, t in awkward_params().items()}
    theirs = {k: nn.Parameter(t.detach().clone()) for k, t in ours.items()}
    opt = LocalizedAdamW(ours.values(), lr=0.01, max_grad_norm=max_grad_norm)
    judge = torch.optim.AdamW(theirs.values(), lr=0.01, foreach=False)
    for _ in range(6):
        for name, param in ours.items():
            param.grad = torch.randn(param.shape, dtype=param.dtype)  # contiguous
            theirs[name].grad = param.grad.clone()
        opt.step()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm, foreach=False)
        judge.step()
    within_ulps(ours.values(), theirs.values(), 4)
    assert ours["transposed"].stride() == (1, 9)
    assert opt.state[ours["float64"]]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_parameters_keep_float32_moments(dtype):
    """Held to plain torch's float32 AdamW whose parameter is rounded after every step."""
    ours = make_params(dtype=dtype)
    exact = [nn.Parameter(p.detach().float()) for p in ours]
    opt, judge = LocalizedAdamW(ours, lr=0.01), torch.optim.AdamW(exact, lr=0.01, foreach=False)
    for _ in range(20):
        give_gradients(ours, twins(ours))
        for a, b in zip(ours, exact, strict=True):
            b.grad = a.grad.float()
        opt.step()
        judge.step()
        for b in exact:
            b.data.copy_(b.data.to(dtype))
    for a, b in zip(ours, exact, strict=True):
        # A rounding on the other side of a tie: one ulp of the half-width type, and rare.
        assert_within(a, b, 1.01 * torch.finfo(dtype).eps * b.detach().abs(), "param")
        assert a.numel() < 100 or float((a.detach() != b.detach()).float().mean()) < 0.01
        assert opt.state[a]["exp_avg"].dtype == torch.float32
        assert_within(opt.state[a]["exp_avg"], judge.state[b]["exp_avg"], 1e-6, "exp_avg")


def test_memory_of_a_parameter_may_be_replaced_between_steps():
    ours = make_params(((40,),))
    theirs = twins(ours)
    opt, judge = LocalizedAdamW(ours), torch.optim.AdamW(theirs, foreach=False)
    for _ in range(3):
        give_gradients(ours, theirs)
        opt.step()
        judge.step()
        for p in itertools.chain(ours, theirs):
            p.data = p.data * 2
    within_ulps(ours, theirs, 4)


def test_gradients_are_left_as_they_are_by_clipping():
    params = make_params()
    give_gradients(params, twins(params))
    before = [p.grad.clone() for p in params]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LocalizedAdamW(params, max_grad_norm=1e-3).step()
    for param, grad in zip(params, before, strict=True):
        assert_same_bits(param.grad, grad, "gradient")


def test_the_list_of_tensors_is_prepared_once(monkeypatch):
    """Preparing costs more than a small step: only other tensors, plan or state are a reason."""
    prepare, prepared = ops.NativeAdamW.__init__, []

    def counting(self, *args):
        prepared.append(self)
        prepare(self, *args)

    monkeypatch.setattr(ops.NativeAdamW, "__init__", counting)
    params = make_params()
    opt = LocalizedAdamW(params)
    for skip in [(), (0,), (), ()]:
        give_gradients(params, params, skip)
        opt.param_groups[0]["lr"] *= 0.5
        opt.step()
    assert len(prepared) == 1
