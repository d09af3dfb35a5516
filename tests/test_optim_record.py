"""What the state dict carries beside torch's, and states that must not be loaded."""

import copy
import json

import pytest
import torch
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW
from gradloc.optim_record import KEY


def make(**options):
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 3) for name in "ab"})
    options.setdefault("layers", LayerMap.from_model(model))
    opt = LocalizedAdamW(model.named_parameters(), lr=0.1, **options)
    return model, opt


def stepped(**options):
    model, opt = make(**options)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    opt.step()
    return model, opt


def record_of(state):
    return json.loads(state["param_groups"][0][KEY])


def test_everything_that_the_next_step_depends_on():
    plan = LayerPlan({"a": 0.1 + 0.2, "b": 0}, policy="mine")
    _, opt = stepped(
        plan=plan, max_grad_norm=0.7, on_nonfinite="raise", stochastic_rounding=True, seed=5
    )
    opt.num_skipped_steps = 3
    state = copy.deepcopy(opt.state_dict())
    assert record_of(state) == {
        "plan": {"scales": {"a": 0.1 + 0.2, "b": 0.0}, "policy": "mine"},
        "max_grad_norm": 0.7,
        "on_nonfinite": "raise",
        "stochastic_rounding": True,
        "seed": 5,
        "num_skipped_steps": 3,
        "num_states": 2,
        "recadam": None,
    }
    assert KEY not in opt.param_groups[0], "only in what is saved"
    _, other = make()
    other.load_state_dict(state)
    assert record_of(other.state_dict()) == record_of(state)
    assert other.plan.policy == "mine"
    assert other.num_skipped_steps == 3
    assert KEY in state["param_groups"][0], "what was given is as it was"


def test_clipping_alone_is_carried():
    _, opt = stepped(layers=None, max_grad_norm=1.0, on_nonfinite="ignore")
    _, other = make(layers=None)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.max_grad_norm == 1.0


def test_plain_adamw_has_nothing_to_carry():
    _, opt = stepped(layers=None)
    theirs = torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict()["param_groups"][0]
    ours = set(opt.state_dict()["param_groups"][0]) - {"param_names", "decoupled_weight_decay"}
    assert ours == set(theirs) - {"decoupled_weight_decay"}  # torch has it since 2.7


WRONG = [
    ({"max_grad_norm": -1.0}, r"max_grad_norm=-1\.0: a positive number"),
    ({"max_grad_norm": 0.0}, r"max_grad_norm=0\.0: a positive number"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm=nan: a positive number"),
    ({"on_nonfinite": "bogus"}, "on_nonfinite='bogus'"),
    ({"seed": -5}, "seed=-5: a whole number"),
    ({"plan": {"scales": {"z": 1.0}, "policy": "x"}}, "unknown layers 'z'"),
    ({"plan": {"scales": {"a": -1.0, "b": 1.0}, "policy": "x"}}, "a scale is a finite number"),
    ({"num_states": 9}, "saved with the state of 9 parameters and has that of 4"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_record_that_cannot_be(change, message):
    _, opt = stepped(plan=LayerPlan({"a": 1, "b": 1}))
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0][KEY] = json.dumps({**record_of(state), **change})
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(
        torch.equal(value, before["state"][i][key])
        for i, entries in after["state"].items()
        for key, value in entries.items()
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", 7, None])
def test_a_record_that_is_none(text):
    _, opt = stepped()
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0][KEY] = text
    with pytest.raises(ValueError, match="is not what LocalizedAdamW writes"):
        opt.load_state_dict(state)


def test_a_plan_needs_layers():
    _, opt = stepped(plan=LayerPlan({"a": 1, "b": 0}))
    _, bare = make(layers=None)
    with pytest.raises(ValueError, match="carries a plan, and this optimizer was made without lay"):
        bare.load_state_dict(opt.state_dict())


FOREIGN = {
    "sgd": ("momentum_buffer",),
    "8-bit": ("step", "state1", "state2"),
    "no second moment": ("step", "exp_avg"),
    "no first moment": ("step", "exp_avg_sq"),
    "no step": ("exp_avg", "exp_avg_sq"),
}


@pytest.mark.parametrize("keys", FOREIGN.values(), ids=FOREIGN)
def test_the_state_of_another_optimizer_is_refused(keys):
    model, opt = stepped()
    state = copy.deepcopy(opt.state_dict())
    before = model["a"].weight.detach().clone()
    shaped = {key: torch.zeros(()) if key == "step" else torch.ones(3, 4) for key in keys}
    state["state"][0] = shaped
    with pytest.raises(ValueError, match="AdamW"):
        opt.load_state_dict(state)
    if "momentum_buffer" not in keys:
        opt.state[model["a"].weight] = shaped
        with pytest.raises(ValueError, match="is no AdamW state"):
            opt.step()
        assert torch.equal(model["a"].weight, before)


def test_empty_entries_do_not_count():
    model, opt = stepped(plan=LayerPlan({"a": 1, "b": 0}))
    assert opt.state[model["b"].weight].get("step") is None  # a look makes an empty entry
    assert record_of(opt.state_dict())["num_states"] == 2


def test_amsgrad_turned_on_later_where_one_has_no_gradient():
    model, opt = stepped()
    opt.param_groups[0]["amsgrad"] = True
    model["b"].bias.grad = None
    opt.step()
    assert int(opt.state[model["a"].weight]["step"]) == 2
    assert int(opt.state[model["b"].bias]["step"]) == 1
    model["b"].bias.grad = torch.ones(3)
    opt.step()
    assert int(opt.state[model["b"].bias]["step"]) == 2


def test_another_default_device():
    """Torch's default device says where new tensors go; ours stay where the parameters are."""
    model, opt = make(max_grad_norm=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with torch.device("meta"):
        opt.step()
        norms = opt.grad_norms()
    assert norms.device.type == "cpu"
    assert norms.isfinite().all()
    assert opt.state[model["a"].weight]["step"].device.type == "cpu"


def test_gradients_without_memory():
    """Autograd makes zeros that have no address."""
    param, twin = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    opt = LocalizedAdamW([param], lr=0.1, weight_decay=0.5)
    theirs = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.5)
    for one, each in ((param, opt), (twin, theirs)):
        one.grad = torch._efficientzerotensor(5)
        each.step()
    assert torch.equal(param, twin)


def test_a_shallow_copy_has_a_plan_of_its_own():
    _, opt = stepped(plan=LayerPlan({"a": 1, "b": 1}))
    other = copy.copy(opt)
    other.set_plan(LayerPlan({"a": 1, "b": 0}))
    assert opt.plan.active == ("a", "b")


def test_a_group_that_fails_is_not_added():
    _, opt = stepped()
    group = {"params": [("a.weight", nn.Parameter(torch.ones(2)))], "eps": torch.ones(2)}
    with pytest.raises((RuntimeError, ValueError)):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1
    opt.step()
