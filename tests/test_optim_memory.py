"""What happens to the optimizer when tensors change under it: other memory, shape, dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from gradloc import LocalizedAdamW

OPTIONS = {"lr": 0.1, "weight_decay": 0.01}


def stepped(shape: tuple[int, ...], **options: object) -> tuple[Tensor, LocalizedAdamW]:
    """A parameter and its optimizer after one step."""
    param = torch.nn.Parameter(torch.randn(shape))
    optimizer = LocalizedAdamW([param], **OPTIONS, **options)
    param.grad = torch.randn(shape)
    optimizer.step()
    return param, optimizer


def twin_of(param: Tensor, optimizer: LocalizedAdamW) -> tuple[Tensor, torch.optim.AdamW]:
    """A torch AdamW in the same state."""
    twin = torch.nn.Parameter(param.detach().clone())
    theirs = torch.optim.AdamW([twin], **OPTIONS)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, theirs


@pytest.mark.parametrize("saved", [(2, 8), (7, 8), (8,), (1, 8)], ids=str)
def test_a_state_of_another_shape_is_refused(saved: tuple[int, ...]) -> None:
    """The strides of [2, 8] and [5, 8] are the same: only the shape tells them apart."""
    _, small = stepped(saved)
    param, optimizer = stepped((5, 8))
    before = param.detach().clone()
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg.*has shape=.*the parameter \(5, 8\)"):
        optimizer.load_state_dict(small.state_dict())
    assert torch.equal(param, before)
    after = optimizer.state_dict()["state"][0]
    assert all(torch.equal(value, after[key]) for key, value in state["state"][0].items())


def test_a_moment_of_another_shape_is_refused_at_the_step() -> None:
    param, optimizer = stepped((5, 8))
    before = param.detach().clone()
    optimizer.state[param]["exp_avg"] = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"'exp_avg' has shape=\(2, 8\)"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("how", ["share_memory_", "data", "replaced"])
def test_a_moment_that_moves_is_followed(key: str, how: str) -> None:
    """Holding a tensor does not hold its memory: its storage can be exchanged in place."""
    param, optimizer = stepped((64, 64))
    twin, theirs = twin_of(param, optimizer)
    moment = optimizer.state[param][key]
    if how == "share_memory_":
        moment.share_memory_()
    elif how == "data":
        moment.data = moment.data.clone()
    else:
        optimizer.state[param][key] = moment.clone()
    for _ in range(2):
        param.grad = torch.randn(64, 64)
        twin.grad = param.grad.clone()
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        optimizer.state[param][key], theirs.state[twin][key], rtol=1e-6, atol=1e-7
    )


def test_a_parameter_cut_in_place_is_refused() -> None:
    """Same address, fewer rows: the rows cut off must not be written."""
    param, optimizer = stepped((8, 4))
    whole = param.data
    before = whole.clone()
    param.grad = None
    param.data = whole[:2]
    param.grad = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"'exp_avg' has shape=\(8, 4\), its parameter \(2, 4\)"):
        optimizer.step()
    assert torch.equal(whole, before)


def test_a_parameter_transposed_in_place_is_followed() -> None:
    param, optimizer = stepped((4, 4))
    twin, theirs = twin_of(param, optimizer)
    for one in (param, twin):
        one.grad = None
        one.data = one.data.t()
        one.grad = torch.zeros(4, 4)
        one.grad[0, 2] = 1.0
    optimizer.step()
    theirs.step()
    torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("step", [torch.tensor(7), torch.tensor([7.0]), 7.0, torch.tensor(7.0)])
def test_a_step_count_of_another_dtype_is_read_right(step: Tensor | float) -> None:
    param, optimizer = stepped((8,))
    optimizer.state[param]["step"] = torch.as_tensor(step)
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 8.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_checkpoint_of_fused_adamw_loads(dtype: torch.dtype) -> None:
    """Its groups say fused=True; how ours computes is not the checkpoint's to say."""
    twin = torch.nn.Parameter(torch.randn(6, dtype=dtype))
    theirs = torch.optim.AdamW([twin], **OPTIONS, fused=True)
    twin.grad = torch.randn_like(twin)
    theirs.step()
    param = torch.nn.Parameter(twin.detach().clone())
    optimizer = LocalizedAdamW([param], **OPTIONS)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert optimizer.param_groups[0]["fused"] is None
    param.grad = torch.randn_like(param)
    twin.grad = param.grad.clone()
    optimizer.step()
    theirs.step()
    torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-7)


def test_hyperparameters_out_of_range_are_refused_on_load() -> None:
    _, optimizer = stepped((4,))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["betas"] = (1.0, 0.999)
    with pytest.raises(ValueError, match="Invalid beta parameter at index 0"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain torch"])
def test_small_beta1_keeps_the_gradient(beta1: float, fused: bool | None) -> None:
    """Where m is large, m + (1-β1)(g - m) loses g: torch takes the nearer end, and so do we."""
    param = torch.nn.Parameter(torch.zeros(40))
    optimizer = LocalizedAdamW([param], betas=(beta1, 0.999), fused=fused)
    twin = torch.nn.Parameter(torch.zeros(40))
    theirs = torch.optim.AdamW([twin], betas=(beta1, 0.999), foreach=False)
    for size in (1e8, 1.0):
        param.grad = size * torch.randn(40)
        twin.grad = param.grad.clone()
        optimizer.step()
        theirs.step()
    moment, expected = optimizer.state[param]["exp_avg"], theirs.state[twin]["exp_avg"]
    torch.testing.assert_close(moment, expected, rtol=1e-6, atol=0.0)
