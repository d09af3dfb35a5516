"""Interpolation with the old weights: exact at both ends, float32 between, and back bit for bit."""

import math

import pytest
import torch
from conftest import make_gpt2
from numerics import assert_same_bits
from safetensors.torch import save_file
from torch import nn

from gradloc.training.interpolation import (
    choose_alpha,
    interpolate,
    interpolated,
    weights_of,
)


class Mixed(nn.Module):
    """A tied pair, each dtype, a transposed weight, an empty one, a quantised one, a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def values(*shape, dtype=torch.float32):
            return nn.Parameter(torch.randn(*shape, generator=draw).to(dtype))

        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.embedding.weight = self.head.weight = values(7, 5)
        self.brain = values(33, dtype=torch.bfloat16)
        self.short = values(2, 3, dtype=torch.float16)
        self.wide = values(4, dtype=torch.float64)
        self.transposed = nn.Parameter(torch.randn(3, 6, generator=draw).T)
        self.empty = values(0)
        self.quantised = nn.Parameter(
            torch.randint(0, 9, (3,), generator=draw), requires_grad=False
        )
        self.register_buffer("steps", torch.tensor(float(seed)))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(found[name], value, name)


def test_weights_are_copies_of_parameters_each_once():
    model = Mixed(0)
    weights = weights_of(model)
    assert list(weights) == [name for name, _ in model.named_parameters()]
    assert "head.weight" not in weights
    assert "steps" not in weights
    before = state(model)
    for weight in weights.values():
        assert not weight.requires_grad
        weight.zero_()
    assert_same_state(model, before)


@pytest.mark.parametrize("source", ["dict", "file"])
def test_the_ends_are_exact(tmp_path, source):
    old, model = Mixed(0), Mixed(1)
    weights = weights_of(old)
    if source == "file":
        path = tmp_path / "old.safetensors"
        save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
        weights = path
    trained = state(model)
    interpolate(model, weights, 1)
    assert_same_state(model, trained)
    # -0.0 and 0.0 differ in bits; inf - inf is not 0.
    with torch.no_grad():
        old.wide[0], model.wide[0] = -0.0, 1.0
        model.brain[3] = math.inf
    if source == "dict":
        weights = weights_of(old)
    else:
        save_file({name: weight.contiguous() for name, weight in weights_of(old).items()}, path)
    interpolate(model, weights, 0)
    assert_same_state(model, {**state(old), "quantised": trained["quantised"],
                              "steps": trained["steps"]})  # fmt: skip


@pytest.mark.parametrize("alpha", [0.1, 0.35, 0.5, 0.9, 1e-7])
def test_between_halves_are_rounded_once(alpha):
    """Against float64, rounded to the parameter's dtype; half an ulp plus float32's own error."""
    old, model = Mixed(0), Mixed(1)
    before, after = weights_of(old), weights_of(model)
    interpolate(model, before, alpha)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        start, end = before[name].double(), after[name].double()
        exact = start + alpha * (end - start)
        wide = torch.finfo(torch.promote_types(parameter.dtype, torch.float32)).eps
        rounding = torch.finfo(parameter.dtype).eps / 2 * exact.abs()
        allowed = rounding + 4 * wide * (start.abs() + end.abs())
        off = (parameter.double() - exact).abs()
        assert (off <= allowed).all(), (name, (off - allowed).max().item())
        assert not torch.equal(parameter, after[name]), name
    assert model.head.weight is model.embedding.weight  # moved once, and still tied


def test_the_file_of_save_pretrained_will_do(tokenizer, tmp_path):
    old, model = make_gpt2(tokenizer, seed=0), make_gpt2(tokenizer, seed=1)
    old.save_pretrained(tmp_path)
    interpolate(model, tmp_path / "model.safetensors", 0)
    assert_same_state(model, state(old))
    interpolate(model, str(tmp_path / "model.safetensors"), 0.5)
    assert_same_state(model, state(old))
    # A state dict has the tied weight twice, and a model may know it by its other name only.
    weights = state(old)
    interpolate(model, weights, 0)
    del weights["transformer.wte.weight"]
    interpolate(model, weights, 0)
    assert_same_state(model, state(old))


def test_what_does_not_fit_changes_nothing(tmp_path):
    model = Mixed(1)
    before = state(model)
    good = weights_of(Mixed(0))
    (tmp_path / "text.safetensors").write_text("no tensors")
    int_file = tmp_path / "int.safetensors"
    save_file({n: w.contiguous() for n, w in {**good, "brain": torch.arange(33)}.items()}, int_file)
    lacking = {name: weight for name, weight in good.items() if name != "transposed"}
    cases = [
        (lacking, 0.5, r"Mixed: there is no 'transposed'"),
        ({**good, "other": torch.ones(1)}, 0.5, r"the model has no 'other'"),
        ({**good, "brain": torch.ones(32)}, 0.5, r"'brain' has shape \(32,\), the model's \(33,\)"),
        ({**good, "brain": torch.arange(33)}, 0.5, "'brain' is not floating point"),
        ({**good, "brain": model.brain}, 0.5, "'brain' is the model's own memory"),
        (model.state_dict(), 0.5, "model's own memory.*and 2 more"),
        (lacking, 1, "there is no 'transposed'"),
        (int_file, 0.5, "'brain' is not floating point"),
        (tmp_path / "text.safetensors", 0.5, "not a safetensors file"),
        (good, 1.01, r"alpha=1.01: a number in \[0, 1\]"),
        (good, -0.01, "alpha=-0.01"),
        (good, math.nan, "alpha=nan"),
        (good, True, "alpha=True"),
        (good, "0.5", "alpha='0.5'"),
    ]
    for weights, alpha, message in cases:
        with pytest.raises(ValueError, match=message):
            interpolate(model, weights, alpha)
        with pytest.raises(ValueError, match=message), interpolated(model, weights, alpha):
            raise AssertionError("the block must not run")
        assert_same_state(model, before)
    with pytest.raises(FileNotFoundError, match="no such file"):
        interpolate(model, tmp_path / "none.safetensors", 0.5)
    assert_same_state(model, before)


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_interpolated_puts_the_trained_weights_back(alpha):
    old, model, expected = Mixed(0), Mixed(1), Mixed(1)
    weights = weights_of(old)
    interpolate(expected, weights, alpha)
    before, objects = state(model), list(model.parameters())
    with interpolated(model, weights, alpha):
        assert_same_state(model, state(expected))
    assert_same_state(model, before)

    def fails():
        with interpolated(model, weights, alpha), torch.no_grad():
            model.brain.zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert_same_state(model, before)
    assert all(one is other for one, other in zip(model.parameters(), objects, strict=True))


class Line(nn.Module):
    """One weight, 0 before training and 1 after it: its value is α."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


def test_choose_alpha_takes_the_lowest():
    model, asked = Line(), []
    old = {"weight": torch.zeros(1)}

    def objective():
        asked.append(model.weight.item())
        return torch.tensor((model.weight.item() - 0.4) ** 2)

    choice = choose_alpha(model, old, objective, iter([1, 0.75, 0.5, 0.25, 0]))
    assert asked == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert choice.alpha == 0.5
    assert list(choice.values) == asked
    assert choice.values[0.5] == pytest.approx(0.01)
    assert all(isinstance(value, float) for value in choice.values.values())
    assert model.weight.item() == 1


@pytest.mark.parametrize(
    ("values", "alpha"),
    [
        ([2.0, 1.0, 1.0, 3.0], 0.5),
        ([1.0, 1.0, 1.0, 1.0], 0.75),
        ([math.nan, 5.0, 6.0, math.nan], 0.5),
        ([math.nan, math.inf, math.nan, math.nan], 0.25),
    ],
    ids=["tie", "all equal", "nan", "inf"],
)
def test_ties_and_nan(values, alpha):
    """Weights in ascending order, so that the first of equals would be the smaller one."""
    wanted = dict(zip((0.0, 0.25, 0.5, 0.75), values, strict=True))
    if alpha == 0.5 and math.isnan(values[0]):
        wanted = dict(zip((0.25, 0.5, 0.75, 0.0), values, strict=True))
    model = Line()
    choice = choose_alpha(
        model, {"weight": torch.zeros(1)}, lambda: wanted[model.weight.item()], list(wanted)
    )
    assert choice.alpha == alpha


def test_choose_alpha_refuses():
    model, old = Line(), {"weight": torch.zeros(1)}

    def never():
        raise AssertionError("nothing must be evaluated")

    for alphas, message in [
        ([], r"alphas=\[\]: give at least one"),
        ([0.5, 0.5], r"alphas=\[0.5, 0.5\]: give at least one weight, each of them once"),
        ([0.5, 2], "alpha=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose_alpha(model, old, never, alphas)
    with pytest.raises(ValueError, match=r"NaN at every alpha in \[0, 1\]"):
        choose_alpha(model, old, lambda: math.nan, [0, 1])
    assert model.weight.item() == 1
