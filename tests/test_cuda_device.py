"""What only a GPU has: steps without waiting, streams, several devices, tensors past 2^31 elements.

Graphs are in test_cuda_graphs.py. Numerics of the kernels are tested on emulated and real devices
alike, in emulator/test_kernels_*.py and test_device_steps.py.
"""

import contextlib
import dataclasses
import gc
import warnings

import pytest
import torch
from cuda_cases import (
    CUDA,
    EVERY_OPTION,
    SHAPES,
    assert_all_same,
    copies,
    give_gradients,
    make_params,
)
from numerics import ULP, assert_same_bits, assert_within, make_slot, within_ulps
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW, layer_grad_norms, ops
from gradloc.reference import AdamWGroup

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda_kernels")]


@contextlib.contextmanager
def waiting_is_an_error():
    """Any wait of the host for the device that torch knows of raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- No waiting


@EVERY_OPTION
def test_steps_do_not_wait(options):
    """The first step too, in which state and tables are made."""
    params = make_params()
    opt = LocalizedAdamW(params, lr=torch.tensor(0.01, device=CUDA), **options)
    for _ in range(3):
        give_gradients(params)
        with waiting_is_an_error():
            opt.step()
            norms = opt.grad_norms()
    exact = sum(float(param.grad.double().square().sum()) for param in params) ** 0.5
    assert float(norms) == pytest.approx(exact, rel=1e-5)
    assert opt.num_skipped_steps == 0
    assert {float(opt.state[param]["step"]) for param in params} == {3.0}


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_steps_with_grad_scaler_do_not_wait(max_grad_norm):
    """Scale and overflow flag stay on the device; the judge is torch's fused AdamW, as told."""
    params = make_params(((64, 64), (64,)))
    theirs = copies(params)
    opt = LocalizedAdamW(params, lr=0.01, max_grad_norm=max_grad_norm, on_nonfinite="ignore")
    judge = torch.optim.AdamW(theirs, lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
    for number in range(4):
        give_gradients(params, theirs, scale=2.0**12)
        if number == 1:
            for param in (params[0], theirs[0]):
                param.grad[3, 3] = torch.inf
        before = [param.detach().clone() for param in params]
        scaler.scale(torch.ones((), device=CUDA))  # makes its tensors
        with waiting_is_an_error():
            # What GradScaler.step does for optimizers that take its tensors, less its own sum.
            opt.found_inf = torch.full((), float(number == 1), device=CUDA)
            opt.grad_scale = torch.full((), 2.0**12, device=CUDA)
            opt.step()
        if number == 1:
            assert_all_same(params, before)
        del opt.found_inf, opt.grad_scale
        if max_grad_norm is not None:
            scaler.unscale_(judge)
            if number != 1:
                torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        scaler.step(judge)
        scaler.update(2.0**12)
    within_ulps([p.cpu() for p in params], [p.cpu() for p in theirs], 64)
    assert opt.num_skipped_steps == 1


def test_grad_scaler_itself():
    params = make_params(((64, 64), (64,)))
    opt = LocalizedAdamW(params, lr=0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
    for number in range(3):
        loss = sum(param.square().sum() for param in params) * (torch.inf if number == 1 else 1.0)
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    assert opt.num_skipped_steps == 1
    assert scaler.get_scale() == 2.0**11
    assert {float(opt.state[param]["step"]) for param in params} == {2.0}


# --- Streams


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_on_another_stream(max_grad_norm):
    """Ordered by events alone: gradients come late on their stream, and results are read on it."""
    params = make_params(((2000, 1000), (77,)))
    theirs = copies(params)
    opt = LocalizedAdamW(params, lr=0.01, max_grad_norm=max_grad_norm)
    judge = LocalizedAdamW(theirs, lr=0.01, max_grad_norm=max_grad_norm)
    side = torch.cuda.Stream()
    found = []
    for _ in range(3):
        give_gradients(params, theirs)
        late = [param.grad.clone() for param in params]
        for param in params:
            param.grad.zero_()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # some milliseconds, so that a step elsewhere is early
            for param, grad in zip(params, late, strict=True):
                param.grad.copy_(grad)
                grad.record_stream(side)
            opt.step()
            found.append(([param.detach().clone() for param in params], opt.grad_norms()))
        torch.cuda.current_stream().wait_stream(side)
        judge.step()
        assert_all_same(found[-1][0], theirs)
        assert_same_bits(found[-1][1], judge.grad_norms())


def test_layer_norms_on_another_stream():
    model = nn.ModuleDict({name: nn.Linear(500, 500) for name in "ab"}).to(CUDA)
    layers = LayerMap.from_model(model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for param in model.parameters():
            param.grad.fill_(2.0)
        norms = layer_grad_norms(model, layers)
        expected = [2 * 250_500**0.5] * 2
        assert norms.tolist() == pytest.approx(expected, rel=1e-6)


# --- Addresses, devices, memory


def test_gradients_elsewhere_in_every_step():
    """As after zero_grad(set_to_none=True), with the host a hundred steps ahead of the device."""
    params = make_params(SHAPES * 3)
    theirs = copies(params)
    opt, judge = LocalizedAdamW(params), LocalizedAdamW(theirs)
    draw = torch.Generator(CUDA).manual_seed(1)
    seen = set()
    torch.cuda._sleep(100_000_000)
    for _ in range(100):
        before = [param.grad for param in params]  # so that the next ones lie elsewhere
        opt.zero_grad(set_to_none=True)
        for param in params:
            param.grad = torch.randn(param.shape, generator=draw, device=CUDA)
        seen.add(params[0].grad.data_ptr())
        opt.step()
        del before
    assert len(seen) > 1
    draw.manual_seed(1)
    for _ in range(100):
        for param in theirs:
            param.grad = torch.randn(param.shape, generator=draw, device=CUDA)
        judge.step()
        torch.cuda.synchronize()
    assert_all_same(params, theirs)


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_many_tensors_with_the_host_ahead(max_grad_norm):
    """Past 4,000 tensors addresses come through pinned memory, which must not be reused early."""
    params = make_params([(1 + i % 7,) for i in range(4200)])
    theirs = copies(params)
    opt = LocalizedAdamW(params, max_grad_norm=max_grad_norm)
    judge = LocalizedAdamW(theirs, max_grad_norm=max_grad_norm)
    sets = [[torch.randn_like(param) for param in params] for _ in range(4)]
    torch.cuda.synchronize()
    for one, chosen, wait in ((opt, params, False), (judge, theirs, True)):
        if not wait:
            torch.cuda._sleep(100_000_000)
        for grads in sets:
            for param, grad in zip(chosen, grads, strict=True):
                param.grad = grad
            one.step()
            if wait:
                torch.cuda.synchronize()
    assert_all_same(
        [torch.cat([p.detach() for p in params])], [torch.cat([p.detach() for p in theirs])]
    )


def test_two_devices():
    """A part on each; clipping and skipping by the norm over both."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1)
    params = [*make_params(((100, 50),)), *make_params(((70,), (30, 3)), device=other)]
    theirs = [nn.Parameter(param.detach().to(CUDA)) for param in params]
    opt = LocalizedAdamW(params, lr=0.01, max_grad_norm=0.5)
    judge = LocalizedAdamW(theirs, lr=0.01, max_grad_norm=0.5)
    for number in range(4):
        for ours, alone in zip(params, theirs, strict=True):
            ours.grad = torch.randn_like(ours)
            if number == 2 and ours.device == other:
                ours.grad.fill_(torch.nan)
            alone.grad = ours.grad.to(CUDA)
        opt.step()
        judge.step()
        assert torch.cuda.current_device() == 0
    within_ulps([p.cpu() for p in params], [p.cpu() for p in theirs], 8)
    assert opt.num_skipped_steps == judge.num_skipped_steps == 1
    with torch.cuda.device(1):  # all parameters of one optimizer on a device that is not current
        alone = LocalizedAdamW(theirs)
        alone.step()
        assert torch.cuda.current_device() == 1


def test_a_gradient_on_another_device():
    params = make_params()
    opt = LocalizedAdamW(params)
    give_gradients(params)
    opt.step()
    before = [param.detach().clone() for param in params]
    here, params[1].data = params[1].data, params[1].data.cpu()
    if params[1].grad.device == CUDA:
        with pytest.raises(ValueError, match="device="):
            opt.step()
    params[1].data = here
    assert_all_same(params, before)
    assert {float(opt.state[param]["step"]) for param in params} == {1.0}


def needs_memory(num_bytes):
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(CUDA)
    if free < num_bytes * 1.1:
        pytest.skip(f"needs {num_bytes / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")


def test_a_tensor_past_two_to_the_31():
    """Norms and AdamW in bfloat16: what stands past 2^31 elements, and past 4 GiB, is reached."""
    size = 2**31 + 5
    needs_memory(5 * 2 * size)
    param = torch.full((size,), 0.5, dtype=torch.bfloat16, device=CUDA)
    grad = torch.zeros_like(param)
    marks = [0, 2**30 + 3, 2**31 - 1, 2**31, size - 1]
    grad[marks] = torch.arange(1.0, 6.0, device=CUDA).to(torch.bfloat16)
    norms = ops.NativeNorms([size], [0], 1, CUDA)
    assert norms.norm_sq([grad]).tolist() == [55.0]
    slot = make_slot(param, moment_dtype=torch.bfloat16)
    slot = dataclasses.replace(slot, step=slot.step.to(CUDA))
    work = ops.NativeAdamW([slot], 1)
    group = AdamWGroup(lr=0.125, beta1=0.5, beta2=0.75, eps=1e-8, weight_decay=0.0, maximize=False)
    sums = work.step(work.gather([grad]), [group], [1.0], 1.0, with_norms=True, rounding_seed=None)
    assert sums.tolist() == [55.0]
    # The first step goes against the gradient's sign by lr; elsewhere nothing moves.
    assert param[marks].tolist() == [0.375] * 5
    assert slot.exp_avg[marks].tolist() == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert int(torch.count_nonzero(slot.exp_avg)) == 5
    param[marks] = 0.5
    # In pieces: a comparison of the whole would take as much memory again.
    assert all(bool((piece == 0.5).all()) for piece in param.split(2**28))


@pytest.mark.parametrize("on_freeze", ["drop", "offload"])
def test_memory_of_frozen_layers_is_freed(on_freeze):
    model = nn.ModuleDict({name: nn.Linear(1024, 1024, bias=False) for name in "ab"}).to(CUDA)
    layers = LayerMap.from_model(model)
    opt = LocalizedAdamW(model.named_parameters(), lr=0.1, layers=layers, on_freeze=on_freeze)
    give_gradients(list(model.parameters()))
    opt.step()
    state = opt.state[model["b"].weight]
    moments = {key: state[key].cpu() for key in ("exp_avg", "exp_avg_sq")}
    del state
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    opt.set_plan(LayerPlan({"a": 1.0, "b": 0.0}))
    opt.step()
    gc.collect()
    freed = before - torch.cuda.memory_allocated()
    wanted = 2 * 4 * 1024 * 1024
    assert wanted * 0.99 <= freed <= wanted * 1.01 + 2**20, f"{freed} bytes of {wanted}"
    opt.set_plan(None)
    state = opt.state.get(model["b"].weight, {})
    if on_freeze == "offload":
        for key, expected in moments.items():
            assert_same_bits(state[key].cpu(), expected, key)
        assert state["exp_avg"].device == CUDA
    else:
        assert not state


# --- Long runs


# What the host knows in float64 and kernels take as float32: errors of every step in one direction.
DECAY_ERROR = abs(float(torch.tensor(1 - 1e-5)) - (1 - 1e-5))
BETA2_ERROR = abs(float(torch.tensor(0.999)) - 0.999)


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_thousand_steps_as_torch(kind):
    """Stated bounds: those of test_optim_long_runs.py for foreach; fused has other constants.

    Against foreach (which rounds lr, betas and decay to float32 where ours does) 8 ulps of a
    parameter of size up to 1. Torch's fused kernel multiplies by other float32 neighbours of
    1 - lr·decay and of 1 - beta2, or by float64 (in older versions). Over 1,000 steps this adds
    1,000 times the error of the one to the parameter, and up to 1,000 times that of the other,
    relatively, to the second moment; half of it shows in each update, of which each is lr at most.
    That makes 170 ulps.
    """
    size, num_steps = 5000, 1000
    start = torch.randn(size, device=CUDA)
    scale = torch.randn(size, device=CUDA).mul(3).exp()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opt, judge = LocalizedAdamW([ours]), torch.optim.AdamW([theirs], **{kind: True})
    for _ in range(num_steps):
        ours.grad = torch.randn(size, device=CUDA) * scale
        theirs.grad = ours.grad.clone()
        opt.step()
        judge.step()
    drift_v = num_steps * BETA2_ERROR if kind == "fused" else 0.0
    drift = num_steps * (DECAY_ERROR + 1e-3 * drift_v / 2) if kind == "fused" else 0.0
    within_ulps([ours.cpu()], [theirs.cpu()], 8 + drift / ULP)
    state = {key: tensor.cpu() for key, tensor in opt.state[ours].items()}
    wanted = {key: tensor.cpu() for key, tensor in judge.state[theirs].items()}
    v = wanted["exp_avg_sq"]
    assert_within(state["exp_avg_sq"], v, (16 * ULP + drift_v) * v, "exp_avg_sq")
    assert_within(state["exp_avg"], wanted["exp_avg"], 16 * ULP * v.sqrt(), "exp_avg")
    assert float(state["step"]) == float(wanted["step"]) == num_steps


def test_the_same_bits_in_every_run():
    """Blocks come in another order every time; a race would show in some run."""
    params = make_params(((700, 900), (3000, 100), *([(33,)] * 200)), dtype=torch.bfloat16)
    grads = [torch.randn_like(param) for param in params]
    found = []
    for _ in range(20):
        mine = copies(params)
        opt = LocalizedAdamW(mine, max_grad_norm=0.1, stochastic_rounding=True)
        for param, grad in zip(mine, grads, strict=True):
            param.grad = grad
        for _ in range(3):
            opt.step()
        found.append([*(param.detach() for param in mine), opt.grad_norms()])
    for other in found[1:]:
        assert_all_same(other, found[0])
