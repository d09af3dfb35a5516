"""What the norms kernel decides about a step, and that AdamW follows: clipping, skipping, scales.

A control is three float32 on the device: the coefficient of the gradients, whether the step is
skipped, and how many were so far. `GradScaler` in earnest is in test_device_steps.py.
"""

import dataclasses
import math

import pytest
import torch
from numerics import CHUNK, assert_same_bits, make_slot, tensors_of

from gradloc import ops
from gradloc.ops_cuda import Decision
from gradloc.reference import AdamWGroup

GROUP = AdamWGroup(lr=0.02, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, maximize=False)
SCALES = [1.0, 0.3]
START = [0.25, 7.0, 2.0]  # of the control: the first two are written, the third counted up


def case(device, maximize=False):
    group = dataclasses.replace(GROUP, maximize=maximize)
    hosts = [
        make_slot(torch.randn(size), layer=i % 2, amsgrad=i == 1)
        for i, size in enumerate((CHUNK + 9, 300, 2))
    ]
    for slot in hosts:
        slot.exp_avg.normal_()
        slot.exp_avg_sq.uniform_(0.1, 1)
    grads = [torch.randn_like(slot.param) for slot in hosts]
    slots = [device.slot(slot) for slot in hosts]
    return group, hosts, grads, slots, ops.NativeAdamW(slots, 2)


def number(device, value):
    return None if value is None else device.to(torch.tensor([value]))


def decide(device, work, grads, *, max_norm=None, skip=False, found_inf=None, grad_scale=None):
    """The control, and the sums of squares."""
    control = device.to(torch.tensor(START))
    decision = Decision(
        control, max_norm, skip, number(device, found_inf), number(device, grad_scale)
    )
    gathered = work.gather([device.to(grad) for grad in grads])
    return control, work.norm_sq(gathered, SCALES, decision), gathered


def total_norm(grads):
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))


@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize("grad_scale", [None, 1.0, 1024.0, 3.0])
@pytest.mark.parametrize("max_norm", [None, 0.01, 1.0, 1e9])
def test_clipping_and_scales(device, max_norm, grad_scale, maximize):
    group, hosts, grads, slots, work = case(device, maximize)
    grads = [grad * (grad_scale or 1.0) for grad in grads]
    control, sums, gathered = decide(device, work, grads, max_norm=max_norm, grad_scale=grad_scale)
    unscale = 1 / (grad_scale or 1.0)
    norm = total_norm(grads) * unscale
    coef = unscale * (1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6)))
    ours, skip, num_skipped = control.tolist()
    assert ours == pytest.approx(coef, rel=1e-6)
    assert (skip, num_skipped) == (0.0, 2.0)
    assert float(sums.sum().sqrt()) == pytest.approx(total_norm(grads), rel=1e-6)
    work.step(gathered, [group], SCALES, control, with_norms=False, rounding_seed=None)
    with device.host():
        host_work = ops.NativeAdamW(hosts, 2)
        host_work.step(
            host_work.gather(grads), [group], SCALES, ours, with_norms=False, rounding_seed=None
        )
    for i, (slot, host) in enumerate(zip(slots, hosts, strict=True)):
        device.check_slot(slot, host, f"tensor {i}")


# (what the gradients hold, skip_nonfinite, found_inf, grad_scale) -> skipped
SKIPS = [
    (None, False, None, None, False),
    (None, True, None, None, False),
    (math.nan, True, None, None, True),
    (math.inf, True, None, 8.0, True),
    (-math.inf, True, 0.0, None, True),
    (math.nan, False, None, None, False),
    (None, False, 1.0, None, True),
    (None, True, 1.0, 8.0, True),
    (None, True, 0.0, 8.0, False),
    (math.inf, False, 1.0, 8.0, True),
    (3e38, True, None, None, False),  # its square is no float32, the norm is finite
]


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize(("value", "skip", "found_inf", "grad_scale", "skipped"), SKIPS)
def test_skipped_steps(device, value, skip, found_inf, grad_scale, skipped, max_norm, with_norms):
    """A skipped step changes nothing, bit for bit, and leaves its norms unmeasured."""
    group, _, grads, slots, work = case(device)
    if value is not None:
        grads[0][CHUNK + 1] = value
    control, sums, gathered = decide(
        device,
        work,
        grads,
        max_norm=max_norm,
        skip=skip,
        found_inf=found_inf,
        grad_scale=grad_scale,
    )
    assert control.tolist()[1:] == [float(skipped), 2.0 + skipped]
    assert math.isfinite(float(sums[0])) == (value is None or math.isfinite(value))
    before = [device.slot(slot) for slot in slots]
    taken = work.step(gathered, [group], SCALES, control, with_norms=with_norms, rounding_seed=None)
    for slot, was in zip(slots, before, strict=True):
        for name, tensor in tensors_of(slot).items():
            if skipped:
                assert_same_bits(tensor, tensors_of(was)[name], name)
            else:
                assert not torch.equal(tensor, tensors_of(was)[name]), name
    if with_norms:
        assert bool(taken.isnan().all()) == skipped
    # The next step is an ordinary one: nothing of this launch is left in its scratch memory.
    if skipped:
        grads = [torch.ones_like(grad) for grad in grads]
        control, sums, gathered = decide(device, work, grads, skip=True)
        assert sums.tolist() == [CHUNK + 11.0, 300.0]
        sums = work.step(gathered, [group], SCALES, control, with_norms=True, rounding_seed=None)
        assert sums.tolist() == [CHUNK + 11.0, 300.0]
        assert [float(slot.step) for slot in slots] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_nan_without_skipping_is_clipped_as_torch_does(device, max_norm):
    """The coefficient is NaN, as clip_grad_norm_'s; without clipping it is what it was."""
    _, _, grads, _, work = case(device)
    grads[1][0] = math.nan
    control, _, _ = decide(device, work, grads, max_norm=max_norm)
    assert math.isnan(control.tolist()[0]) == (max_norm is not None)
    grads[1][0] = math.inf
    control, _, _ = decide(device, work, grads, max_norm=max_norm)
    assert control.tolist()[0] == (1.0 if max_norm is None else 0.0)


def test_counts_over_several_steps(device):
    *_, grads, slots, work = case(device)
    control = device.to(torch.zeros(3))
    bad = [grad.clone() for grad in grads]
    bad[2][0] = math.nan
    for turn, now in enumerate((grads, bad, bad, grads, bad)):
        gathered = work.gather([device.to(grad) for grad in now])
        work.norm_sq(gathered, SCALES, Decision(control, 1.0, True))
        work.step(gathered, [GROUP], SCALES, control, with_norms=False, rounding_seed=None)
        assert control.tolist()[2] == [0, 1, 2, 2, 3][turn]
    assert [float(slot.step) for slot in slots] == [2.0] * 3


def test_only_empty_tensors(device):
    slots = [device.slot(make_slot(torch.zeros(0), layer=1))]
    work = ops.NativeAdamW(slots, 2)
    control, sums, gathered = decide(device, work, [torch.zeros(0)], max_norm=1.0, skip=True)
    assert control.tolist() == [1.0, 0.0, 2.0]
    assert sums.tolist() == [0.0, 0.0]
    work.step(gathered, [GROUP], SCALES, control, with_norms=False, rounding_seed=None)
    assert float(slots[0].step) == 1.0
