"""LocalizedAdamW where CUDA kernels do the work: as on the CPU core, and without waiting.

The judge is the same optimizer on the CPU core, which is held to torch.optim.AdamW in
test_optim*.py; on the emulated device the bits are the same. What only a GPU has (streams, graphs)
is in test_cuda_device.py, errors in emulator/test_kernels_errors.py, state dicts in
test_device_state.py.
"""

import contextlib
import copy
import math

import pytest
import torch
from device_twins import (
    NAMES,
    Twins,
    assert_unchanged,
    exact_norm,
    make_model,
    make_optimizer,
    plan_of,
    snapshot,
)
from numerics import assert_same_bits, assert_within, within_ulps
from torch import nn

from gradloc import LayerMap, LocalizedAdamW, layer_grad_norms

OPTIONS = {
    "float32": (torch.float32, {}),
    "groups": (torch.float32, {"groups": True}),
    "small-moments": (torch.float32, {"groups": True, "state_dtype": torch.bfloat16}),
    "bfloat16": (torch.bfloat16, {"groups": True}),
    "float16": (torch.float16, {"amsgrad": True, "eps": 1e-6}),
    "stochastic": (
        torch.bfloat16,
        {"stochastic_rounding": True, "seed": 5, "state_dtype": torch.bfloat16, "groups": True},
    ),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_steps_as_on_the_cpu_core(device, kind):
    dtype, options = OPTIONS[kind]
    twins = Twins(device, dtype, plan=plan_of(1, 0.5, 2), weight_decay=0.1, **options)
    for number in range(5):
        without = {"b.weight", "c.bias"} if number in (0, 3) else ()
        twins.step(without=without, scale=10.0**-number)
        twins.check(f"step {number}")
    steps = {n: float(twins.opt.state[p]["step"]) for n, p in twins.model.named_parameters()}
    assert steps == {n: 3.0 if n in ("b.weight", "c.bias") else 5.0 for n in steps}
    assert {state["step"].device.type for state in twins.opt.state.values()} == {
        device.torch_device.type
    }


def test_two_hundred_steps(device):
    """The CPU core's bits (on a GPU 16 ulps, for 200 fused multiply-adds), and torch's AdamW.

    The bound of the second is that of test_optim_long_runs.py.
    """
    start = torch.randn(3000)
    params = [
        nn.Parameter(device.to(start)),
        nn.Parameter(start.clone()),
        nn.Parameter(start.clone()),
    ]
    opt = LocalizedAdamW(params[:1])
    with device.host():
        host = LocalizedAdamW(params[1:2])
    judge = torch.optim.AdamW(params[2:])
    for _ in range(200):
        grad = torch.randn(3000)
        for param in params:
            param.grad = grad.to(param.device)
        opt.step()
        with device.host():
            host.step()
        judge.step()
    device.check(params[0], params[1], "parameter", ulps=16)
    for key, expected in host.state[params[1]].items():
        device.check(opt.state[params[0]][key], expected, key, step=key == "step", ulps=16)
    within_ulps([params[0].cpu()], [params[2]], 8, "torch.optim.AdamW")


@pytest.mark.parametrize("on_freeze", ["keep", "drop", "offload"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_plans_between_steps(device, max_grad_norm, on_freeze):
    """Deselected, a layer stays bit for bit; selected again, it goes on where it was."""
    options = {"max_grad_norm": max_grad_norm, "on_freeze": on_freeze, "amsgrad": True}
    twins = Twins(device, plan=plan_of(1, 1, 0.5), **options)
    for number, scales in enumerate([None, (1, 0, 2), None, (0, 1, 0), (0.1, 0.2, 0.3), None]):
        if scales is not None:
            for _, opt in twins.both():
                opt.set_plan(plan_of(*scales))
        plan = twins.opt.plan
        before = snapshot(twins.model, twins.opt)
        twins.step()
        after = snapshot(twins.model, twins.opt)
        for name in NAMES:
            if plan.scales[name] == 0:
                assert_unchanged(before, after, name)
            else:
                assert not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
        if max_grad_norm is None:
            twins.check(f"step {number}")
        else:  # coefficients may differ in their last bit
            pairs = zip(twins.model.parameters(), twins.host_model.parameters(), strict=True)
            for ours, host in pairs:
                assert_within(ours.cpu(), host, 1e-6 * (host.detach().abs() + 1), f"step {number}")
        norms = twins.opt.grad_norms()
        assert norms.device == device.torch_device
        assert norms.isnan().tolist() == [plan.scales[name] == 0 for name in NAMES]
        for name, norm in zip(NAMES, norms.tolist(), strict=True):
            if plan.scales[name]:
                assert norm == pytest.approx(exact_norm(twins.model[name]), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({}, ["adamw_kernel"]),
        ({"groups": True}, ["adamw_kernel"]),
        ({"max_grad_norm": 1.0}, ["norms_kernel", "adamw_kernel"]),
        ({"on_nonfinite": "skip", "groups": True}, ["norms_kernel", "adamw_kernel"]),
    ],
    ids=["step", "groups", "clip", "skip"],
)
def test_launches_of_a_step(device, options, kernels):
    twins = Twins(device, **options)
    for _ in range(2):
        twins.step()
    twins.give_gradients()
    assert device.launches(twins.opt.step) == kernels


@pytest.mark.parametrize("max_grad_norm", [0.01, 3.0, 1e6])
def test_clipping_as_torch(device, max_grad_norm):
    """Torch's clip_grad_norm_ rewrites the gradients; here they stay. Float32 norms: 1e-5."""
    model = make_model().to(device.torch_device)
    judged = copy.deepcopy(model)
    opt = make_optimizer(model, max_grad_norm=max_grad_norm)
    judge = torch.optim.AdamW(judged.parameters(), lr=0.01)
    for _ in range(4):
        for ours, theirs in zip(model.parameters(), judged.parameters(), strict=True):
            ours.grad = device.to(torch.randn(ours.shape))
            theirs.grad = ours.grad.clone()
        kept = [param.grad.clone() for param in model.parameters()]
        total = torch.nn.utils.clip_grad_norm_(judged.parameters(), max_grad_norm)
        opt.step()
        judge.step()
        assert float(opt.grad_norms().norm()) == pytest.approx(float(total), rel=1e-5)
        for param, grad in zip(model.parameters(), kept, strict=True):
            assert_same_bits(param.grad, grad)
    for ours, theirs in zip(model.parameters(), judged.parameters(), strict=True):
        assert_within(ours.cpu(), theirs.cpu(), 1e-5 * (theirs.detach().cpu().abs() + 1e-2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise", "ignore"])
def test_not_finite(device, on_nonfinite, max_grad_norm, value):
    twins = Twins(device, on_nonfinite=on_nonfinite, max_grad_norm=max_grad_norm, groups=True)
    opt, model = twins.opt, twins.model
    twins.step()
    before = snapshot(model, opt)
    for number in range(1, 3):
        twins.give_gradients()
        model["b"].weight.grad[3, 5] = value
        raises = pytest.raises(FloatingPointError, match="non-finite gradient in b: nothing")
        with raises if on_nonfinite == "raise" else contextlib.nullcontext():
            opt.step()
        if on_nonfinite == "ignore":
            assert opt.num_skipped_steps == 0
            assert model["b"].weight.isnan().any()
            return
        assert opt.num_skipped_steps == number
        assert_unchanged(before, snapshot(model, opt))
        norms = opt.grad_norms().tolist()
        assert [math.isfinite(norm) for norm in norms] == [True, False, True]
    twins.step()
    assert opt.num_skipped_steps == 2
    assert float(opt.state[model["b"].weight]["step"]) == 2.0
    # The count is saved, copied and loaded.
    state = copy.deepcopy(opt.state_dict())
    other = make_optimizer(make_model().to(device.torch_device), groups=True)
    other.load_state_dict(state)
    assert other.num_skipped_steps == 2
    other.num_skipped_steps = 0
    assert other.num_skipped_steps == 0
    assert copy.deepcopy(opt).num_skipped_steps == 2


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_grad_scaler(device, max_grad_norm):
    """Scale undone and overflow skipped on the device; the host optimizer is told the same."""
    twins = Twins(device, max_grad_norm=max_grad_norm)
    scalers = [
        torch.amp.GradScaler(kind, init_scale=2.0**10, growth_interval=2)
        for kind in (device.torch_device.type, "cpu")
    ]
    for number in range(6):
        scale = scalers[0].get_scale()
        x = torch.randn(8, 70) * (math.inf if number in (1, 4) else 1.0)
        before = snapshot(twins.model, twins.opt)
        for (model, opt), scaler in zip(twins.both(), scalers, strict=True):
            opt.zero_grad()
            here = x.to(next(model.parameters()).device)
            loss = sum(layer(here).square().mean() for layer in model.values())
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        after = snapshot(twins.model, twins.opt)
        if number in (1, 4):
            assert_unchanged(before, after)
        else:
            assert not torch.equal(before["b.weight"], after["b.weight"])
            exact = [exact_norm(twins.model[n]) / scale for n in NAMES]
            assert twins.opt.grad_norms().tolist() == pytest.approx(exact, rel=1e-5)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for ours, host in zip(twins.model.parameters(), twins.host_model.parameters(), strict=True):
            # Gradients of a GPU's matrix products differ in their last bits, or more with TF32.
            bound = 1e-6 if device.exact else 1e-3
            assert_within(ours.cpu(), host, bound * (host.detach().abs() + 1), f"step {number}")
    assert twins.opt.num_skipped_steps == twins.host.num_skipped_steps == 2
    assert not hasattr(twins.opt, "found_inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_release_gradients(device, dtype):
    """Updates during backward give the bits of a step after it."""
    found = []
    for release in (False, True):
        model = make_model(dtype).to(device.torch_device)
        opt = make_optimizer(
            model, release_gradients=release, stochastic_rounding=True, plan=plan_of(1, 0, 0.5)
        )
        torch.manual_seed(1)
        for _ in range(3):
            x = device.to(torch.randn(8, 70)).to(dtype)
            opt.zero_grad()
            sum(layer(x).square().mean() for layer in model.values()).backward()
            opt.step()
        found.append((list(model.parameters()), opt.grad_norms()))
    (params, norms), (released, released_norms) = found
    for a, b in zip(released, params, strict=True):
        assert_same_bits(a, b)
    assert_within(released_norms[[0, 2]].cpu(), norms[[0, 2]].cpu(), 1e-6 * norms[[0, 2]].cpu())


def test_learning_rate_tensors_and_schedules(device):
    """A rate on the device is read there, in the step; a scheduler changes it in place."""
    twins = Twins(device, groups=True)
    lr = device.to(torch.tensor(0.05))
    twins.opt.param_groups[1]["lr"] = lr
    for number in range(3):
        value = 0.05 / (number + 1)
        lr.fill_(value)
        twins.host.param_groups[1]["lr"] = float(torch.tensor(value))
        for opt in (twins.opt, twins.host):
            opt.param_groups[0]["lr"] = 0.03 * number
        twins.step()
        twins.check(f"step {number}")


def test_layer_norms_of_a_model(device):
    twins = Twins(device, torch.bfloat16)
    twins.give_gradients(without={"b.weight", "b.bias", "c.bias"})
    layers = LayerMap.from_model(twins.model)
    found = []
    run = device.launches(lambda: found.append(layer_grad_norms(twins.model, layers)))
    assert run.count("norms_kernel") == 1
    assert found[0].device == device.torch_device
    exact = [exact_norm(twins.model["a"]), 0.0, float(twins.model["c"].weight.grad.double().norm())]
    assert found[0].tolist() == pytest.approx(exact, rel=1e-6)
    # What was prepared serves again, also for gradients elsewhere and of another dtype.
    assert_same_bits(layer_grad_norms(twins.model, layers), found[0])
    twins.model.float()
    twins.host_model.float()
    twins.give_gradients()
    exact = [exact_norm(twins.model[name]) for name in NAMES]
    assert layer_grad_norms(twins.model, layers).tolist() == pytest.approx(exact, rel=1e-6)


def test_steps_without_any_gradient(device):
    """Nothing happens, nothing is counted, and the optimizer is as good as new."""
    twins = Twins(device, layers=None, max_grad_norm=1.0)
    everything = {name for name, _ in twins.model.named_parameters()}
    before = snapshot(twins.model, twins.opt)
    twins.step(without=everything)
    assert_unchanged(before, snapshot(twins.model, twins.opt))
    twins.step()
    after = snapshot(twins.model, twins.opt)
    twins.step(without=everything)
    assert_unchanged(after, snapshot(twins.model, twins.opt))
    assert {float(state["step"]) for state in twins.opt.state.values()} == {1.0}
