"""LocalizedAdamW without a plan is torch.optim.AdamW.

Plans, clipping and norms are in test_optim_plan.py, state dicts in test_optim_state.py, refusals in
test_optim_errors.py.
"""

import copy
import itertools
import warnings

import pytest
import torch
from numerics import assert_same_bits, assert_within, max_error
from torch import nn

from gradloc import LocalizedAdamW

BACKENDS = pytest.mark.parametrize("fused", [None, False], ids=["core", "plain-torch"])
ULP = 2.0**-23


def within_ulps(ours, theirs, ulps, what=""):
    """Parameters of size 1 or below are compared in ulps of 1: updates are of the size of lr."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_within(a, b, ulps * ULP * b.detach().double().abs().clamp(min=1), f"{what} {i}")


def make_params(shapes=((5,), (17, 3), (), (0, 4), (40, 33)), dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def twins(params):
    """Another list with the same values and memory order."""
    return [copy.deepcopy(p) for p in params]


def give_gradients(ours, theirs, skip=()):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        grad = None if i in skip else torch.randn_like(a) * 10.0 ** -(i % 3)
        a.grad = grad
        b.grad = None if grad is None else grad.clone(memory_format=torch.preserve_format)


OPTIONS = {
    "defaults": {},
    "all-other": {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3},
    "no-decay": {"lr": 0.1, "weight_decay": 0.0},
    "no-momentum": {"betas": (0.0, 0.0), "eps": 1e-3},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.5)},
    "both": {"amsgrad": True, "maximize": True, "lr": 0.01},
    "no-length": {"lr": 0.0},
    "tensor-lr": {"lr": torch.tensor(0.003)},
}


@BACKENDS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, fused):
    ours = make_params()
    theirs = twins(ours)
    opt = LocalizedAdamW(ours, **options, fused=fused)
    judge = torch.optim.AdamW(theirs, **options, foreach=False)
    before = twins(ours)
    for _ in range(30):
        give_gradients(ours, theirs)
        opt.step()
        judge.step()
    within_ulps(ours, theirs, 4)
    if options.get("lr") != 0.0:
        assert all(max_error(a, b) > 1e-3 for a, b in zip(ours, before, strict=True) if a.numel())
    for a, b in zip(ours, theirs, strict=True):
        assert opt.state[a].keys() == judge.state[b].keys()
        assert float(opt.state[a]["step"]) == 30


@BACKENDS
def test_param_groups_with_other_hyperparameters(fused):
    ours = make_params()
    theirs = twins(ours)

    def groups(params):
        return [
            {"params": params[:2], "lr": 0.01, "betas": (0.7, 0.9)},
            {"params": params[2:3], "weight_decay": 0.5, "maximize": True},
            {"params": params[3:], "eps": 1e-2, "amsgrad": True},
        ]

    opt = LocalizedAdamW(groups(ours), lr=0.002, fused=fused)
    judge = torch.optim.AdamW(groups(theirs), lr=0.002, foreach=False)
    late = nn.Parameter(torch.randn(6))
    for step in range(12):
        if step == 5:
            ours.append(late)
            theirs.append(copy.deepcopy(late))
            opt.add_param_group({"params": [ours[-1]], "lr": 0.3})
            judge.add_param_group({"params": [theirs[-1]], "lr": 0.3})
        give_gradients(ours, theirs)
        opt.step()
        judge.step()
    within_ulps(ours, theirs, 4)


def test_thousand_steps_on_the_same_gradients():
    """Stated bound: 8 ulps of a parameter of size up to 1; measured 1, torch's own paths differ by 2.

    Both round p·decay and p - update once a step. Their updates differ by a few ulps of the update,
    about lr = 1/1000 of the parameter, so a rounding of p comes out differently in a few of the
    1,000 steps only, by one ulp and with either sign. Moments are recursions that forget: the few
    roundings of a step in m (relative to the gradients' size) and v weigh in by 1/(1-beta) steps,
    with random signs: below 16 ulps.
    """
    size = 5000
    start = torch.randn(size)
    runs = {}
    for name, make in {
        "ours": LocalizedAdamW,
        "single": lambda p: torch.optim.AdamW(p, foreach=False),
        "fused": lambda p: torch.optim.AdamW(p, fused=True),
    }.items():
        draw = torch.Generator().manual_seed(1)
        scale = torch.randn(size, generator=draw).mul(3).exp()
        param = nn.Parameter(start.clone())
        opt = make([param])
        for _ in range(1000):
            param.grad = torch.randn(size, generator=draw) * scale
            opt.step()
        runs[name] = (param.detach(), opt.state[param])
    ours, state = runs["ours"]
    for name in ("single", "fused"):
        theirs, their_state = runs[name]
        within_ulps([ours], [theirs], 8, name)
        v = their_state["exp_avg_sq"]
        assert_within(state["exp_avg_sq"], v, 16 * ULP * v, f"{name} exp_avg_sq")
        assert_within(state["exp_avg"], their_state["exp_avg"], 16 * ULP * v.sqrt(), f"{name} m")
    yardstick = max_error(runs["single"][0], runs["fused"][0])
    assert max_error(ours, runs["single"][0]) <= 4 * yardstick


def train_gpt2(make_optimizer):
    """1,000 steps of a one-block GPT-2 with dropout; its parameters, less one bias, and losses."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).train()
    opt = make_optimizer(model.parameters())
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(1, 4, (2000,), generator=draw).cumsum(0) % 24
    losses = []
    for _ in range(1000):
        starts = torch.randint(0, 1900, (4,), generator=draw)
        batch = torch.stack([text[start : start + 12] for start in starts])
        logits = model(input_ids=batch).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    # Softmax does not see the bias of the keys: its gradient is 0 but for rounding, and Adam turns
    # rounding into steps of full length. Nothing can be said about it, nor does it matter.
    model.transformer.h[0].attn.c_attn.bias.data[16:32] = 0
    return torch.cat([p.detach().flatten() for p in model.parameters()]), torch.stack(losses)


def test_thousand_training_steps():
    """Stated bound: 2e-6 (16 ulps of 1) for parameters and losses; measured 4e-7 and 5e-7.

    torch's own foreach and fused paths end 3e-7 apart; ours is held to four times what they are.
    Rounding differences pass through gradients into the next step, but training contracts: they do
    not grow as long as the losses fall smoothly, which the bound on the losses shows.
    """
    ours = train_gpt2(lambda p: LocalizedAdamW(p, weight_decay=0.1))
    foreach = train_gpt2(lambda p: torch.optim.AdamW(p, weight_decay=0.1, foreach=True))
    fused = train_gpt2(lambda p: torch.optim.AdamW(p, weight_decay=0.1, fused=True))
    assert ours[1][-1] < 0.6 * ours[1][0], "the model learns"
    for found, wanted, what in zip(ours, foreach, ("parameters", "losses"), strict=True):
        assert_within(found, wanted, 2e-6, what)
    yardstick = max_error(foreach[0], fused[0])
    assert max_error(ours[0], foreach[0]) <= 4 * yardstick + 1e-7


SCHEDULERS = {
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=9),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 7)),
}


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(schedule):
    """OneCycleLR also cycles betas."""
    ours = make_params()
    theirs = twins(ours)
    opt, judge = LocalizedAdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01, foreach=False)
    schedules = [schedule(opt), schedule(judge)]
    seen = set()
    for _ in range(19):
        give_gradients(ours, theirs)
        for optimizer, scheduler in zip((opt, judge), schedules, strict=True):
            optimizer.step()
            scheduler.step()
        seen.add((opt.param_groups[0]["lr"], opt.param_groups[0]["betas"]))
        assert opt.param_groups[0]["lr"] == judge.param_groups[0]["lr"]
    assert len(seen) > 5
    within_ulps(ours, theirs, 4)


def test_closure():
    param = nn.Parameter(torch.tensor([2.0]))
    opt = LocalizedAdamW([param], lr=0.5, weight_decay=0.0)
    calls = []

    def closure():
        opt.zero_grad()
        assert torch.is_grad_enabled()
        loss = (param**2).sum()
        loss.backward()
        calls.append(float(loss))
        return loss

    assert float(opt.step(closure)) == 4.0
    assert calls == [4.0]
    assert float(param) == pytest.approx(1.5)
    assert opt.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    """A zero gradient decays and moves on; a missing one leaves everything as it is."""
    ours = make_params()
    theirs = twins(ours)
    opt, judge = LocalizedAdamW(ours), torch.optim.AdamW(theirs, foreach=False)
    give_gradients(ours, theirs)
    for optimizer in (opt, judge):
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    between = twins(ours)
    opt.step()
    judge.step()
    within_ulps(ours, theirs, 2)
    moved = any(max_error(a, b) > 0 for a, b in zip(ours, between, strict=True) if a.numel())
    assert moved is not set_to_none
    assert (ours[0].grad is None) is set_to_none


def test_hooks():
    opt = LocalizedAdamW(make_params(((3,),)))
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    opt.register_state_dict_post_hook(lambda o, d: seen.append("saved"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert seen == ["pre", "post", "saved", "loaded"]


def test_named_parameters_are_the_same():
    module = nn.Linear(4, 3)
    other = copy.deepcopy(module)
    opts = [LocalizedAdamW(module.named_parameters()), LocalizedAdamW(other.parameters())]
    give_gradients(list(module.parameters()), list(other.parameters()))
    for opt in opts:
        opt.step()
    assert_same_bits(module.weight, other.weight)
    assert opts[0].param_groups[0]["param_names"] == ["weight", "bias"]


def test_step_counts_are_per_tensor():
    """apex and Transformer Engine count by group: a tensor that joins late gets a wrong correction."""
    ours = make_params()
    theirs = twins(ours)
    opt, judge = LocalizedAdamW(ours), torch.optim.AdamW(theirs, foreach=False)
    for skip in [(0, 2), (0,), (), (1,), (0, 1, 2, 3, 4), ()]:
        give_gradients(ours, theirs, skip)
        opt.step()
        judge.step()
    within_ulps(ours, theirs, 2)
    assert [int(opt.state[p]["step"]) for p in ours] == [3, 4, 4, 5, 5]


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_scaler(enabled):
    """An overflowing step is skipped and the scale halved, as with torch's optimizer."""
    ours = make_params(((6, 5),))
    theirs = twins(ours)
    runs = []
    for params, opt in (
        (ours, LocalizedAdamW(ours, lr=0.01)),
        (theirs, torch.optim.AdamW(theirs, lr=0.01, foreach=False)),
    ):
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
        for step in range(5):
            opt.zero_grad()
            factor = torch.inf if enabled and step == 2 else 1.0 + step
            scaler.scale((params[0] ** 3).sum() * factor).backward()
            scaler.step(opt)
            scaler.update()
        runs.append((scaler.get_scale(), int(opt.state[params[0]]["step"])))
    assert runs[0] == runs[1] == ((512.0, 4) if enabled else (1.0, 5))
    within_ulps(ours, theirs, 2)


def awkward_params():
    base = torch.randn(12, 10)
    return {
        "transposed": torch.randn(7, 9).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "zero-dim": torch.randn(()),
        "empty": torch.randn(3, 0),
        "strided": base[:, ::2],
        "columns": base[:, 1::2],
        "float64": torch.randn(11, dtype=torch.float64),
        "size-one-dims": torch.randn(1, 5, 1),
        "dense": torch.randn(33),
    }


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_layouts_in_one_optimizer(max_grad_norm):
    """The core takes the dense ones, plain torch the rest; clipping goes over both together."""
    ours = {k: nn.Parameter(t) for k, t in awkward_params().items()}
    theirs = {k: nn.Parameter(t.detach().clone()) for k, t in ours.items()}
    opt = LocalizedAdamW(ours.values(), lr=0.01, max_grad_norm=max_grad_norm)
    judge = torch.optim.AdamW(theirs.values(), lr=0.01, foreach=False)
    for _ in range(6):
        for name, param in ours.items():
            param.grad = torch.randn(param.shape, dtype=param.dtype)  # contiguous
            theirs[name].grad = param.grad.clone()
        opt.step()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm, foreach=False)
        judge.step()
    within_ulps(ours.values(), theirs.values(), 4)
    assert ours["transposed"].stride() == (1, 9)
    assert opt.state[ours["float64"]]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_parameters_keep_float32_moments(dtype):
    """Held to plain torch's float32 AdamW whose parameter is rounded after every step."""
    ours = make_params(dtype=dtype)
    exact = [nn.Parameter(p.detach().float()) for p in ours]
    opt, judge = LocalizedAdamW(ours, lr=0.01), torch.optim.AdamW(exact, lr=0.01, foreach=False)
    for _ in range(20):
        give_gradients(ours, twins(ours))
        for a, b in zip(ours, exact, strict=True):
            b.grad = a.grad.float()
        opt.step()
        judge.step()
        for b in exact:
            b.data.copy_(b.data.to(dtype))
    for a, b in zip(ours, exact, strict=True):
        # A rounding on the other side of a tie: one ulp of the half-width type, and rare.
        assert_within(a, b, 1.01 * torch.finfo(dtype).eps * b.detach().abs(), "param")
        assert a.numel() < 100 or float((a.detach() != b.detach()).float().mean()) < 0.01
        assert opt.state[a]["exp_avg"].dtype == torch.float32
        assert_within(opt.state[a]["exp_avg"], judge.state[b]["exp_avg"], 1e-6, "exp_avg")


def test_memory_of_a_parameter_may_be_replaced_between_steps():
    ours = make_params(((40,),))
    theirs = twins(ours)
    opt, judge = LocalizedAdamW(ours), torch.optim.AdamW(theirs, foreach=False)
    for _ in range(3):
        give_gradients(ours, theirs)
        opt.step()
        judge.step()
        for p in itertools.chain(ours, theirs):
            p.data = p.data * 2
    within_ulps(ours, theirs, 4)


def test_gradients_are_left_as_they_are_by_clipping():
    params = make_params()
    give_gradients(params, twins(params))
    before = [p.grad.clone() for p in params]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LocalizedAdamW(params, max_grad_norm=1e-3).step()
    for param, grad in zip(params, before, strict=True):
        assert_same_bits(param.grad, grad, "gradient")
