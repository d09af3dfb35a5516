"""State of LocalizedAdamW: exchange with torch.optim.AdamW, resuming, copies and pickles."""

import copy
import io
import pickle

import pytest
import torch
from numerics import assert_same_bits, give_gradients, make_params, twins, within_ulps
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW

OPTIONS = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}


def steps(opt, params, count, seed):
    torch.manual_seed(seed)
    for _ in range(count):
        give_gradients(params, params)
        opt.step()


def saved(opt):
    """The state dict after a trip through a file, as a checkpoint makes it."""
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(ours, theirs):
    """Equal state dicts, bit for bit."""
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for i, state in ours["state"].items():
        assert state.keys() == theirs["state"][i].keys()
        for key, tensor in state.items():
            assert_same_bits(tensor, theirs["state"][i][key], f"{i} {key}")


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("fused", [None, False], ids=["core", "plain-torch"])
@pytest.mark.parametrize("their_path", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_ours_to_torch_and_back(amsgrad, fused, their_path):
    """Five steps of each, handed over twice, against fifteen of torch's."""
    ours, options = make_params(), {**OPTIONS, "amsgrad": amsgrad}
    judge_params = twins(ours)
    judge = torch.optim.AdamW(judge_params, **options, foreach=False)
    opt = LocalizedAdamW(ours, **options, fused=fused)
    steps(opt, ours, 5, seed=1)

    theirs = twins(ours)
    other = torch.optim.AdamW(theirs, **options, **their_path)
    own_groups = other.state_dict()["param_groups"]
    state = saved(opt)
    assert state["param_groups"][0].keys() >= own_groups[0].keys()  # torch 2.6 lacks one of ours
    other.load_state_dict({"state": state["state"], "param_groups": own_groups})
    steps(other, theirs, 5, seed=2)

    again = twins(theirs)
    opt = LocalizedAdamW(again, lr=7.0)
    opt.load_state_dict(saved(other))
    assert opt.param_groups[0]["lr"] == 0.01
    steps(opt, again, 5, seed=3)

    for seed in (1, 2, 3):
        steps(judge, judge_params, 5, seed)
    within_ulps(again, judge_params, 4)
    assert {float(opt.state[p]["step"]) for p in again} == {15.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fused", [None, False], ids=["core", "plain-torch"])
def test_resuming_gives_the_bits_of_going_on(dtype, fused):
    """Where torch casts the float32 moments to bfloat16, ours come back as they were."""
    ours = make_params(dtype=dtype)
    opt = LocalizedAdamW(ours, **OPTIONS, amsgrad=True, fused=fused)
    steps(opt, ours, 4, seed=1)
    resumed = twins(ours)
    second = LocalizedAdamW(resumed, **OPTIONS, amsgrad=True, fused=fused)
    second.load_state_dict(saved(opt))
    assert_same_state(second.state_dict(), opt.state_dict())
    steps(opt, ours, 4, seed=2)
    steps(second, resumed, 4, seed=2)
    assert_same_state(second.state_dict(), opt.state_dict())
    for a, b in zip(ours, resumed, strict=True):
        assert_same_bits(a, b, "param")


def test_moments_of_a_bfloat16_model_from_torch_are_widened():
    theirs = make_params(dtype=torch.bfloat16)
    judge = torch.optim.AdamW(theirs, foreach=False)
    steps(judge, theirs, 2, seed=1)
    ours = twins(theirs)
    opt = LocalizedAdamW(ours)
    opt.load_state_dict(saved(judge))
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(opt.state[a]["exp_avg"], judge.state[b]["exp_avg"].float(), "exp_avg")
    steps(opt, ours, 1, seed=2)


def test_a_loaded_state_is_ours_alone():
    """With half-width parameters; for others torch itself shares the tensors that it is given."""
    ours = make_params(dtype=torch.bfloat16)
    opt = LocalizedAdamW(ours)
    steps(opt, ours, 1, seed=1)
    state = copy.deepcopy(opt.state_dict())
    second = LocalizedAdamW(twins(ours))
    second.load_state_dict(state)
    for param, index in zip(second.param_groups[0]["params"], state["state"], strict=True):
        if param.numel():
            address = state["state"][index]["exp_avg"].data_ptr()
            assert second.state[param]["exp_avg"].data_ptr() != address


def test_loading_between_steps_is_noticed():
    """The core holds addresses of moments: after a load it must use the new ones."""
    ours = make_params()
    opt = LocalizedAdamW(ours, **OPTIONS)
    steps(opt, ours, 2, seed=1)
    checkpoint, values = saved(opt), twins(ours)
    steps(opt, ours, 3, seed=2)
    wanted = twins(ours)
    opt.load_state_dict(checkpoint)
    for param, value in zip(ours, values, strict=True):
        param.data.copy_(value.data)
    steps(opt, ours, 3, seed=2)
    for a, b in zip(ours, wanted, strict=True):
        assert_same_bits(a, b, "param")


def test_moments_saved_in_another_memory_order():
    """From a contiguous parameter into a transposed one: element by element, not address by."""
    ours = [nn.Parameter(torch.randn(5, 9))]
    opt = LocalizedAdamW(ours, **OPTIONS)
    steps(opt, ours, 3, seed=1)
    turned = [nn.Parameter(ours[0].detach().t().contiguous().t())]
    second = LocalizedAdamW(turned, **OPTIONS)
    second.load_state_dict(saved(opt))
    for _ in range(3):
        give_gradients(ours, turned)
        opt.step()
        second.step()
    assert turned[0].stride() == (1, 5)
    assert_same_bits(turned[0], ours[0], "param")


def test_moments_assigned_by_hand_are_used():
    param = nn.Parameter(torch.ones(4))
    opt = LocalizedAdamW([param], lr=0.1, betas=(0.5, 0.5), weight_decay=0.0)
    param.grad = torch.ones(4)
    opt.step()
    opt.state[param]["exp_avg"] = torch.full((4,), -3.0)
    opt.step()
    assert opt.state[param]["exp_avg"].tolist() == [-1.0] * 4


def test_a_half_saved_state_stays_half():
    """Parameters without state (frozen ones) have none after loading either."""
    ours = make_params()
    opt = LocalizedAdamW(ours)
    give_gradients(ours, ours, skip=(0, 3))
    opt.step()
    state = saved(opt)
    assert list(state["state"]) == [1, 2, 4]
    second = LocalizedAdamW(twins(ours))
    second.load_state_dict(state)
    assert_same_state(second.state_dict(), state)


def test_old_state_dicts():
    """Torch before 1.12 kept `step` as a number and knew fewer keys of a param group."""
    ours = make_params(((5,),))
    opt = LocalizedAdamW(ours)
    steps(opt, ours, 2, seed=1)
    state = saved(opt)
    state["state"][0]["step"] = 2
    for key in ("maximize", "foreach", "fused", "differentiable", "decoupled_weight_decay"):
        del state["param_groups"][0][key]
    copied = twins(ours)
    second = LocalizedAdamW(copied)
    second.load_state_dict(state)
    steps(opt, ours, 2, seed=2)
    steps(second, copied, 2, seed=2)
    assert_same_bits(copied[0], ours[0], "param")
    assert_same_state(second.state_dict(), opt.state_dict())


def test_a_state_of_other_parameters_is_refused_whole():
    ours = make_params()
    opt = LocalizedAdamW(ours)
    steps(opt, ours, 1, seed=1)
    before = copy.deepcopy(opt.state_dict())
    other = LocalizedAdamW(make_params(((3,),)))
    with pytest.raises(ValueError, match="size"):
        opt.load_state_dict(other.state_dict())
    assert_same_state(opt.state_dict(), before)


def planned():
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)})
    layers = LayerMap.from_model(model)
    plan = LayerPlan({"a": 0.5, "b": 0.0}, policy="a test")
    opt = LocalizedAdamW(
        model.named_parameters(), **OPTIONS, layers=layers, plan=plan, max_grad_norm=1.0
    )
    return model, opt


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_plan_layers_and_state_and_go_on_alike(how):
    """Model and optimizer copied together, as one object, so that they stay connected."""
    model, opt = planned()
    params = list(model.parameters())
    steps(opt, params, 3, seed=1)
    params[0].grad = torch.full_like(params[0], torch.nan)
    opt.step()
    other_model, other = how((model, opt))
    assert other.plan == opt.plan
    assert other.plan.policy == "a test"
    assert other.layers.names == ("a", "b")
    assert other.num_skipped_steps == 1
    assert other.state_bytes() == opt.state_bytes() > 0
    assert_same_state(other.state_dict(), opt.state_dict())
    for optimizer, m in ((opt, model), (other, other_model)):
        steps(optimizer, list(m.parameters()), 2, seed=2)
        optimizer.set_plan(LayerPlan({"a": 0.0, "b": 2.0}))
        steps(optimizer, list(m.parameters()), 2, seed=3)
    assert_same_state(other.state_dict(), opt.state_dict())
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert_same_bits(a, b, "param")
    assert other.state[next(other_model.parameters())]["step"] == 5


def test_state_of_a_plan_loads_into_torch():
    model, opt = planned()
    steps(opt, list(model.parameters()), 2, seed=1)
    judge = torch.optim.AdamW(copy.deepcopy(model).named_parameters())
    judge.load_state_dict(saved(opt))
    assert list(judge.state_dict()["state"]) == [0, 1]


def test_state_bytes():
    params = make_params(((7, 3), (2,)), dtype=torch.bfloat16)
    opt = LocalizedAdamW(params, amsgrad=True)
    assert opt.state_bytes() == 0
    steps(opt, params, 1, seed=1)
    assert opt.state_bytes() == 23 * 3 * 4
