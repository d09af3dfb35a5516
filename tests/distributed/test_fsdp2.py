"""FSDP2 against one process: plan changes, clipping, norms, memory, rounding, fused backward."""

import pytest
import torch
import torch.distributed as dist
from numerics import assert_same_bits
from parallel import (
    NUM_STEPS,
    Run,
    alone,
    assert_same_run,
    batch,
    fully_sharded,
    make_model,
    make_optimizer,
    one_backward,
    train,
    whole,
)
from ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from gradloc import LayerMap, LocalizedAdamW, RecAdam, layer_grad_norms, sharding

RUNS = {
    "default": {},
    "drop": {"on_freeze": "drop"},
    "plain": {"fused": False, "amsgrad": True, "max_grad_norm": None},
    "hybrid": {},  # shards over two ranks, replicas over two
    "recadam": {"recadam": RecAdam(gamma=30.0, k=0.5, t0=6.0)},
}
FUSED = {"max_grad_norm": None, "release_gradients": True}


def sharded_run(name: str, options: dict, *, hybrid: bool = False) -> Run:
    model = make_model(name)
    if hybrid:
        names = ("replicate", "shard")
        fully_sharded(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=names))
    else:
        fully_sharded(model)
    optimizer = make_optimizer(model, **options)
    run = train(model, optimizer, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    if options.get("release_gradients"):
        assert all(param.grad is None for param in model.parameters())
    return run


def sharded_runs(names: list[tuple[str, str]]) -> dict[tuple[str, str], Run]:
    return {
        (name, key): sharded_run(name, RUNS[key], hybrid=key == "hybrid") for name, key in names
    }


CASES = {
    2: [("gpt2", "default"), ("gpt2", "plain"), ("gpt2", "recadam"), ("llama", "drop")],
    4: [("gpt2", "drop"), ("llama", "default"), ("llama", "plain"), ("gpt2", "hybrid")],
}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_training_equals_one_process(num_ranks):
    results = run_ranks(sharded_runs, num_ranks, CASES[num_ranks])
    for case in CASES[num_ranks]:
        expected = alone(case[0], **RUNS[case[1]])
        ours = [result[case] for result in results]
        for rank, run in enumerate(ours):
            assert_same_run(run, expected, f"{case} on rank {rank} of {num_ranks}")
            for step in range(NUM_STEPS):
                assert_same_bits(run.norms[step], ours[0].norms[step], f"rank {rank}, {step}")
            assert run.state_bytes == run.expected_bytes
        # What the ranks hold is what one process holds: shards, and nothing twice.
        replicas = 2 if case[1] == "hybrid" else 1
        for step, total in enumerate(expected.state_bytes):
            assert sum(run.state_bytes[step] for run in ours) == replicas * total, (case, step)
        assert len({run.state_bytes[0] for run in ours}) > 1, "shards were to be uneven"
    for name in ("gpt2", "llama"):
        drops = alone(name, **RUNS["drop"]).state_bytes
        assert drops[3] < drops[2], "the schedule was to free moments"


def one_bad_shard() -> tuple[int, list[bool]]:
    """A NaN that only one rank sees: every rank skips the step."""
    model = fully_sharded(make_model("gpt2"))
    optimizer = make_optimizer(model)
    one_backward(model, batch(0))
    if dist.get_rank() == 1:
        sharding.local(model.transformer.wte.weight.grad)[0, 0] = torch.nan
    before = [whole(param) for param in model.parameters()]
    optimizer.step()
    after = [whole(param) for param in model.parameters()]
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    return optimizer.num_skipped_steps, [*same, not optimizer.state]


def test_a_nan_in_one_shard_skips_the_step_on_all_ranks():
    for skipped, same in run_ranks(one_bad_shard, 2):
        assert skipped == 1
        assert all(same)


def norms_and_errors() -> dict[str, object]:
    model = fully_sharded(make_model("gpt2"))
    layers = LayerMap.from_model(model)
    empty = layer_grad_norms(model, layers)
    one_backward(model, batch(0).chunk(dist.get_world_size())[dist.get_rank()])
    norms = layer_grad_norms(model, layers)
    model.transformer.wte.weight.grad = None
    without = layer_grad_norms(model, layers)
    with pytest.raises(ValueError, match=r"on_freeze='offload', but parameter .* DTensor"):
        make_optimizer(model, on_freeze="offload")
    return {"norms": norms, "without": without, "empty": empty, "names": layers.names}


def test_layer_grad_norms():
    model = make_model("gpt2")
    layers = LayerMap.from_model(model)
    one_backward(model, batch(0))
    expected = layer_grad_norms(model, layers)
    for result in run_ranks(norms_and_errors, 4):
        assert result["names"] == layers.names
        assert not result["empty"].any()
        torch.testing.assert_close(result["norms"], expected, rtol=1e-6, atol=0)
        tied = layers.index("transformer.wte.weight")
        assert float(result["without"][tied]) == 0
        kept = torch.arange(len(layers)) != tied
        assert_same_bits(result["without"][kept], result["norms"][kept])


def give_gradients(model: torch.nn.Module, step: int) -> None:
    """The same bits in one process and in shards."""
    from torch.distributed.tensor import distribute_tensor

    generator = torch.Generator().manual_seed(100 + step)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if sharding.is_sharded(param):
            grad = distribute_tensor(grad, param.device_mesh, param.placements)
        param.grad = grad


def rounded(name: str, *, sharded: bool, state_dtype: torch.dtype | None) -> dict[str, Tensor]:
    model = make_model(name, torch.bfloat16)
    if sharded:
        fully_sharded(model)
    optimizer = LocalizedAdamW(
        model.named_parameters(), lr=1e-3, stochastic_rounding=True, seed=7, state_dtype=state_dtype
    )
    for step in range(4):
        give_gradients(model, step)
        optimizer.step()
    found = {}
    for key, param in model.named_parameters():
        found[key] = whole(param)
        found[f"{key} exp_avg_sq"] = whole(optimizer.state[param]["exp_avg_sq"])
    return found


ROUNDINGS = [("gpt2", None), ("llama", torch.bfloat16)]


def rounded_all() -> list[dict[str, Tensor]]:
    return [rounded(name, sharded=True, state_dtype=dtype) for name, dtype in ROUNDINGS]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_stochastic_rounding_gives_the_bits_of_one_process(num_ranks):
    expected = [rounded(name, sharded=False, state_dtype=dtype) for name, dtype in ROUNDINGS]
    for rank, results in enumerate(run_ranks(rounded_all, num_ranks)):
        for ours, theirs in zip(results, expected, strict=True):
            for key, value in theirs.items():
                assert_same_bits(ours[key], value, f"{key} on rank {rank}")


def released() -> Run:
    return sharded_run("llama", FUSED)


def test_fused_backward():
    expected = alone("llama", max_grad_norm=None)
    for rank, run in enumerate(run_ranks(released, 2)):
        run.norms = expected.norms = []
        assert_same_run(run, expected, f"rank {rank}")
