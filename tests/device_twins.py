"""A small model on a test's device beside its copy on the CPU core, given the same gradients.

Used by test_device_*.py; devices are in kernel_devices.py.
"""

import copy
import math

import torch
from numerics import assert_same_bits
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW

NAMES = ("a", "b", "c")


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleDict({n: nn.Linear(70, 31 + i, dtype=dtype) for i, n in enumerate(NAMES)})


def plan_of(*scales):
    return LayerPlan(dict(zip(NAMES, scales, strict=True)))


def make_optimizer(model, *, groups=False, **options):
    """With `groups` a param group a layer; the second has amsgrad, the third ascends."""
    options.setdefault("layers", LayerMap.from_model(model))
    options.setdefault("lr", 0.01)
    if not groups:
        return LocalizedAdamW(model.named_parameters(), **options)
    own = (
        {"lr": 0.02},
        {"amsgrad": True, "weight_decay": 0.2},
        {"maximize": True, "betas": (0, 0.9)},
    )
    params = [
        {"params": list(model[name].named_parameters(prefix=name)), **extra}
        for name, extra in zip(NAMES, own, strict=True)
    ]
    return LocalizedAdamW(params, **options)


class Twins:
    """A model on the device and its copy on the CPU core, given the same gradients."""

    def __init__(self, device, dtype=torch.float32, **options):
        self.device = device
        self.host_model = make_model(dtype)
        self.model = copy.deepcopy(self.host_model).to(device.torch_device)
        self.opt = make_optimizer(self.model, **options)
        with device.host():
            self.host = make_optimizer(self.host_model, **options)

    def both(self):
        """Each model and optimizer in turn, on its own core."""
        yield self.model, self.opt
        with self.device.host():
            yield self.host_model, self.host

    def give_gradients(self, without=(), scale=1.0):
        pairs = zip(self.model.named_parameters(), self.host_model.parameters(), strict=True)
        for (name, ours), host in pairs:
            grad = None if name in without else torch.randn_like(host) * scale
            host.grad = grad
            ours.grad = None if grad is None else self.device.to(grad)

    def step(self, **gradients):
        self.give_gradients(**gradients)
        for _, opt in self.both():
            opt.step()

    def check(self, what="", ulps=4):
        """Parameters and state; both then go on from the same values."""
        for (name, host), ours in zip(
            self.host_model.named_parameters(), self.model.parameters(), strict=True
        ):
            pairs = {"param": (ours, host)}
            assert self.opt.state.get(ours, {}).keys() == self.host.state.get(host, {}).keys(), name
            for key, tensor in self.host.state.get(host, {}).items():
                pairs[key] = (self.opt.state[ours][key], tensor)
            for key, (tensor, expected) in pairs.items():
                text = f"{what} {name} {key}"
                self.device.check(tensor, expected, text, step=key == "step", ulps=ulps)
                if not self.device.exact:
                    tensor.detach().copy_(expected.detach())


def snapshot(model, opt):
    """Copies of all that a step may change."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = param.detach().clone()
        for key, tensor in opt.state.get(param, {}).items():
            found[f"{name} {key}"] = tensor.clone()
    return found


def assert_unchanged(before, after, prefix=""):
    chosen = [key for key in before | after if key.startswith(prefix)]
    assert chosen
    for key in chosen:
        assert_same_bits(after[key], before[key], key)


def exact_norm(model):
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
