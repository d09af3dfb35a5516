"""DDP against one process: plans that change during training, static plans, accumulation."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from numerics import assert_same_bits
from parallel import (
    OPTIONS,
    Run,
    alone,
    assert_same_run,
    batch,
    collect,
    make_model,
    make_optimizer,
    one_backward,
    plan_at,
    train,
)
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradloc import LayerMap, LayerPlan, LocalizedAdamW, layer_grad_norms


def two_backwards(model: nn.Module, ids: Tensor) -> None:
    """Gradients accumulate over two halves; with DDP only the second adds over the ranks."""
    halves = ids.chunk(2)
    for i, half in enumerate(halves):
        waits = i == 0 and isinstance(model, DistributedDataParallel)
        with model.no_sync() if waits else contextlib.nullcontext():
            (model(input_ids=half, labels=half, use_cache=False).loss / len(halves)).backward()


def changing(name: str, options: dict, *, accumulate: bool = False) -> Run:
    model = make_model(name)
    optimizer = make_optimizer(model, **options)
    return train(
        DistributedDataParallel(model),
        optimizer,
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        backward=two_backwards if accumulate else None,
        inner=model,
    )


STATIC_STEPS = 5


def static(*, wrap: bool, dtype: torch.dtype = torch.float32) -> tuple[Run, list[Tensor], int]:
    """A static plan whose frozen layers do not require gradients, set before wrapping."""
    model = make_model("gpt2", dtype)
    layers = LayerMap.from_model(model)
    plan = LayerPlan({name: float(i % 3 == 1) for i, name in enumerate(layers.names)})
    options = {**OPTIONS, "on_freeze": "drop"}
    optimizer = LocalizedAdamW(model.named_parameters(), layers=layers, plan=plan, **options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plan.scales[layers.names[layers.index(name)]] > 0)
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if wrap else (0, 1)
    called = DistributedDataParallel(model) if wrap else model
    for step in range(STATIC_STEPS):
        optimizer.zero_grad()
        one_backward(called, batch(step).chunk(num_ranks)[rank])
        optimizer.step()
    norms = [optimizer.grad_norms(), layer_grad_norms(called, layers)]
    frozen_grads = sum(p.grad is not None for p in model.parameters() if not p.requires_grad)
    run = Run()
    collect(run, model, optimizer)
    return run, norms, frozen_grads


def release_is_refused() -> None:
    model = make_model("gpt2")
    optimizer = make_optimizer(model, max_grad_norm=None, release_gradients=True)
    wrapped = DistributedDataParallel(model)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"release_gradients=True with torch\.distributed.*FSDP2"
    ):
        train(wrapped, optimizer, stop=1, inner=model)
    for param, value in zip(model.parameters(), before, strict=True):
        assert_same_bits(param, value)


def ddp_runs() -> dict[str, object]:
    found: dict[str, object] = {
        "gpt2": changing("gpt2", {}),
        "llama": changing("llama", {"on_freeze": "offload"}),
        "static": static(wrap=True),
    }
    if dist.get_world_size() == 2:
        found["accumulated"] = changing("gpt2", {}, accumulate=True)
        release_is_refused()
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_training_equals_one_process(num_ranks):
    results = run_ranks(ddp_runs, num_ranks)
    expected, norms, frozen_grads = static(wrap=False)
    expected.exact = static(wrap=False, dtype=torch.float64)[0].params
    assert frozen_grads == 0
    for rank, found in enumerate(results):
        where = f"rank {rank} of {num_ranks}"
        for name, options in (("gpt2", {}), ("llama", {"on_freeze": "offload"})):
            assert_same_run(found[name], alone(name, **options), f"{name} on {where}")
            assert found[name].state_bytes == alone(name, **options).state_bytes
            for key, value in results[0][name].params.items():
                assert_same_bits(found[name].params[key], value, f"{name} on {where}: {key}")
        run, our_norms, frozen_grads = found["static"]
        assert_same_run(run, expected, f"static on {where}")
        assert frozen_grads == 0
        for ours, theirs in zip(our_norms, norms, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0, equal_nan=True)
        if num_ranks == 2:
            assert_same_run(found["accumulated"], alone("gpt2"), f"accumulated on {where}")


def test_the_schedule_is_worth_the_name():
    """Layers leave and return, one comes late, and scales are not only 0 and 1."""
    layers = LayerMap.from_model(make_model("gpt2"))
    plans = [plan for step in range(14) if (plan := plan_at(layers, step)) is not None]
    scales = [[plan.scales[name] for plan in plans] for name in layers.names]
    assert any(s[0] and not s[1] and s[2] for s in scales), "leaves and returns"
    assert any(not s[0] and not s[1] and not s[2] and s[3] for s in scales), "comes late"
    assert {0.5, 0.75, 1.25} <= {value for s in scales for value in s}
