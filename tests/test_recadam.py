"""RecAdam in LocalizedAdamW: formula, annealing, what is refused, and that it acts on every layer.

The state that it keeps is in test_recadam_state.py, the kernels in test_ops_recadam.py.
"""

import copy
import dataclasses
import math

import pytest
import torch
from numerics import assert_same_bits, assert_within, make_params, twins
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW, RecAdam
from gradloc.optim_anchor import check_pull

ANNEALS = (
    RecAdam(gamma=20.0, k=0.7, t0=3.0),
    RecAdam(gamma=30.0, t0=20.0, anneal="linear"),
    RecAdam(gamma=25.0, k=0.25, anneal="constant"),
)
ALL_PULL = RecAdam(gamma=100.0, k=0.0, anneal="constant")  # λ = 0: Adam's step is left out
FUSED = pytest.mark.parametrize("fused", [None, False], ids=["core", "torch"])


@pytest.mark.parametrize(
    ("recadam", "step", "expected"),
    [
        (RecAdam(k=0.5, t0=250.0), 250, 0.5),
        (RecAdam(k=0.5, t0=250.0), 252, 1 / (1 + math.exp(-1))),
        (RecAdam(k=0.5, t0=250.0), 248, 1 / (1 + math.exp(1))),
        (RecAdam(k=1e3, t0=1e4), 1, 0.0),  # exp(1e7) would overflow
        (RecAdam(k=1e3, t0=0.0), 1, 1.0),
        (RecAdam(k=0.0), 7, 0.5),
        (RecAdam(anneal="linear", t0=4.0), 1, 0.25),
        (RecAdam(anneal="linear", t0=4.0), 9, 1.0),
        (RecAdam(anneal="constant", k=0.3), 1, 0.3),
        (RecAdam(anneal="constant", k=1), 999, 1.0),
    ],
)
def test_annealing(recadam, step, expected):
    assert recadam.annealed(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -1.0}, "gamma=-1.0: a finite number of at least 0"),
        ({"gamma": "much"}, "gamma='much': a finite"),
        ({"k": math.nan}, "k=nan: a finite"),
        ({"t0": math.inf}, "t0=inf: a finite"),
        ({"anneal": "cosine"}, "anneal='cosine': choose one of sigmoid, linear, constant"),
        ({"anneal": "constant", "k": 1.5}, "k=1.5: with anneal='constant' it is λ itself"),
        ({"anneal": "linear", "t0": 0.0}, "t0=0.0: with anneal='linear'"),
        ({"anchor_dtype": "float16"}, "anchor_dtype='float16': 'float32' or 'bfloat16'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        RecAdam(**settings)


def test_the_papers_settings_are_the_defaults():
    assert RecAdam() == RecAdam(5000.0, k=0.5, t0=250.0, anneal="sigmoid", anchor_dtype=None)
    with pytest.raises(ValueError, match=r"recadam=3\.0: a gradloc\.RecAdam"):
        LocalizedAdamW(make_params(), lr=1e-4, recadam=3.0)


def by_hand(values, grads, recadam, *, lr, betas, eps, weight_decay):
    """The update as the paper and its code have it, with torch's decoupled decay, in float64."""
    theta, anchor = values.double(), values.double()
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, g in enumerate((grad.double() for grad in grads), start=1):
        share = {
            "sigmoid": 1 / (1 + math.exp(-recadam.k * (t - recadam.t0))),
            "linear": min(1.0, t / recadam.t0),
            "constant": recadam.k,
        }[recadam.anneal]
        theta = theta - lr * weight_decay * theta
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        theta = theta - share * lr * m_hat / (v_hat.sqrt() + eps)
        theta = theta - (1 - share) * lr * recadam.gamma * (theta - anchor)
    return theta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recadam", ANNEALS, ids=lambda recadam: recadam.anneal)
@FUSED
def test_the_formula(recadam, fused, dtype):
    start = torch.randn(200, dtype=dtype)
    param = nn.Parameter(start.clone())
    grads = [torch.randn(200, dtype=dtype) for _ in range(8)]
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    opt = LocalizedAdamW([param], **options, fused=fused, recadam=recadam)
    for grad in grads:
        param.grad = grad
        opt.step()
    expected = by_hand(start, grads, recadam, **options)
    assert_within(param, expected, 1e-6 if dtype == torch.float32 else 1e-13)
    without = by_hand(start, grads, dataclasses.replace(recadam, gamma=0.0), **options)
    assert float((expected - without).abs().mean()) > 0.01
    assert_same_bits(opt.state[param]["anchor"], start)


@pytest.mark.parametrize("recadam", ANNEALS, ids=lambda recadam: recadam.anneal)
@FUSED
def test_gamma_0_is_adamw_bit_for_bit(recadam, fused):
    """λ plays no part then either, and nothing is kept for it."""
    ours = make_params()
    theirs = twins(ours)
    off = dataclasses.replace(recadam, gamma=0.0)
    opts = [
        LocalizedAdamW(ours, lr=1e-2, fused=fused, recadam=off),
        LocalizedAdamW(theirs, lr=1e-2, fused=fused),
    ]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for opt in opts:
            opt.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a.detach(), b.detach())
    assert all("anchor" not in state for state in opts[0].state.values())


def test_release_gradients_gives_the_same_bits():
    params = make_params()
    released = twins(params)
    opt = LocalizedAdamW(params, lr=0.01, recadam=ANNEALS[0])
    other = LocalizedAdamW(released, lr=0.01, recadam=ANNEALS[0], release_gradients=True)
    for step in range(3):
        for one in (params, released):
            sum((p * (i + step)).sin().sum() for i, p in enumerate(one)).backward()
        opt.step()
        other.step()
        opt.zero_grad()
    for a, b in zip(params, released, strict=True):
        assert_same_bits(a.detach(), b.detach())


def test_the_pull_acts_on_every_parameter_of_a_gpt2(gpt2):
    """Without a gradient to follow each element goes to its anchor by the share asked for.

    Public ports take what they pull by names that GPT-2 lacks, so that nothing is pulled at all.
    """
    opt = LocalizedAdamW(gpt2.named_parameters(), lr=1e-3, weight_decay=0.0, recadam=ALL_PULL)
    pretrained = copy.deepcopy(gpt2.state_dict())
    for param in gpt2.parameters():
        param.grad = torch.zeros_like(param)
    opt.step()
    named = dict(gpt2.named_parameters())
    for name, param in named.items():
        assert_same_bits(param.detach(), pretrained[name], f"{name} is where its anchor is")
        param.data += 0.1 * (1 + torch.rand_like(param))
    before = {name: param.detach().clone() for name, param in named.items()}
    opt.step()
    assert len(named) == len(opt.state) == 28
    for name, param in named.items():
        wanted = before[name] - 0.1 * (before[name] - pretrained[name])  # lr·gamma = 0.1
        assert_within(param, wanted, 1e-6, name)
        assert bool((param < before[name]).all()), name


def test_a_plan_scales_the_pull_and_freezes_it(gpt2):
    layers = LayerMap.from_model(gpt2)
    scales = [0.0, 0.5, 2.0]
    plan = LayerPlan({name: scales[i % 3] for i, name in enumerate(layers.names)})
    start = {name: param.detach().clone() for name, param in gpt2.named_parameters()}
    opt = LocalizedAdamW(
        gpt2.named_parameters(),
        lr=1e-3,
        weight_decay=0.0,
        layers=layers,
        plan=plan,
        recadam=ALL_PULL,
    )
    for param in gpt2.parameters():
        param.grad = torch.zeros_like(param)
    opt.step()
    for param in gpt2.parameters():
        param.data += 0.1
    moved = {name: param.detach().clone() for name, param in gpt2.named_parameters()}
    opt.step()
    for name, param in gpt2.named_parameters():
        scale = plan.scales[layers.names[layers.index(name)]]
        if scale == 0:
            assert_same_bits(param.detach(), moved[name], name)
            assert param not in opt.state
        else:
            wanted = moved[name] - 0.1 * scale * (moved[name] - start[name])
            assert_within(param, wanted, 1e-6, name)


def two_layers():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    layers = LayerMap.from_model(model, granularity="tensor")
    return model, layers, LayerPlan(dict.fromkeys(layers.names, 1.0))


def test_a_pull_that_would_diverge_is_refused():
    model, layers, plan = two_layers()
    with pytest.raises(ValueError, match=r"lr·scale·gamma=5 is above 2.*gamma <= 2000, or lr <= 0"):
        LocalizedAdamW(model.named_parameters(), lr=1e-3, recadam=RecAdam())
    half = LayerPlan(dict.fromkeys(layers.names, 0.5))
    options = {"lr": 0.04, "layers": layers, "recadam": dataclasses.replace(ALL_PULL, gamma=100.0)}
    opt = LocalizedAdamW(model.named_parameters(), plan=half, **options)  # 2 is not above 2
    with pytest.raises(ValueError, match="a layer scale of 1"):
        opt.set_plan(plan)
    assert opt.plan is half
    with pytest.raises(ValueError, match="a layer scale of 1"):
        LocalizedAdamW(model.named_parameters(), plan=plan, **options)


def test_a_learning_rate_that_grew_too_large_is_refused_before_anything_changes():
    model, _, _ = two_layers()
    opt = LocalizedAdamW(model.parameters(), lr=0.015, recadam=ALL_PULL)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 + step)
    for _ in range(2):
        before = copy.deepcopy((model.state_dict(), opt.state_dict()))
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        if scheduler.last_epoch == 1:
            with pytest.raises(ValueError, match=r"lr=0\.03.*above 2"):
                opt.step()
            break
        opt.step()
        scheduler.step()
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[0][name], name)
    assert opt.state_dict()["state"][0]["step"] == 1
    for group in opt.param_groups:
        group["lr"] = torch.tensor(0.03)
    with pytest.raises(ValueError, match=r"lr=0\.03.*above 2"):  # a tensor here can be looked at
        opt.step()


def test_as_far_as_allowed_it_does_not_diverge():
    param = nn.Parameter(torch.zeros(10))
    opt = LocalizedAdamW([param], lr=0.02, weight_decay=0.0, recadam=ALL_PULL)
    for step in range(50):
        param.grad = torch.zeros(10)
        opt.step()
        if step == 0:
            param.data += 1.0
    assert float(param.detach().abs().max()) == pytest.approx(1.0, rel=1e-5)


def test_a_learning_rate_on_an_accelerator_is_not_waited_for():
    """So that it cannot be refused either; reading one on the meta device would raise."""
    lr = torch.tensor(1.0, device="meta")
    check_pull(ALL_PULL, [{"lr": lr}], [1.0])
    with pytest.raises(ValueError, match="above 2"):
        check_pull(ALL_PULL, [{"lr": lr}, {"lr": torch.tensor(1.0)}], [1.0, 1.0])
