"""LocalizedAdamW with RecAdam where CUDA kernels do the work: as on the CPU core.

What the CPU core makes of it is in test_recadam*.py, the kernels alone in emulator/.
"""

import copy

import pytest
import torch
from device_twins import NAMES, Twins, assert_unchanged, make_optimizer, plan_of, snapshot
from numerics import assert_same_bits

from gradloc import RecAdam

PULL = RecAdam(gamma=15.0, k=0.7, t0=3.0)
BFLOAT16 = torch.bfloat16
CASES = {
    "sigmoid": (torch.float32, PULL, {"groups": True}),
    "linear": (torch.float32, RecAdam(gamma=20.0, t0=6.0, anneal="linear"), {"amsgrad": True}),
    "constant": (torch.float16, RecAdam(gamma=9.0, k=0.3, anneal="constant"), {"eps": 1e-6}),
    "bfloat16": (BFLOAT16, PULL, {"groups": True}),
    "small-anchors": (torch.float32, RecAdam(gamma=15.0, anchor_dtype="bfloat16"), {}),
    "stochastic": (
        BFLOAT16,
        RecAdam(gamma=15.0, k=0.7, t0=3.0, anchor_dtype="float32"),
        {"stochastic_rounding": True, "seed": 5, "state_dtype": BFLOAT16, "groups": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_as_on_the_cpu_core(device, case):
    dtype, recadam, options = CASES[case]
    plan = plan_of(1, 0.5, 2)
    twins = Twins(device, dtype, plan=plan, weight_decay=0.1, recadam=recadam, **options)
    pretrained = copy.deepcopy(twins.host_model.state_dict())
    for number in range(5):
        without = {"b.weight", "c.bias"} if number in (0, 3) else ()
        twins.step(without=without)
        twins.check(f"step {number}")
    for name, param in twins.model.named_parameters():
        anchor = twins.opt.state[param]["anchor"]
        assert anchor.device == param.device
        assert_same_bits(anchor.cpu(), pretrained[name].to(anchor.dtype), name)


def test_it_costs_no_launch(device):
    twins = Twins(device, groups=True, recadam=PULL)
    for _ in range(2):
        twins.step()
    twins.give_gradients()
    assert device.launches(twins.opt.step) == ["adamw_kernel"]


@pytest.mark.parametrize("on_freeze", ["keep", "drop", "offload"])
def test_plans_between_steps(device, on_freeze):
    """Deselected, a layer stays bit for bit; selected again, it is pulled to where it began."""
    twins = Twins(device, plan=plan_of(1, 1, 0.5), on_freeze=on_freeze, recadam=PULL)
    pretrained = copy.deepcopy(twins.host_model.state_dict())
    for number, scales in enumerate([None, (1, 0, 2), None, (0, 1, 0), (0.1, 0.2, 0.3), None]):
        if scales is not None:
            for _, opt in twins.both():
                opt.set_plan(plan_of(*scales))
        before = snapshot(twins.model, twins.opt)
        twins.step()
        after = snapshot(twins.model, twins.opt)
        for name in NAMES:
            if twins.opt.plan.scales[name] == 0:
                assert_unchanged(before, after, name)
        twins.check(f"step {number}")
    for name, param in twins.model.named_parameters():
        assert_same_bits(twins.opt.state[param]["anchor"].cpu(), pretrained[name], name)


def test_resumed_it_goes_on_bit_for_bit(device):
    """The other optimizer is made when the trained weights are there, and has the old anchors."""
    twins = Twins(device, BFLOAT16, recadam=PULL, stochastic_rounding=True, seed=3)
    for _ in range(3):
        twins.step()
    model = copy.deepcopy(twins.model)
    opt = make_optimizer(model)
    opt.load_state_dict(copy.deepcopy(twins.opt.state_dict()))
    assert opt.recadam == PULL
    for _ in range(3):
        twins.step()
        for ours, theirs in zip(model.parameters(), twins.model.parameters(), strict=True):
            ours.grad = theirs.grad.clone()
        opt.step()
    for ours, theirs in zip(model.parameters(), twins.model.parameters(), strict=True):
        assert_same_bits(ours.detach(), theirs.detach())


def test_clipped_and_skipped_on_the_device(device):
    """As the host decides; what the first step, skipped, leaves anchors at is the old weights."""
    twins = Twins(device, max_grad_norm=1e6, on_nonfinite="skip", recadam=PULL)
    pretrained = copy.deepcopy(twins.host_model.state_dict())
    for number in range(4):
        twins.give_gradients()
        if number in (0, 2):
            for model, _ in twins.both():
                model["b"].weight.grad[3, 5] = torch.inf
        for _, opt in twins.both():
            opt.step()
    twins.check()
    assert twins.opt.num_skipped_steps == twins.host.num_skipped_steps == 2
    for name, param in twins.model.named_parameters():
        assert_same_bits(twins.opt.state[param]["anchor"].cpu(), pretrained[name], name)


def test_capturable_and_a_learning_rate_on_the_device(device):
    """As a graph needs it; the pull follows a rate that changes in place."""
    twins = Twins(device, recadam=PULL)
    lr = device.to(torch.tensor(0.01))
    opt = make_optimizer(twins.model, lr=lr, capturable=True, recadam=PULL)
    twins.opt = opt
    for number in range(3):
        lr.fill_(0.03 / (number + 1))
        twins.host.param_groups[0]["lr"] = float(torch.tensor(0.03 / (number + 1)))
        twins.step()
        twins.check(f"step {number}")
