"""Steps on a device that must not go wrong quietly: missing gradients, captures, odd scaler values.

Each case was found by reading, after the tests of what the kernels compute had all passed: they
compare parameters after ordinary steps, in which none of this happens.
"""

import math

import pytest
import torch
from numerics import assert_same_bits
from torch import nn

from gradloc import LayerMap, LocalizedAdamW, layer_grad_norms, ops_cuda, optim_work

emulated = pytest.mark.parametrize("device", ["emulator"], indirect=True)


def make(device, dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(device.to(torch.randn(n).to(dtype))) for n in (300, 7, 2100)]
    return params, LocalizedAdamW(params, lr=0.05, **options)


def give(device, params, seed, skip=()):
    torch.manual_seed(seed)
    for i, param in enumerate(params):
        grad = device.to(torch.randn(param.shape).to(param.dtype))
        param.grad = None if i in skip else grad


def state_of(params, opt):
    found = [tensor.detach().clone() for tensor in params]
    return found + [value.clone() for param in params for value in opt.state[param].values()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_that_comes_and_goes(device, monkeypatch, dtype):
    """A missing gradient has no dtype: tables, which a graph may read too, stay as they are."""
    uploads = []
    host = ops_cuda.CudaTables._host
    monkeypatch.setattr(
        ops_cuda.CudaTables, "_host", lambda self, size: uploads.append(size) or host(self, size)
    )
    results = []
    for on_device in (True, False):
        with device.host() if not on_device else torch.no_grad():
            here = device if on_device else Host
            params, opt = make(here, dtype)
            for step, skip in enumerate([(), (0,), (), (1, 2), ()]):
                give(here, params, step, skip)
                opt.step()
            results.append(state_of(params, opt))
    assert len(uploads) == 1
    for ours, expected in zip(*results, strict=True):
        device.check(ours, expected, "after gradients came and went")


class Host:
    """The CPU, in the place of a device."""

    @staticmethod
    def to(tensor):
        return tensor.clone()


def test_tables_follow_dtypes_that_change(device):
    params, opt = make(device, torch.bfloat16)
    for step, dtype in enumerate([torch.bfloat16, torch.float32, torch.bfloat16]):
        for param in params:
            param.grad_dtype = None
        give(device, params, step)
        for param in params:
            param.grad = param.grad.to(dtype)
        expected = torch.stack([param.grad.double().square().sum() for param in params]).sum()
        opt.step()
        torch.testing.assert_close(
            opt.grad_norms().double().square()[0], expected, rtol=1e-5, atol=0
        )


@emulated
@pytest.mark.parametrize("before", ["first step", "after set_plan"])
def test_what_a_capture_refuses_leaves_no_trace(device, monkeypatch, before):
    """What is made in a capture is filled when the graph runs; a step before would use it empty."""

    def refuse(where):
        raise RuntimeError("captured")

    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3))
    twin_model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3))
    twin_model.load_state_dict(model.state_dict())
    made = []
    for each in (model, twin_model):
        layers = LayerMap.from_model(each, granularity="tensor")
        opt = LocalizedAdamW(each.named_parameters(), lr=0.1, layers=layers, max_grad_norm=0.5)
        made.append((list(each.parameters()), opt))
    (params, opt), (twin_params, twin) = made
    if before == "after set_plan":
        for each_params, each in made:
            give(device, each_params, 0)
            each.step()
            each.set_plan(None)
    give(device, params, 1)
    give(device, twin_params, 1)
    states = len(opt.state)
    with monkeypatch.context() as patch:
        patch.setattr(optim_work, "refuse_capture", refuse)
        with pytest.raises(RuntimeError, match="captured"):
            opt.step()
    assert len(opt.state) == states
    opt.step()
    twin.step()
    for ours, expected in zip(state_of(params, opt), state_of(twin_params, twin), strict=True):
        assert_same_bits(ours, expected, before)
    assert_same_bits(opt.grad_norms(), twin.grad_norms(), "norms")


def test_refuse_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"run an ordinary step before torch.cuda.graph"):
        ops_cuda.refuse_capture(torch.device("cuda"))
    ops_cuda.refuse_capture(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ops_cuda.refuse_capture(torch.device("cuda"))


@emulated
@pytest.mark.parametrize("where", ["device", "host"])
def test_norms_of_gradients_without_memory(device, where):
    """Zeros that autograd did not write are zeros; memory that was freed is an error, no crash."""
    model = nn.Linear(40, 3)
    layers = LayerMap.from_model(model, granularity="tensor")
    model.weight.grad = torch._efficientzerotensor((3, 40))
    model.bias.grad = torch.full((3,), 2.0)
    with device.host() if where == "host" else torch.no_grad():
        norms = layer_grad_norms(model, layers).tolist()
        assert norms == pytest.approx([0.0, math.sqrt(12.0)])
        model.weight.grad = torch.ones(3, 40)
        model.weight.grad.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"a gradient of shape \(3, 40\) has no memory"):
            layer_grad_norms(model, layers)


@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "tensors"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_scaler_values_of_any_kind(device, numbers, max_grad_norm):
    params, opt = make(device, max_grad_norm=max_grad_norm)
    twin_params, twin = make(device, max_grad_norm=max_grad_norm)
    wrap = float if numbers else (lambda value: torch.tensor([float(value)], dtype=torch.float64))
    for step, found_inf in enumerate([0, 1, 0]):
        give(device, params, step)
        give(device, twin_params, step)
        for param in params:
            param.grad.mul_(1024.0)
        opt.found_inf, opt.grad_scale = wrap(found_inf), wrap(1024)
        before = state_of(params, opt) if found_inf else []
        opt.step()
        if found_inf:
            for now, then in zip(state_of(params, opt), before, strict=True):
                assert_same_bits(now, then, "a skipped step")
        else:
            twin.step()
    assert opt.num_skipped_steps == 1
    for ours, expected in zip(state_of(params, opt), state_of(twin_params, twin), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [False, True])
def test_an_infinite_max_grad_norm_is_that_of_torch(device, bad):
    """There inf / inf is NaN, and finite norms are not clipped."""
    params, opt = make(device, max_grad_norm=math.inf, on_nonfinite="ignore")
    give(device, params, 0)
    if bad:
        params[0].grad[3] = math.inf
    opt.step()
    assert bool(params[2].isnan().all()) is bad
    assert not bad or opt.num_skipped_steps == 0
