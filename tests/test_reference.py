"""The specification itself: gradloc.reference in float64 against torch in float64."""

import math

import pytest
import torch
from numerics import DTYPES, assert_same_bits, assert_within, make_slot

from gradloc import reference
from gradloc.reference import AdamWGroup


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("lr", "betas", "eps", "weight_decay"),
    [(1e-3, (0.9, 0.999), 1e-8, 1e-2), (0.3, (0.5, 0.7), 1e-3, 0.4), (1e-2, (0.0, 0.0), 1e-8, 0.0)],
)
def test_is_torchs_adamw_in_float64(lr, betas, eps, weight_decay, amsgrad, maximize):
    """20 steps; both round a handful of times a step, hence 1e-13 of values around 1."""
    theirs = torch.nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
    slot = make_slot(theirs.detach().clone(), amsgrad=amsgrad)
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    judge = torch.optim.AdamW(
        [theirs], **options, amsgrad=amsgrad, maximize=maximize, foreach=False
    )
    group = AdamWGroup(lr, *betas, eps, weight_decay, maximize)
    for i in range(20):
        theirs.grad = torch.randn(5, 7, dtype=torch.float64) * 10.0 ** -(i % 5)
        judge.step()
        reference.adamw_step(
            slot.param,
            theirs.grad,
            slot.exp_avg,
            slot.exp_avg_sq,
            slot.max_exp_avg_sq,
            slot.step,
            group=group,
        )
    state = judge.state[theirs]
    assert float(slot.step) == float(state["step"]) == 20
    assert_within(slot.param, theirs, 1e-13, "param")
    assert_within(slot.exp_avg, state["exp_avg"], 1e-13, "exp_avg")
    assert_within(slot.exp_avg_sq, state["exp_avg_sq"], 1e-13, "exp_avg_sq")
    if amsgrad:
        assert_within(slot.max_exp_avg_sq, state["max_exp_avg_sq"], 1e-13, "max_exp_avg_sq")


def test_scale_and_clipping_are_the_learning_rates_and_the_gradients():
    group = AdamWGroup(1e-2, 0.9, 0.99, 1e-8, 0.1, maximize=False)
    scaled = make_slot(torch.randn(9, dtype=torch.float64))
    plain = make_slot(scaled.param.clone())
    for _ in range(3):
        grad = torch.randn(9, dtype=torch.float64)
        for slot, g, scale, coef in ((scaled, grad, 0.3, 0.25), (plain, grad * 0.25, 1.0, 1.0)):
            used = group if scale != 1 else AdamWGroup(3e-3, 0.9, 0.99, 1e-8, 0.1, False)
            reference.adamw_step(
                slot.param,
                g,
                slot.exp_avg,
                slot.exp_avg_sq,
                None,
                slot.step,
                group=used,
                lr_scale=scale,
                clip_coef=coef,
            )
    assert_within(scaled.param, plain.param, 1e-15, "param")


def test_layer_norms():
    grads = [torch.tensor([3.0, 4.0]), None, torch.tensor([[1e5]]).half(), torch.ones(3).double()]
    grads[2][0] = 300.0
    found = reference.layer_norm_sq(grads, [1, 0, 3, 1], 5)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([0, 28, 0, 90_000, 0])
    assert reference.layer_norm_sq([None], [0], 2).tolist() == [0, 0]


@pytest.mark.parametrize("norm", [0.0, 0.5, 0.999999, 1.0, 3.7, 1e30])
def test_clip_coefficient_is_clip_grad_norms(norm):
    """clip_grad_norm_ computes in the gradients' dtype, here float64."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    parameter.grad = torch.tensor([norm], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    ours = norm * reference.clip_coefficient(norm, 1.0)
    assert ours == pytest.approx(float(parameter.grad), rel=1e-15)
    as_tensor = reference.clip_coefficient(torch.tensor(norm, dtype=torch.float64), 1.0)
    assert norm * float(as_tensor) == pytest.approx(ours, rel=1e-15)


def test_clip_coefficient_of_a_nonfinite_norm():
    assert math.isnan(reference.clip_coefficient(math.nan, 1.0))
    assert reference.clip_coefficient(math.inf, 1.0) == 0
    assert reference.clip_coefficient(5.0, math.inf) == 1
    assert reference.clip_coefficient(torch.tensor(math.nan), 1.0).isnan()


def test_moments_are_at_least_float32():
    for dtype in DTYPES:
        assert reference.compute_dtype(dtype) == torch.float32
    assert reference.compute_dtype(torch.float64) == torch.float64


def test_half_width_parameters_are_rounded_once():
    """From float32, at the end of the step: a small update of a bfloat16 parameter is not lost."""
    start = torch.ones(1, dtype=torch.bfloat16)
    slot = make_slot(start.clone())
    group = AdamWGroup(0.004, 0.9, 0.99, 0.0, 0.0, maximize=False)
    reference.adamw_step(
        slot.param, start, slot.exp_avg, slot.exp_avg_sq, None, slot.step, group=group
    )
    assert_same_bits(slot.param, torch.tensor([0.996], dtype=torch.bfloat16), "param")
