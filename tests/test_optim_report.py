"""Proof that a selection is in force: the first-step check, the line, the table."""

import logging

import pytest
import torch
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW

NAMES = ("a", "b", "c")


def make(*scales, **options):
    model = nn.ModuleDict({name: nn.Linear(6, 4) for name in NAMES})
    layers = LayerMap.from_model(model)
    plan = LayerPlan(dict(zip(NAMES, scales, strict=True)))
    return model, LocalizedAdamW(model.named_parameters(), layers=layers, plan=plan, **options)


def give_gradients(model, names=NAMES):
    for name in names:
        for parameter in model[name].parameters():
            parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"release_gradients": True}])
def test_one_line_a_plan(caplog, options):
    model, opt = make(1, 0, 0.5, **options)
    with caplog.at_level(logging.INFO, logger="gradloc"):
        for _ in range(3):
            give_gradients(model)
            opt.step()
        opt.set_plan(LayerPlan({"a": 0, "b": 1, "c": 0}, policy="another"))
        give_gradients(model)
        opt.step()
    assert [record.getMessage() for record in caplog.records] == [
        "plan in force (by hand): 2 of 3 layers train, 56 of 84 parameters (66.7%); moments 448 B",
        "plan in force (another): 1 of 3 layers train, 28 of 84 parameters (33.3%); moments 672 B",
    ]


def test_active_layers_without_gradients_are_named_once():
    model, opt = make(1, 1, 0)
    give_gradients(model, "ac")
    with pytest.warns(RuntimeWarning, match=r"no gradient and do not train: b\. Was requires_grad"):
        opt.step()
    give_gradients(model, "ac")
    opt.step()  # a warning would be an error here


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"release_gradients": True}])
def test_a_plan_under_which_nothing_has_a_gradient_is_an_error(options):
    model, opt = make(0, 1, 0, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        give_gradients(model, "ac")
        with pytest.raises(
            RuntimeError, match=r"nothing trains under the plan .*: none of its 1 active layers has"
        ):
            opt.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not opt.state
    give_gradients(model)
    opt.step()
    assert not torch.equal(model["b"].weight, before["b.weight"])


def test_frozen_before_the_optimizer_was_made():
    """A parameter left out of the optimizer can't train: loud. One that is in it can: works."""
    model = nn.ModuleDict({name: nn.Linear(6, 4) for name in NAMES})
    layers = LayerMap.from_model(model)
    model["b"].requires_grad_(False)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plan = LayerPlan({"a": 1, "b": 0, "c": 1})
    opt = LocalizedAdamW(trained, layers=layers, plan=plan)
    model["b"].requires_grad_(True)
    with pytest.raises(ValueError, match="the plan trains b, but no parameter of that is in this"):
        opt.set_plan(LayerPlan({"a": 1, "b": 1, "c": 1}))
    assert opt.plan is plan
    with pytest.raises(ValueError, match="the plan trains b, but no parameter"):
        LocalizedAdamW(trained, layers=layers, plan=LayerPlan({"a": 0, "b": 1, "c": 0}))

    model["b"].requires_grad_(False)
    opt = LocalizedAdamW(model.named_parameters(), layers=layers, plan=plan)
    before = model["b"].weight.detach().clone()
    sum(model[name](torch.randn(2, 6)).sum() for name in NAMES).backward()
    opt.step()
    model["b"].requires_grad_(True)
    opt.set_plan(LayerPlan({"a": 1, "b": 1, "c": 1}))
    opt.zero_grad()
    sum(model[name](torch.randn(2, 6)).sum() for name in NAMES).backward()
    opt.step()
    assert not torch.equal(model["b"].weight, before)


def test_a_part_of_a_layer_frozen_before_the_optimizer_was_made():
    model = nn.ModuleDict({name: nn.Linear(6, 4) for name in NAMES})
    layers = LayerMap.from_model(model)
    model["b"].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    plan = LayerPlan({"a": 1, "b": 1, "c": 0})
    opt = LocalizedAdamW(trained, layers=layers, plan=plan)
    give_gradients(model, "a")
    model["b"].weight.grad = torch.ones(4, 6)
    opt.step()  # what is frozen is meant to be
    opt.set_plan(plan)
    model["b"].requires_grad_(True)
    give_gradients(model)
    with pytest.warns(RuntimeWarning, match=r"only a part of these layers: b\. Others of their"):
        opt.step()


def test_a_part_of_a_layer_that_requires_no_gradient():
    model, opt = make(1, 1, 0)
    model["b"].weight.requires_grad_(False)
    give_gradients(model, "a")
    model["b"].bias.grad = torch.ones(4)
    with pytest.warns(RuntimeWarning, match=r"trains only a part of these layers: b\."):
        opt.step()
    assert "2 of 3 layers train, 32 of 84 parameters" in opt.report()


def test_back_to_no_plan_is_a_plan_change_too(caplog):
    model = nn.ModuleDict({name: nn.Linear(6, 4) for name in NAMES})
    layers = LayerMap.from_model(model)
    model["b"].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = LocalizedAdamW(trained, layers=layers, plan=LayerPlan({"a": 1, "b": 0, "c": 0}))
    give_gradients(model, "ac")
    opt.step()
    model["b"].requires_grad_(True)
    opt.set_plan(None)
    give_gradients(model)
    with (
        caplog.at_level(logging.INFO, logger="gradloc"),
        pytest.warns(RuntimeWarning, match=r"only a part of these layers: b\.|not train: b\."),
    ):
        opt.step()
    assert "plan in force (no plan): 2 of 3 layers train, 56 of 84 parameters" in caplog.text


@pytest.mark.parametrize("plan", [None, LayerPlan({"a": 1, "b": 1, "c": 0})], ids=["none", "plan"])
def test_parameters_exchanged_after_the_optimizer_was_made(plan):
    """As fully_shard does: the optimizer has parameters that no model has any more."""
    model = nn.ModuleDict({name: nn.Linear(6, 4) for name in NAMES})
    layers = LayerMap.from_model(model)
    opt = LocalizedAdamW(model.named_parameters(), layers=layers, plan=plan)
    for name in NAMES:
        model[name].weight = nn.Parameter(model[name].weight.detach().clone())
        model[name].bias = nn.Parameter(model[name].bias.detach().clone())
    give_gradients(model)
    with pytest.raises(RuntimeError, match=r"nothing trains .* it has other parameters now"):
        opt.step()


def test_the_table():
    model, opt = make(1, 0, 0.25, on_freeze="offload")
    assert "grad norm" in opt.report(), "before any step"
    for _ in range(2):
        give_gradients(model)
        opt.step()
    opt.set_plan(LayerPlan({"a": 0, "b": 1, "c": 2.0}))
    give_gradients(model)
    opt.step()
    head, columns, *rows = opt.report().splitlines()
    assert head.endswith("56 of 84 parameters (66.7%); moments 448 B, 224 B offloaded")
    assert columns.split() == "layer scale parameters steps moments offloaded grad norm".split()
    norms = opt.grad_norms().tolist()
    assert [row.split() for row in rows] == [
        ["a", "frozen", "28", "2", "0", "B", "224", "B", "-"],
        ["b", "1", "28", "1", "224", "B", "0", "B", f"{norms[1]:.3e}"],
        ["c", "2", "28", "3", "224", "B", "0", "B", f"{norms[2]:.3e}"],
    ]


def test_the_table_without_layers():
    opt = LocalizedAdamW([nn.Parameter(torch.ones(5))])
    assert opt.report().splitlines()[0].startswith("plan in force (no plan): 1 of 1 layers train")
