"""state_dtype and stochastic_rounding in the optimizer: what is kept, what is not lost, resume.

The generator itself is tested in test_stochastic_rounding.py.
"""

import copy
import json

import pytest
import torch
from numerics import assert_same_bits
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW

FUSED = pytest.mark.parametrize("fused", [None, False], ids=["core", "torch"])
NAMES = ("a", "b")


def make(dtype=torch.bfloat16, **options):
    torch.manual_seed(3)
    model = nn.ModuleDict({name: nn.Linear(50, 41, dtype=dtype) for name in NAMES})
    layers = LayerMap.from_model(model)
    return model, LocalizedAdamW(model.named_parameters(), layers=layers, **options)


def step(model, opt):
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    opt.step()


@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_moments_have_the_dtype_that_was_asked_for(dtype, state_dtype, fused):
    model, opt = make(dtype, state_dtype=state_dtype, fused=fused, amsgrad=True)
    for _ in range(2):
        step(model, opt)
    state = opt.state[model["a"].weight]
    keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert {state[key].dtype for key in keys} == {state_dtype or torch.float32}
    count = sum(p.numel() for p in model.parameters())
    assert opt.state_bytes() == 3 * count * (2 if state_dtype == torch.bfloat16 else 4)

    resumed, loaded = make(dtype, state_dtype=state_dtype, fused=fused, amsgrad=True)
    resumed.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    for each, one in ((model, opt), (resumed, loaded)):
        torch.manual_seed(8)
        step(each, one)
    for (name, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert_same_bits(p, q, name)
        for key in keys:
            assert_same_bits(opt.state[p][key], loaded.state[q][key], f"{name} {key}")


@FUSED
def test_bfloat16_moments_follow_float32_ones(fused):
    """With rounding to the nearer value the second moment would stay at its start's size."""
    runs = {}
    for name, options in {
        "float32": {},
        "nearest": {"state_dtype": torch.bfloat16},
        "stochastic": {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
    }.items():
        model, opt = make(torch.float32, fused=fused, lr=1e-4, **options)
        for number in range(1500):
            torch.manual_seed(number)
            for parameter in model.parameters():
                # Large gradients first: the second moment then has to decay.
                parameter.grad = torch.randn_like(parameter) * (10.0 if number < 3 else 0.1)
            opt.step()
        state = [opt.state[p]["exp_avg_sq"].float().mean() for p in model.parameters()]
        runs[name] = torch.stack(state)
    torch.testing.assert_close(runs["stochastic"], runs["float32"], rtol=0.05, atol=0)
    assert (runs["nearest"] > 2 * runs["float32"]).all(), "else the option would not be needed"


@FUSED
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_updates_too_small_for_bfloat16_are_not_lost(fused, max_grad_norm):
    """1,000 steps of 1e-5 from 1.0, where bfloat16's spacing below is 0.0039."""
    lost, kept = (
        nn.Parameter(torch.ones(4096).bfloat16()),
        nn.Parameter(torch.ones(4096).bfloat16()),
    )
    for param, rounding in ((lost, False), (kept, True)):
        opt = LocalizedAdamW(
            [param],
            lr=1e-5,
            weight_decay=0.0,
            stochastic_rounding=rounding,
            fused=fused,
            max_grad_norm=max_grad_norm,
        )
        for _ in range(1000):
            param.grad = torch.full_like(param, 0.5)
            opt.step()
    assert torch.equal(lost, torch.ones(4096).bfloat16()), "to nearest, all are lost"
    moved = 1.0 - kept.detach().double()
    # Every element walks in steps of 2^-8 below 1: variance at most 2^-8 · 0.01 an element.
    tolerance = 5 * (2**-8 * 0.01 / 4096) ** 0.5
    assert abs(float(moved.mean()) - 0.01) < tolerance


@FUSED
def test_the_seed_decides_and_is_saved(fused):
    def run(seed, steps=5):
        model, opt = make(stochastic_rounding=True, seed=seed, fused=fused)
        for number in range(steps):
            torch.manual_seed(number)
            step(model, opt)
        return model, opt

    (first, opt), (same, _), (other, _) = run(1), run(1), run(2)
    assert_same_bits(first["a"].weight, same["a"].weight, "the same seed")
    differ = (first["a"].weight != other["a"].weight).float().mean()
    assert 0.05 < differ < 0.95, "another seed"

    record = json.loads(opt.state_dict()["param_groups"][0]["localization"])
    assert record["seed"] == 1
    assert record["stochastic_rounding"] is True
    resumed, loaded = make(seed=99, fused=fused)
    resumed.load_state_dict(first.state_dict())
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    whole, _ = run(1, steps=8)
    for number in range(5, 8):
        torch.manual_seed(number)
        step(resumed, loaded)
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert_same_bits(q, p, name)


def test_a_plan_does_not_change_the_bits_of_what_trains():
    """Bits are keyed by the tensor, not by its place among those that train now."""
    plans = [LayerPlan({"a": 0, "b": 1}), LayerPlan({"a": 1, "b": 1})]
    ends = []
    for plan in plans:
        model, opt = make(stochastic_rounding=True, plan=plan)
        for number in range(4):
            torch.manual_seed(number)
            step(model, opt)
        ends.append(model["b"].weight)
    assert_same_bits(ends[0], ends[1], "b")


@pytest.mark.parametrize("simd_name", ["avx2", "plain"])
def test_the_same_bits_with_any_threads_and_instructions(simd_name, num_threads):
    from gradloc import ops

    if simd_name not in ops.build_info()["simd_available"]:
        pytest.skip(f"this processor or build has no {simd_name}")
    ends = []
    for threads, simd in ((1, "auto"), (3, simd_name)):
        num_threads(threads)
        ops.select_simd(simd)
        try:
            model, opt = make(stochastic_rounding=True, state_dtype=torch.bfloat16, amsgrad=True)
            for number in range(4):
                torch.manual_seed(number)
                step(model, opt)
        finally:
            ops.select_simd("auto")
        ends.append([t for p in model.parameters() for t in (p, *opt.state[p].values())])
    for a, b in zip(*ends, strict=True):
        assert_same_bits(a, b, simd_name)


BAD = [
    ({"state_dtype": torch.float16}, "state_dtype=torch.float16: torch.float32 or torch.bfloat16"),
    ({"seed": -1}, "seed=-1: a whole number of at least 0"),
    ({"seed": 1.5}, r"seed=1\.5: a whole number"),
    ({"dtype": torch.float16, "stochastic_rounding": True}, "'a.weight' is float16: it is for"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
