"""layer_grad_norms on models: which gradient counts where, dtypes, and what it refuses."""

import math

import pytest
import torch
from numerics import assert_same_bits
from torch import nn

from gradloc import LayerMap, layer_grad_norms


def make_model(**options) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"first": nn.Linear(7, 5, **options), "second": nn.Linear(5, 3, **options)}
    )


def fill(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def expected_norms(model: nn.ModuleDict) -> list[float]:
    return [
        math.sqrt(
            sum(
                float(p.grad.double().square().sum())
                for p in part.parameters()
                if p.grad is not None
            )
        )
        for part in model.values()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norms_by_layer(dtype):
    model = make_model(dtype=dtype)
    layers = LayerMap.from_model(model)
    fill(model)
    ours = layer_grad_norms(model, layers)
    assert layers.names == ("first", "second")
    assert ours.dtype == torch.float32
    assert ours.tolist() == pytest.approx(expected_norms(model), rel=1e-6)


def test_missing_gradients_count_as_zero():
    model = make_model()
    layers = LayerMap.from_model(model)
    assert layer_grad_norms(model, layers).tolist() == [0, 0]
    model["first"].bias.grad = torch.full((5,), 2.0)
    assert layer_grad_norms(model, layers).tolist() == [pytest.approx(math.sqrt(20)), 0]


def test_tied_weights_count_once():
    model = make_model()
    model["again"] = nn.Linear(7, 5, bias=False)
    model["again"].weight = model["first"].weight
    layers = LayerMap.from_model(model)
    fill(model)
    del model["again"]
    expected = expected_norms(model)
    model["again"] = nn.Linear(7, 5, bias=False)
    model["again"].weight = model["first"].weight
    assert layer_grad_norms(model, layers).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda grad: grad.double(),
        lambda grad: grad.t().contiguous().t(),
        lambda grad: torch.cat([grad, grad], dim=1)[:, ::2],
        lambda grad: grad[:1, :1].expand(grad.shape),
        lambda grad: torch._neg_view(grad),
    ],
    ids=["float64", "transposed", "strided", "expanded", "negated-lazily"],
)
def test_gradients_in_any_layout(change):
    model = make_model()
    layers = LayerMap.from_model(model)
    fill(model)
    weight = model["first"].weight
    grad = change(weight.grad)
    if grad.dtype != weight.dtype:
        model.double()
    weight = model["first"].weight
    weight.grad = grad
    assert layer_grad_norms(model, layers).tolist() == pytest.approx(
        expected_norms(model), rel=1e-6
    )


def test_float16_norm_beyond_float16():
    model = nn.ModuleDict({"only": nn.Linear(1000, 1, bias=False, dtype=torch.float16)})
    model["only"].weight.grad = torch.full((1, 1000), 2510.0, dtype=torch.float16)
    norm = layer_grad_norms(model, LayerMap.from_model(model))
    assert norm.tolist() == pytest.approx([2510 * math.sqrt(1000)], rel=1e-6)


def test_gradients_are_left_as_they_are():
    model = make_model()
    fill(model)
    before = [p.grad.clone() for p in model.parameters()]
    layer_grad_norms(model, LayerMap.from_model(model))
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert_same_bits(parameter.grad, grad)


def test_nonfinite_norms_are_reported():
    model = make_model()
    fill(model)
    model["first"].weight.grad[0, 0] = math.nan
    model["second"].bias.grad[1] = math.inf
    norms = layer_grad_norms(model, LayerMap.from_model(model))
    assert norms[0].isnan()
    assert norms[1] == math.inf


def test_another_models_layers():
    layers = LayerMap.from_model(nn.ModuleDict({"other": nn.Linear(2, 2)}))
    with pytest.raises(ValueError, match=r"other\.weight"):
        layer_grad_norms(make_model(), layers)


def test_sparse_gradients():
    model = nn.ModuleDict({"words": nn.Embedding(5, 2, sparse=True)})
    model["words"](torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"words\.weight.*use sparse=False"):
        layer_grad_norms(model, LayerMap.from_model(model))


def test_complex_gradients():
    model = make_model()
    model["turn"] = nn.Linear(2, 2, dtype=torch.complex64)
    layers = LayerMap.from_model(model)
    fill(model)
    message = r"gradient of parameter 'turn\.weight' has dtype=torch\.complex64.*view_as_real"
    with pytest.raises(ValueError, match=message):
        layer_grad_norms(model, layers)
    # Without a gradient it counts as 0.
    model["turn"].zero_grad()
    assert layer_grad_norms(model, layers).tolist()[2] == 0


def test_gradients_on_several_devices():
    model = make_model()
    fill(model)
    model["second"] = nn.Linear(5, 3, device="meta")
    fill(model)
    message = (
        r"gradient of parameter 'second\.weight' is on device=meta, the gradient of parameter "
        r"'first\.weight' on cpu.*model\.to\(device\)"
    )
    layers = LayerMap.from_model(model)
    with pytest.raises(ValueError, match=message):
        layer_grad_norms(model, layers)
    model["second"].zero_grad()
    assert layer_grad_norms(model, layers).tolist()[1] == 0
