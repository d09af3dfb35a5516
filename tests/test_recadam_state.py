"""RecAdam's anchors: saved, loaded, kept through freezing, and what happens where none are."""

import copy
import pickle
import warnings

import pytest
import torch
from numerics import assert_same_bits, twins
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from gradloc import LayerMap, LayerPlan, LocalizedAdamW, RecAdam
from gradloc.distributed import prepare_to_load
from gradloc.optim_record import KEY
from gradloc.wording import bytes_in_words

PULL = RecAdam(gamma=30.0, k=0.5, t0=4.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def small_model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.ModuleDict({"a": nn.Linear(5, 7), "b": nn.Linear(7, 3)}).to(dtype)


def optimizer_of(model, plan=None, recadam=PULL, **options):
    layers = LayerMap.from_model(model)
    named = model.named_parameters()
    return LocalizedAdamW(named, lr=0.01, layers=layers, plan=plan, recadam=recadam, **options)


def train(model, opt, steps, first=0):
    """The same gradients at the same step, whatever ran before."""
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=draw).to(param.dtype)
        opt.step()


def assert_same_models(ours, theirs):
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach(), name)


ONLY_A, ONLY_B = LayerPlan({"a": 1.0, "b": 0.0}), LayerPlan({"a": 0.0, "b": 1.0})


@pytest.mark.parametrize("anchor_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resumed_it_goes_on_bit_for_bit(dtype, anchor_dtype):
    """The optimizer is made when the trained weights are loaded already, as a Trainer does it."""
    recadam = RecAdam(gamma=30.0, k=0.5, t0=4.0, anchor_dtype=anchor_dtype)
    model = small_model(dtype)
    pretrained = {name: param.detach().clone() for name, param in model.named_parameters()}
    opt = optimizer_of(model, recadam=recadam)
    train(model, opt, 3)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, 3, first=3)
    for recadam_now in (recadam, None, RecAdam(gamma=1.0, anchor_dtype="bfloat16")):
        other = small_model(dtype)
        other.load_state_dict(saved[0])
        resumed = optimizer_of(other, recadam=recadam_now)
        resumed.load_state_dict(copy.deepcopy(saved[1]))
        assert resumed.recadam == recadam
        exact = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: dtype}[anchor_dtype]
        for name, param in other.named_parameters():
            anchor = resumed.state[param]["anchor"]
            assert anchor.dtype == (torch.float32 if exact == torch.float16 else exact)
            assert_same_bits(anchor, pretrained[name].to(anchor.dtype), name)
        train(other, resumed, 3, first=3)
        assert_same_models(other, model)


@pytest.mark.parametrize("on_freeze", ["keep", "offload", "drop"])
def test_a_layer_that_returns_is_pulled_to_where_it_began(on_freeze):
    model = small_model()
    pretrained = {name: param.detach().clone() for name, param in model.named_parameters()}
    opt = optimizer_of(model, ONLY_A, on_freeze=on_freeze)
    train(model, opt, 2)
    size, rest = (sum(p.numel() for p in model[name].parameters()) for name in "ab")
    assert opt.state_bytes() == 4 * 3 * size
    opt.set_plan(ONLY_B)
    here = {"keep": 3 * size, "offload": 0, "drop": size}[on_freeze]
    assert opt.state_bytes() == 4 * here
    assert opt.offloaded_bytes() == (4 * 3 * size if on_freeze == "offload" else 0)
    train(model, opt, 2)
    assert opt.state_bytes() == 4 * (here + 3 * rest)
    saved = copy.deepcopy(opt.state_dict())
    for resume in (False, True):
        if resume:
            opt = optimizer_of(model, ONLY_B, on_freeze=on_freeze)
            opt.load_state_dict(saved)
        opt.set_plan(ONLY_A)
        train(model, opt, 1)
        for name, param in model.named_parameters():
            assert_same_bits(opt.state[param]["anchor"], pretrained[name], name)
        steps = {float(opt.state[param]["step"]) for param in model["a"].parameters()}
        assert steps == {1.0 if on_freeze == "drop" else 3.0}


def test_a_skipped_step_takes_back_moments_and_not_an_older_anchor():
    model = small_model()
    pretrained = copy.deepcopy(model.state_dict())
    opt = optimizer_of(model, ONLY_A, on_freeze="drop", on_nonfinite="skip")
    train(model, opt, 2)
    opt.set_plan(ONLY_B)
    opt.set_plan(LayerPlan({"a": 1.0, "b": 1.0}))
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.inf)
    opt.step()
    assert opt.num_skipped_steps == 1
    for name, param in model.named_parameters():
        if name.startswith("a"):
            assert opt.state[param].keys() == {"anchor"}
            assert_same_bits(opt.state[param]["anchor"], pretrained[name], name)
        else:
            assert param not in opt.state
    train(model, opt, 1)
    assert all(opt.state[param].keys() >= {"step", "anchor"} for param in model.parameters())


@pytest.mark.parametrize("before", [0, 1], ids=["new", "used"])
@pytest.mark.parametrize("anchor_dtype", [None, "bfloat16"])
def test_through_distributed_state_dicts(anchor_dtype, before):
    """The whole state by parameters' names, with a layer that has an anchor and no moments."""
    recadam = RecAdam(gamma=30.0, k=0.5, t0=4.0, anchor_dtype=anchor_dtype)
    model = small_model()
    opt = optimizer_of(model, ONLY_A, recadam=recadam, on_freeze="drop")
    train(model, opt, 2)
    opt.set_plan(ONLY_B)
    train(model, opt, 1, first=2)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=whole))
    assert set(saved["state"]["a.bias"]) == {"anchor"}
    other = copy.deepcopy(model)
    resumed = optimizer_of(other, recadam=None)
    train(other, resumed, before)
    other.load_state_dict(model.state_dict())
    prepare_to_load(other, resumed, saved)
    set_optimizer_state_dict(other, resumed, saved, options=StateDictOptions(full_state_dict=True))
    for one in (opt, resumed):
        one.set_plan(LayerPlan({"a": 1.0, "b": 0.5}))
    for name, param in model.named_parameters():
        ours = resumed.state[other.get_parameter(name)]
        assert_same_bits(ours["anchor"], opt.state[param]["anchor"], name)
    train(model, opt, 2, first=3)
    train(other, resumed, 2, first=3)
    assert_same_models(other, model)


def test_copies_and_pickles_go_on_alike():
    model = small_model()
    opt = optimizer_of(model)
    train(model, opt, 2)
    copies = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    train(model, opt, 2, first=2)
    for copied, other in copies:
        assert other.recadam == PULL
        train(copied, other, 2, first=2)
        assert_same_models(copied, model)


def test_a_state_without_anchors_is_said_to_have_none():
    """Of torch's AdamW, or of ours without RecAdam: anchored at the weights that are there."""
    model = small_model()
    plain = optimizer_of(model, recadam=None)
    train(model, plain, 2)
    torchs = torch.optim.AdamW(twins(model.parameters()))
    torchs.load_state_dict(plain.state_dict())
    trained = {name: param.detach().clone() for name, param in model.named_parameters()}
    for state in (plain.state_dict(), torchs.state_dict()):
        opt = optimizer_of(model)
        with pytest.warns(RuntimeWarning, match="4 parameters have moments and no anchor"):
            opt.load_state_dict(state)
        assert opt.recadam == PULL
    train(model, opt, 1)
    for name, param in model.named_parameters():
        assert_same_bits(opt.state[param]["anchor"], trained[name], name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer_of(model, recadam=RecAdam(gamma=0.0)).load_state_dict(plain.state_dict())
        optimizer_of(model).load_state_dict(optimizer_of(model).state_dict())


def test_a_state_with_anchors_loads_into_adamw():
    model = small_model()
    opt = optimizer_of(model)
    train(model, opt, 2)
    state = opt.state_dict()
    params = twins(model.parameters())
    theirs = torch.optim.AdamW(params, lr=0.01)
    theirs.load_state_dict(copy.deepcopy(state))
    stripped = copy.deepcopy(state)
    del stripped["param_groups"][0][KEY]
    ours = optimizer_of(model, recadam=None)
    ours.load_state_dict(stripped)
    assert ours.recadam is None
    assert all("anchor" not in ours.state[param] for param in model.parameters())
    for a, b in zip(model.parameters(), params, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    ours.step()
    theirs.step()
    for a, b in zip(model.parameters(), params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_what_does_not_fit_is_refused_before_anything_changes():
    model = small_model()
    opt = optimizer_of(model)
    train(model, opt, 2)
    weights = [param.detach().clone() for param in model.parameters()]
    state = copy.deepcopy(opt.state_dict())
    state["state"][1]["anchor"] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"'anchor' of parameter 'a.bias' has shape=\(6,\)"):
        opt.load_state_dict(state)
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"lr·scale·gamma=3 is above 2"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.01
    for param, before in zip(model.parameters(), weights, strict=True):
        assert_same_bits(param.detach(), before)


def test_the_report_shows_what_anchors_take():
    model = small_model()
    opt = optimizer_of(model, recadam=RecAdam(gamma=1.0, anchor_dtype="bfloat16"))
    train(model, opt, 1)
    size = sum(param.numel() for param in model.parameters())
    assert opt.state_bytes() == size * (4 + 4 + 2)
    line, head, first, _ = opt.report().splitlines()
    assert line.endswith(f"moments {bytes_in_words(8 * size)}, anchors {bytes_in_words(2 * size)}")
    column = head.index("anchors") + len("anchors")
    assert first[:column].endswith(f"  {bytes_in_words(2 * 42)}")
    plain = optimizer_of(model, recadam=None)
    train(model, plain, 1)
    assert "anchors" not in plain.report()
