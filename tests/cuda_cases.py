"""Parameters, gradients and options that the tests on a GPU share (test_cuda_*.py)."""

import pytest
import torch
from numerics import assert_same_bits
from torch import nn

from gradloc import RecAdam

CUDA = torch.device("cuda", 0)
SHAPES = ((1000, 37), (1000,), (3, 5, 7), (1,))
OPTIONS = [
    {},
    {"amsgrad": True, "weight_decay": 0.1},
    {"max_grad_norm": 1.0},
    {"max_grad_norm": 1.0, "on_nonfinite": "ignore"},
    {"on_nonfinite": "skip", "maximize": True},
    {"capturable": True},
    {"recadam": RecAdam(gamma=20.0, t0=30.0, anchor_dtype="bfloat16"), "max_grad_norm": 1.0},
]
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")


def make_params(shapes=SHAPES, dtype=torch.float32, device=CUDA):
    return [nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]


def copies(params):
    return [nn.Parameter(param.detach().clone()) for param in params]


def give_gradients(*lists, scale=1.0):
    """New tensors, the same values to every list."""
    for params in zip(*lists, strict=True):
        grad = torch.randn_like(params[0]) * scale
        for param in params:
            param.grad = grad.clone()


def assert_all_same(ours, theirs):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_bits(a.detach(), b.detach(), f"parameter {i}")
