"""release_gradients: the update during backward, what it equals, and what cannot be combined."""

import copy
import gc
import weakref

import pytest
import torch
from numerics import assert_same_bits
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW


class Net(nn.Module):
    """Three layers, the first and the last tied."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.a = nn.Linear(16, 16, dtype=dtype)
        self.b = nn.Linear(16, 16, dtype=dtype)
        self.c = nn.Linear(16, 16, dtype=dtype)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x))))).square().mean()


def plan_of(layers, *active):
    return LayerPlan({name: 0.5 * (name in active) for name in layers.names})


def pair(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Net(dtype)
    twin = copy.deepcopy(model)
    made = []
    for net, release in ((model, True), (twin, False)):
        layers = LayerMap.from_model(net)
        opt = LocalizedAdamW(
            net.named_parameters(), lr=0.1, layers=layers, release_gradients=release, **options
        )
        made.append((net, opt))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [None, False])
def test_the_same_bits_as_without(dtype, fused):
    options = {"stochastic_rounding": dtype == torch.bfloat16, "seed": 7}
    (model, opt), (twin, judge) = pair(dtype, fused=fused, amsgrad=True, **options)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in (opt, judge)]
    for number in range(9):
        if number in (3, 6):
            for one in (opt, judge):
                one.set_plan(plan_of(one.layers, "a", "c") if number == 3 else None)
        x = torch.randn(8, 16, dtype=dtype)
        for net, one in ((model, opt), (twin, judge)):
            one.zero_grad()
            net(x).backward()
            if one is opt:
                assert all(p.grad is None for p in net.parameters()), "freed by backward"
            one.step()
        for scheduler in schedulers:
            scheduler.step()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert_same_bits(p, q, f"{name} after step {number}")
        assert torch.equal(opt.grad_norms().isnan(), judge.grad_norms().isnan())
        torch.testing.assert_close(opt.grad_norms(), judge.grad_norms(), equal_nan=True)
    assert int(opt.state[model.b.weight]["step"]) == 6


def test_one_gradient_at_a_time():
    """When the next one comes, none is left."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    opt = LocalizedAdamW(model.parameters(), release_gradients=True)
    alive = []

    def counting(param):
        alive.append(sum(p.grad is not None for p in model.parameters()))

    for param in model.parameters():  # after ours, which has freed the gradient by then
        param.register_post_accumulate_grad_hook(counting)
    model(torch.randn(4, 64)).sum().backward()
    opt.step()
    assert alive == [0] * 8


def test_two_backward_passes_before_a_step_are_an_error():
    model, _ = pair()[0]
    model(torch.randn(4, 16)).backward()
    with pytest.raises(RuntimeError, match=r"second gradient .* arrived before optimizer\.step"):
        model(torch.randn(4, 16)).backward()


def test_after_that_error_a_step_goes_on():
    (model, opt), (twin, judge) = pair()
    first, second, third = torch.randn(3, 4, 16).unbind()
    model(first).backward()
    with pytest.raises(RuntimeError, match="second gradient"):
        model(second).backward()
    opt.zero_grad()
    opt.step()
    model(third).backward()
    opt.step()
    for x in (first, third):
        judge.zero_grad()
        twin(x).backward()
        judge.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(p, q, "the second gradient is lost, nothing else")


def test_a_deleted_optimizer_trains_no_more_and_a_new_one_takes_over():
    model = Net()
    opt = LocalizedAdamW(model.parameters(), lr=0.1, release_gradients=True)
    model(torch.randn(4, 16)).backward()
    opt.step()
    newer = LocalizedAdamW(model.parameters(), lr=0.0, weight_decay=0.0, release_gradients=True)
    before = model.b.weight.detach().clone()
    model(torch.randn(4, 16)).backward()
    newer.step()
    assert torch.equal(model.b.weight, before), "the newer one's rate is 0"
    assert newer.state[model.b.weight]["step"] == 1
    reference = weakref.ref(newer)
    del opt, newer
    assert reference() is None, "hooks keep no optimizer alive"
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 16)).backward()
        assert model.b.weight.grad is not None
    other.step()
    assert not torch.equal(model.b.weight, before)


def test_exchanged_parameters_train_at_once():
    model, opt = pair()[0]
    model(torch.randn(4, 16)).backward()
    opt.step()
    model.b.weight = nn.Parameter(model.b.weight.detach().clone())
    opt.param_groups[0]["params"] = [model.get_parameter(n) for n, _ in model.named_parameters()]
    before = model.b.weight.detach().clone()
    model(torch.randn(4, 16)).backward()
    opt.step()
    assert not torch.equal(model.b.weight, before)


def test_a_plan_between_backward_and_step_is_proven_by_the_next():
    model, opt = pair()[0]
    opt.set_plan(plan_of(opt.layers, "a", "c"))
    model(torch.randn(4, 16)).backward()
    opt.set_plan(plan_of(opt.layers, "b"))
    opt.step()  # what came before is no proof: no warning
    model.b.requires_grad_(False)
    model(torch.randn(4, 16)).backward()
    with pytest.raises(RuntimeError, match="nothing trains"):
        opt.step()


def test_a_step_with_closure_and_gradients_set_by_hand():
    (model, opt), (twin, judge) = pair()
    x = torch.randn(4, 16)

    def closure(net):
        def run():
            loss = net(x)
            loss.backward()
            return loss

        return run

    assert opt.step(closure(model)).item() == judge.step(closure(twin)).item()
    judge.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    opt.step()
    judge.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(p, q, "by hand")
        assert p.grad is None


def test_parameters_that_are_unfrozen_later():
    model = Net()
    model.b.requires_grad_(False)
    layers = LayerMap.from_model(model)
    opt = LocalizedAdamW(
        model.named_parameters(),
        layers=layers,
        plan=plan_of(layers, "a", "c"),
        release_gradients=True,
    )
    model(torch.randn(4, 16)).backward()
    opt.step()
    before = model.b.weight.detach().clone()
    model.b.requires_grad_(True)
    opt.set_plan(plan_of(layers, "b"))
    model(torch.randn(4, 16)).backward()
    opt.step()
    assert model.b.weight.grad is None
    assert not torch.equal(model.b.weight, before)


def test_copies_and_loaded_states_release_too():
    model, opt = pair()[0]
    model(torch.randn(4, 16)).backward()
    opt.step()
    clone, copied = copy.deepcopy((model, opt))
    copied.load_state_dict(opt.state_dict())
    before = clone.b.weight.detach().clone()
    clone(torch.randn(4, 16)).backward()
    copied.step()
    assert clone.b.weight.grad is None
    assert not torch.equal(clone.b.weight, before)
    assert torch.equal(model.b.weight, before), "the copy's hooks are the copy's"
    del opt, copied
    gc.collect()


COMBINATIONS = [
    ({"max_grad_norm": 1.0}, r"release_gradients=True with max_grad_norm=1\.0"),
    ({"on_nonfinite": "skip"}, "release_gradients=True with on_nonfinite='skip'"),
    ({"on_nonfinite": "raise"}, "release_gradients=True with on_nonfinite='raise'"),
]


@pytest.mark.parametrize(("options", "message"), COMBINATIONS)
def test_what_cannot_be_combined(options, message):
    with pytest.raises(ValueError, match=message):
        LocalizedAdamW(Net().parameters(), release_gradients=True, **options)


def test_a_state_that_clips_is_refused():
    model, opt = pair()[0]
    clipping = LocalizedAdamW(
        model.named_parameters(), layers=LayerMap.from_model(model), max_grad_norm=1.0
    )
    with pytest.raises(ValueError, match="release_gradients=True with max_grad_norm"):
        opt.load_state_dict(clipping.state_dict())
    assert opt.max_grad_norm is None


def test_grad_scaler_is_refused():
    model, opt = pair()[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.randn(4, 16))).backward()
    with pytest.raises((RuntimeError, AssertionError)) as caught:
        scaler.step(opt)
    assert "release_gradients=True with GradScaler" in str(caught.value)
