"""Parameters that trace_gradients refuses before the first pass: complex, on several devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradloc.layers import LayerMap
from gradloc.trace import trace_gradients


class Regression(nn.Module):
    """Two layers and a scalar loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 1)

    def forward(self, x, labels):
        return (self.second(self.first(x).tanh()).squeeze(-1) - labels).square().mean()


def regression_batches(count):
    return [{"x": torch.randn(5, 3), "labels": torch.randn(5)} for _ in range(count)]


class Complex(Regression):
    """One parameter in the middle is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def forward(self, x, labels):
        return super().forward((x * self.phase).real, labels)


class Split(Regression):
    """Its last layer is on another device than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.second.to("meta")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Complex, r"parameter 'phase' has dtype=torch\.complex64.*view_as_real"),
        (
            Split,
            r"parameter 'second\.weight' is on device=meta, parameter 'first\.weight' on cpu.*"
            r"model\.to",
        ),
    ],
)
def test_parameters_without_a_norm_are_refused_before_the_first_pass(make, message):
    model = make()
    layers = LayerMap.from_model(model)
    called = []
    model.register_forward_pre_hook(lambda module, arguments: called.append(1))
    read = iter(regression_batches(2))
    with pytest.raises(ValueError, match=message):
        trace_gradients(model, read, regression_batches(2), layers=layers, progress=False)
    assert not called
    assert next(read, None) is not None, "the batches were read"


def test_a_complex_parameter_outside_the_layers_does_no_harm():
    model = Complex()
    model.phase.requires_grad_(False)
    layers = LayerMap.from_model(model, only_trainable=True)
    data = regression_batches(2)
    profile = trace_gradients(model, data, data, layers=layers, progress=False)
    assert profile.relative["first"] == 1
