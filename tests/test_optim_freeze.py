"""on_freeze: where the moments of frozen layers go, that they come back, what memory is left."""

import copy
import gc
import os
import random
from pathlib import Path

import pytest
import torch
from numerics import assert_same_bits
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW

NAMES = tuple("abcdefgh")
MODES = pytest.mark.parametrize("mode", ["keep", "offload", "drop"])


def make(mode, width=33, **options):
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(width, 17 + i) for i, name in enumerate(NAMES)})
    opt = LocalizedAdamW(
        model.named_parameters(),
        lr=0.01,
        layers=LayerMap.from_model(model),
        plan=plan_of(NAMES),
        on_freeze=mode,
        **options,
    )
    return model, opt


def plan_of(active):
    return LayerPlan({name: float(name in active) for name in NAMES})


def step(model, opt):
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    opt.step()


def moments_of(active, model, times=2):
    return times * 4 * sum(p.numel() for name in active for p in model[name].parameters())


@MODES
def test_bytes_after_twenty_random_plans(mode):
    model, opt = make(mode)
    step(model, opt)
    drawn = random.Random(5)
    visited = set()
    for _ in range(20):
        active = drawn.sample(NAMES, 2)  # a quarter
        opt.set_plan(plan_of(active))
        step(model, opt)
        visited.update(active)
        everything = moments_of(NAMES, model)
        here = moments_of(active, model)
        assert opt.state_bytes() == (everything if mode == "keep" else here)
        assert opt.offloaded_bytes() == (everything - here if mode == "offload" else 0)
    assert len(visited) > 4, "the plans were different ones"


def test_offloaded_and_dropped_moments_are_no_longer_in_memory():
    """Counted by the tensors that are alive, not by the optimizer's own word."""
    # A width of its own: other tests' tensors may still be alive.
    for mode, width, offloaded in (("drop", 41, 0), ("offload", 43, 2 * 7)):
        model, opt = make(mode, width)
        params = {p.data_ptr() for p in model.parameters()}

        def moments_alive(width=width, params=params):
            gc.collect()
            found = [t for t in gc.get_objects() if type(t) is torch.Tensor]
            found = [t for t in found if t.dim() == 2 and t.shape[1] == width]
            return {t.data_ptr() for t in found} - params

        step(model, opt)
        opt.zero_grad()
        held = moments_alive()
        assert len(held) == 2 * 8
        opt.set_plan(plan_of("a"))
        left = moments_alive()
        assert len(left) == 2 + offloaded
        assert len(left & held) == 2, "what is offloaded lies elsewhere: in files"
        maps = Path("/proc/self/maps")
        if offloaded and maps.exists():
            assert maps.read_text().count("gradloc-moments-") >= offloaded


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_offloading_changes_no_bit(dtype):
    pairs = [make(mode, state_dtype=dtype, amsgrad=True) for mode in ("keep", "offload")]
    drawn = random.Random(3)
    for _ in range(12):
        active = drawn.sample(NAMES, 3)
        seed = drawn.random()
        for model, opt in pairs:
            opt.set_plan(plan_of(active))
            torch.manual_seed(int(seed * 1e6))
            step(model, opt)
    (model, kept), (other, offloaded) = pairs
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_same_bits(a, b, name)
        for key in kept.state.get(a, {}):
            assert_same_bits(kept.state[a][key], offloaded.state[b][key], f"{name} {key}")


def test_a_dropped_layer_starts_afresh():
    model, opt = make("drop")
    for _ in range(3):
        step(model, opt)
    opt.set_plan(plan_of("a"))
    assert all(p not in opt.state for p in model["b"].parameters())
    step(model, opt)
    opt.set_plan(plan_of("ab"))
    twin = nn.Parameter(model["b"].weight.detach().clone())
    judge = torch.optim.AdamW([twin], lr=0.01)
    step(model, opt)
    twin.grad = model["b"].weight.grad.clone()
    judge.step()
    torch.testing.assert_close(model["b"].weight, twin, rtol=1e-6, atol=1e-7)
    assert int(opt.state[model["b"].weight]["step"]) == 1
    assert int(opt.state[model["a"].weight]["step"]) == 5


def test_offloaded_moments_are_saved_loaded_and_copied():
    model, opt = make("offload")
    for _ in range(2):
        step(model, opt)
    opt.set_plan(plan_of("ab"))
    step(model, opt)
    other, loaded = make("offload")
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch shares the tensors
    clone, copied = copy.deepcopy((model, opt))
    for one in (loaded, copied):
        assert one.plan.active == ("a", "b")
        assert one.state_bytes() == opt.state_bytes() == moments_of("ab", model)
        assert one.offloaded_bytes() == opt.offloaded_bytes() > 0
    for each, one in ((model, opt), (other, loaded), (clone, copied)):
        one.set_plan(plan_of(NAMES))
        torch.manual_seed(9)
        step(each, one)
    for name, parameter in model.named_parameters():
        assert_same_bits(other.get_parameter(name), parameter, name)
        assert_same_bits(clone.get_parameter(name), parameter, name)


def test_no_room_to_offload_leaves_all_as_it_was(monkeypatch):
    model, opt = make("offload")
    step(model, opt)

    def full(*_):
        raise OSError(28, "No space left on device")

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        opt.set_plan(plan_of("a"))
    assert opt.plan.active == NAMES, "the old plan is in force"
    monkeypatch.undo()
    step(model, opt)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_moments_with_gaps_are_offloaded_too():
    model, opt = make("offload")
    step(model, opt)
    state = opt.state[model["b"].weight]
    values = torch.randn_like(state["exp_avg"])
    state["exp_avg"] = torch.cat([values, values], dim=1)[:, : values.shape[1]]
    opt.set_plan(plan_of("a"))
    assert_same_bits(state["exp_avg"], values, "as it was")
    opt.set_plan(plan_of(NAMES))
    step(model, opt)


def test_a_failure_of_any_kind_leaves_the_old_plan(monkeypatch):
    model, opt = make("offload")
    step(model, opt)
    real, calls = torch.from_file, []

    def third_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("unable to mmap")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "from_file", third_fails)
    with pytest.raises(RuntimeError, match="unable to mmap"):
        opt.set_plan(plan_of("a"))
    monkeypatch.undo()
    assert opt.plan.active == NAMES
    assert opt.offloaded_bytes() == 0
    step(model, opt)
    opt.set_plan(plan_of("a"))
    assert opt.state_bytes() == moments_of("a", model)


def test_in_inference_mode():
    model, opt = make("offload", fused=False)
    step(model, opt)
    opt.set_plan(plan_of("a"))
    with torch.inference_mode():
        opt.set_plan(plan_of(NAMES))
    step(model, opt)


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="on_freeze='discard': choose 'keep', 'offload' or 'drop'"):
        make("discard")


@pytest.mark.cuda
def test_device_memory_after_twenty_random_plans():
    for mode in ("offload", "drop"):
        model, opt = make(mode)
        model.cuda()
        opt = LocalizedAdamW(
            model.named_parameters(), layers=opt.layers, plan=plan_of(NAMES), on_freeze=mode
        )
        drawn = random.Random(5)
        step(model, opt)
        opt.zero_grad()
        torch.cuda.synchronize()
        full = torch.cuda.memory_allocated()
        for _ in range(20):
            active = drawn.sample(NAMES, 2)
            opt.set_plan(plan_of(active))
            step(model, opt)
            opt.zero_grad()
        torch.cuda.synchronize()
        freed = full - torch.cuda.memory_allocated()
        expected = moments_of(NAMES, model) - moments_of(active, model)
        slack = 512 * 4 * len(NAMES)  # the allocator hands out multiples of 512 bytes
        assert abs(freed - expected) <= slack, mode
