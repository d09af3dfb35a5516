"""What LocalizedAdamW refuses: the message says the value and the remedy, and nothing changes."""

import copy
import math

import pytest
import torch
from numerics import assert_same_bits
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW


def one(**options):
    return LocalizedAdamW([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"Invalid learning rate: -1.0: lr is a finite number >= 0"),
        ({"lr": math.nan}, r"Invalid learning rate: nan"),
        ({"lr": math.inf}, r"Invalid learning rate: inf"),
        ({"lr": torch.ones(2)}, r"Tensor lr must be 1-element: lr has shape \(2,\)"),
        ({"betas": (1.0, 0.9)}, r"Invalid beta parameter at index 0: 1.0: each is in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"Invalid beta parameter at index 1: -0.1"),
        ({"betas": (0.9, math.nan)}, r"Invalid beta parameter at index 1: nan"),
        ({"betas": 0.9}, r"Invalid betas: 0.9: a pair of numbers"),
        ({"betas": (0.9, 0.99, 0.999)}, r"Invalid betas: .*: a pair of numbers"),
        ({"eps": -1e-8}, r"Invalid epsilon value: -1e-08: eps is a number >= 0"),
        ({"weight_decay": -0.1}, r"Invalid weight_decay value: -0.1: a number >= 0"),
        ({"capturable": True}, r"capturable=True, but .* is not updated by the CUDA kern"),
        ({"differentiable": True}, r"differentiable=True is not supported: leave it False"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0.0: a positive number, or None"),
        ({"max_grad_norm": math.nan}, r"max_grad_norm=nan: a positive number"),
        ({"on_nonfinite": "stop"}, r"on_nonfinite='stop': choose 'ignore', 'skip' or 'raise'"),
        ({"layers": {"a": 1}}, r"layers=\{'a': 1\} is not a LayerMap: use LayerMap.from_model"),
        ({"plan": LayerPlan({"a": 1})}, r"a plan needs layers: make the optimizer with layers="),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        one(**options)


@pytest.mark.parametrize("params", [[], iter([]), ()])
def test_no_parameters(params):
    with pytest.raises(ValueError, match=r"empty parameter list: pass model\.named_parameters"):
        LocalizedAdamW(params)


def two_layers():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 2)})
    return model, LayerMap.from_model(model)


def running(**options):
    """An optimizer in mid-run, with a plan."""
    model, layers = two_layers()
    plan = LayerPlan({"a": 1.0, "b": 0.0})
    opt = LocalizedAdamW(model.named_parameters(), lr=0.1, layers=layers, plan=plan, **options)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    opt.step()
    return model, opt


def everything(model, opt):
    return copy.deepcopy((list(model.parameters()), opt.state_dict(), opt.plan))


def assert_nothing_changed(model, opt, before):
    params, state, plan = before
    for ours, old in zip(model.parameters(), params, strict=True):
        assert_same_bits(ours, old, "param")
    now = opt.state_dict()
    assert now["param_groups"] == state["param_groups"]
    assert now["state"].keys() == state["state"].keys()
    for i, tensors in state["state"].items():
        for key, old in tensors.items():
            assert_same_bits(now["state"][i][key], old, f"{i} {key}")
    assert opt.plan == plan
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group in opt.param_groups:
        group.update(lr=0.1, fused=None)
    opt.step()  # and it still works
    assert float(opt.state[next(model.parameters())]["step"]) == 2


SCALES = {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (LayerPlan({**SCALES, "c": 1.0}), r"unknown layers 'c'.*2 layers, the plan 3"),
        (LayerPlan({"a": 1.0}), r"layers without a scale 'b'"),
        (LayerPlan({"x": 1.0, "b": 1.0}), r"unknown layers 'x'; layers without a scale 'a'"),
        (LayerPlan({"a": 0.0, "b": 0.0}), r"nothing would train: .* freezes all 2 layers"),
        (SCALES, r"plan=\{'a': 1.0, 'b': 1.0\} is not a LayerPlan: use a policy"),
    ],
)
def test_plans(plan, message):
    """The old plan stays in force; the constructor refuses the same."""
    model, opt = running()
    before = everything(model, opt)
    with pytest.raises(ValueError, match=message):
        opt.set_plan(plan)
    assert_nothing_changed(model, opt, before)
    model, layers = two_layers()
    with pytest.raises(ValueError, match=message):
        LocalizedAdamW(model.named_parameters(), layers=layers, plan=plan)


def test_a_plan_whose_active_layers_are_not_in_the_optimizer():
    model, layers = two_layers()
    opt = LocalizedAdamW(model["a"].parameters(), layers=layers)
    with pytest.raises(ValueError, match="trains b, but no parameter of that is in this optimizer"):
        opt.set_plan(LayerPlan({"a": 0.0, "b": 1.0}))


def test_set_plan_without_layers():
    with pytest.raises(ValueError, match="a plan needs layers"):
        one().set_plan(LayerPlan({"a": 1.0}))


def test_parameters_in_no_layer():
    _, layers = two_layers()
    stranger = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'weight' is in no layer"):
        LocalizedAdamW(stranger.named_parameters(), layers=layers)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) is in no layer"):
        LocalizedAdamW(stranger.parameters(), layers=layers)


WIDE = torch.randn(20)
BAD_PARAMS = {
    "complex": (nn.Parameter(torch.ones(2, dtype=torch.complex64)), r"dtype=torch.complex64: only"),
    "integer": (torch.ones(2, dtype=torch.int32), r"dtype=torch.int32: only real floating-point"),
    "meta": (nn.Parameter(torch.ones(2, device="meta")), "is on the meta device, which holds"),
}


@pytest.mark.parametrize(("param", "message"), BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_parameters_of_another_kind(param, message):
    good = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        LocalizedAdamW([good, param])
    with pytest.raises(ValueError, match=message):
        LocalizedAdamW([("good", good), ("bad", param)])


def test_overlapping_parameters_are_named():
    params = [("left", nn.Parameter(WIDE[:11])), ("right", nn.Parameter(WIDE[10:]))]
    with pytest.raises(ValueError, match=r"'left' and 'right' overlap in memory.*Pass tied"):
        LocalizedAdamW(params)
    with pytest.raises(ValueError, match=r"0 of param group 0 \(shape \(11,\)\) and 0 of param gr"):
        LocalizedAdamW([{"params": [p]} for _, p in params])
    LocalizedAdamW([nn.Parameter(WIDE[:10]), nn.Parameter(WIDE[10:])])


@pytest.mark.parametrize(
    ("param", "options", "message"),
    [
        (lambda m: ("a.weight", nn.Parameter(m["a"].weight.data)), {}, "overlap in memory"),
        (lambda m: ("c.weight", nn.Parameter(torch.ones(2))), {}, r"'c\.weight' is in no layer"),
        (lambda m: ("b.x", nn.Parameter(torch.ones(2))), {"lr": -2.0}, "Invalid learning rate: -2"),
        (lambda m: ("b.x", nn.Parameter(torch.ones(2))), {"betas": (2, 0)}, "index 0: 2"),
        (lambda m: ("b.x", nn.Parameter(torch.ones(2))), {"eps": -1.0}, "epsilon value: -1"),
        (lambda m: ("b.x", nn.Parameter(torch.ones(2).cfloat())), {}, "dtype=torch.complex64"),
        (
            lambda m: ("b.x", nn.Parameter(torch.ones(2, device="meta"))),
            {},
            "is on the meta device",
        ),
        (
            lambda m: ("b.x", nn.Parameter(torch.ones(2).double())),
            {"fused": True},
            r"fused=True, but parameter 'b\.x' .*dtype=torch.float64.*leave fused=None",
        ),
        (lambda m: nn.Parameter(torch.ones(2)), {}, "with/without names"),
        (lambda m: ("a.bias", m["a"].bias), {}, "in more than one parameter group"),
    ],
)
def test_add_param_group(param, options, message):
    model, opt = running()
    before = everything(model, opt)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [param(model)], **options})
    assert len(opt.param_groups) == 1
    assert_nothing_changed(model, opt, before)


def test_add_param_group_of_a_wrong_type():
    model, opt = running()
    before = everything(model, opt)
    with pytest.raises(TypeError):
        opt.add_param_group({"params": [("b.x", nn.Parameter(torch.ones(2)))], "eps": "small"})
    assert_nothing_changed(model, opt, before)


@pytest.mark.parametrize("param", [torch.ones(4).double(), WIDE[::2]], ids=["float64", "strided"])
def test_fused_insists(param):
    with pytest.raises(ValueError, match="fused=True, but parameter 0 of param group 0"):
        LocalizedAdamW([nn.Parameter(param)], fused=True)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_sparse_gradients(max_grad_norm):
    """The other parameters have gradients too, and must not have been stepped."""
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "words": nn.Embedding(5, 2, sparse=True)})
    opt = LocalizedAdamW(model.named_parameters(), max_grad_norm=max_grad_norm)
    model["a"](model["words"](torch.tensor([1, 2]))).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    message = (
        r"parameter 'words\.weight' has layout=torch.sparse_coo.*sparse=False in the embedding"
    )
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert not opt.state_dict()["state"]
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(parameter, old, "param")


def test_sparse_gradient_of_a_frozen_layer_does_not_matter():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "words": nn.Embedding(5, 2, sparse=True)})
    layers = LayerMap.from_model(model)
    plan = LayerPlan({"a": 1.0, "words": 0.0})
    opt = LocalizedAdamW(model.named_parameters(), layers=layers, plan=plan)
    model["a"](model["words"](torch.tensor([1, 2]))).sum().backward()
    opt.step()
    assert opt.grad_norms()[1].isnan()


def test_gradient_of_another_shape():
    """As after a change of the parameter's data without zero_grad."""
    param = nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    opt = LocalizedAdamW([("w", param)])
    param.data = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"'w' has shape=\(4,\).*call zero_grad\(\) after a model"):
        opt.step()
    assert not opt.state_dict()["state"]


@pytest.mark.parametrize(
    ("group", "message"), [({"lr": math.nan}, "Invalid learning rate: nan"), ({"lr": -1.0}, "-1.0")]
)
def test_hyperparameters_that_a_scheduler_spoils(group, message):
    """Found at the step, before it makes state for a parameter that has its first gradient."""
    model, opt = running()
    opt.set_plan(None)
    before = everything(model, opt)
    opt.param_groups[0].update(group)
    with pytest.raises(ValueError, match=message):
        opt.step()
    opt.param_groups[0]["lr"] = 0.1
    assert_nothing_changed(model, opt, before)
