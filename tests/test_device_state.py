"""The state of an optimizer whose steps kernels take: saved, loaded, copied, to torch and back."""

import copy
import pickle

import pytest
import torch
from device_twins import Twins, make_model, make_optimizer, plan_of
from numerics import assert_same_bits, within_ulps


def continued(opt, model, num_steps=3):
    """The model after more steps, with gradients that are the same in every call."""
    draw = torch.Generator().manual_seed(9)
    for _ in range(num_steps):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=draw).to(param.device)
        opt.step()
    return [param.detach().cpu().clone() for param in model.parameters()]


@pytest.mark.parametrize("fused", [None, True, False])
def test_states_to_torch_and_back(device, fused):
    """Each goes on where the other stopped, whether torch counts steps on the device or not."""

    def torchs(model):
        return torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True, fused=fused)

    def ours(model):
        return make_optimizer(model, amsgrad=True)

    for first, second in ((ours, torchs), (torchs, ours), (ours, ours)):
        model = make_model().to(device.torch_device)
        opt = first(model)
        continued(opt, model)
        other_model = copy.deepcopy(model)
        other = second(other_model)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        stay, move = continued(opt, model), continued(other, other_model)
        within_ulps(move, stay, 8)
        if first is second:
            for a, b in zip(move, stay, strict=True):
                assert_same_bits(a, b)
        assert {float(state["step"]) for state in other.state.values()} == {6.0}


@pytest.mark.parametrize("through", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_and_pickles(device, through):
    twins = Twins(device, plan=plan_of(1, 0, 0.5), max_grad_norm=1.0)
    twins.step()
    model, opt = through((twins.model, twins.opt))
    assert opt.plan == twins.opt.plan
    stay = continued(twins.opt, twins.model)
    for a, b in zip(continued(opt, model), stay, strict=True):
        assert_same_bits(a, b)
    assert next(model.parameters()).data_ptr() != next(twins.model.parameters()).data_ptr()


def test_from_the_host_to_the_device(device):
    """A state saved where the CPU core worked, with step counts on the CPU."""
    twins = Twins(device)
    with device.host():
        continued(twins.host, twins.host_model)
        state = copy.deepcopy(twins.host.state_dict())
    twins.model.load_state_dict(twins.host_model.state_dict())
    twins.opt.load_state_dict(state)
    twins.step()
    twins.check()
    assert {s["step"].device.type for s in twins.opt.state.values()} == {device.torch_device.type}
