"""gradloc.sharding on real DTensors: memory, gradients, sums over shards, places of elements."""

import functools
import math
import subprocess
import sys

import pytest
import torch
from numerics import assert_same_bits
from ranks import run_ranks
from torch import Tensor, nn

from gradloc import sharding

SHAPES = ((7, 5), (4,), (1, 3), (3,), (0, 4), (6, 2, 3), (5, 1), (8, 1, 2))


@functools.cache
def mesh(shape: tuple[int, ...]):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape)


def place(values: Tensor, mesh_shape: tuple[int, ...], placements) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.clone(), mesh(mesh_shape), placements)  # a replica is a view


def layouts(num_ranks: int) -> list[tuple[tuple[int, ...], list, bool]]:
    """Mesh shape, placements, and whether every shard of a matrix is one range of it."""
    from torch.distributed.tensor import Replicate, Shard

    flat = [
        ((num_ranks,), [Shard(0)], True),
        ((num_ranks,), [Replicate()], True),
        ((num_ranks,), [Shard(1)], False),
    ]
    if num_ranks == 4:
        flat += [
            ((2, 2), [Replicate(), Shard(0)], True),
            ((2, 2), [Shard(0), Replicate()], True),
            ((2, 2), [Shard(0), Shard(0)], True),
            ((2, 2), [Replicate(), Shard(1)], False),
            ((2, 2), [Shard(0), Shard(1)], False),
        ]
    return flat


# Cut on the second dimension, and a range all the same: one row, one column, two halves of a row.
def still_a_range(shape: tuple[int, ...]) -> bool:
    return math.prod(shape[:1]) <= 1 or shape[1] == 1


def positions() -> list[str]:
    """What is wrong with `first_element`, for every shape and layout."""
    import torch.distributed as dist

    wrong = []
    for mesh_shape, placements, is_range in layouts(dist.get_world_size()):
        for shape in SHAPES:
            if not is_range and len(shape) < 2:
                continue
            whole = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
            param = nn.Parameter(place(whole, mesh_shape, placements))
            shard = sharding.local(param)
            where = f"{shape} {placements} rank {dist.get_rank()}"
            try:
                first = sharding.first_element(param, "'w'")
            except ValueError as error:
                if is_range or still_a_range(shape) or "shard on dimension 0" not in str(error):
                    wrong.append(f"{where}: {error}")
                # It may only be refused where the positions do jump on some rank.
                continue
            # The values are the positions.
            expected = torch.arange(first, first + shard.numel(), dtype=torch.float64)
            if not torch.equal(shard.flatten(), expected):
                wrong.append(f"{where}: {first} for {shard.flatten().tolist()}")
    return wrong


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_first_element_is_the_position_in_the_whole(num_ranks):
    assert run_ranks(positions, num_ranks) == [[]] * num_ranks


def memory_and_sums() -> dict[str, object]:
    """Facts of this rank about a matrix of 7 rows, in several layouts."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(7, 5, generator=generator)
    found: dict[str, object] = {}
    reductions = []
    for mesh_shape, placements, _ in layouts(dist.get_world_size()):
        param = nn.Parameter(place(whole, mesh_shape, placements))
        shard = sharding.local(param)
        assert type(shard) is Tensor
        assert not shard.requires_grad
        assert sharding.is_sharded(param)
        with torch.no_grad():
            shard.add_(1.0)
        assert_same_bits(param.full_tensor(), whole + 1.0, "written through the shard")
        reduction = sharding.reduction(param)
        norm_sq = sharding.local(param).double().square().sum().reshape(1)
        if reduction is None:
            assert all(placement.is_replicate() for placement in placements)
        else:
            reduction.sum_(norm_sq)
            assert reduction == sharding.reduction(param)
            assert hash(reduction) == hash(sharding.reduction(param))
            reductions.append(reduction)
        found[f"norm {mesh_shape} {placements}"] = float(norm_sq)
        # Gradients that are cut in another way, whole, or a partial sum.
        others = [param.placements, [Replicate()] * len(placements), [Shard(0)] * len(placements)]
        for other in others:
            grad = place(whole * 2.0, mesh_shape, list(other))
            expected = place(whole * 2.0, mesh_shape, placements).to_local()
            assert_same_bits(sharding.local_grad(grad, param), expected, f"{other}")
        if len(mesh_shape) == 1:
            partial = DTensor.from_local(whole, param.device_mesh, [Partial()])
            scale = float(dist.get_world_size())
            expected = place(whole * scale, mesh_shape, placements).to_local()
            torch.testing.assert_close(sharding.local_grad(partial, param), expected)
            for function in (sharding.reduction, lambda p: sharding.first_element(p, "'w'")):
                with pytest.raises(ValueError, match=r"partial sum.*Replicate\(\) or Shard\(0\)"):
                    function(partial)
    plain = torch.zeros(7, 5)
    sharded = place(whole, (dist.get_world_size(),), [Shard(0)])
    with pytest.raises(ValueError, match=r"gradient is a DTensor.*after fully_shard"):
        sharding.local_grad(sharded, plain)
    with pytest.raises(ValueError, match=r"a plain tensor and its parameter a DTensor"):
        sharding.local_grad(plain, sharded)
    if dist.get_world_size() == 4:
        other = place(whole, (2, 2), [Shard(0), Shard(0)])
        with pytest.raises(ValueError, match=r"gradient lives on .*zero_grad\(\)"):
            sharding.local_grad(other, sharded)
    found["kinds"] = len(set(reductions))
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_shards_share_memory_and_sums_do_not_depend_on_the_layout(num_ranks):
    results = run_ranks(memory_and_sums, num_ranks)
    generator = torch.Generator().manual_seed(3)
    expected = float((torch.randn(7, 5, generator=generator) + 1.0).double().square().sum())
    for name, value in results[0].items():
        if name.startswith("norm"):
            assert value == pytest.approx(expected, rel=1e-14), name
    assert all(result == results[0] for result in results), results  # the same bits on every rank
    # Kinds: over all ranks; with 4 also over the first, the second and both dimensions of 2 x 2.
    assert results[0]["kinds"] == (1 if num_ranks == 2 else 4)


def tensor_parallel_then_fsdp2() -> list[str]:
    """FSDP2 cuts what tensor parallelism on a later mesh dimension has cut before."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    wholes = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
            wholes[name] = parameter.detach().clone()
    parallelize_module(model, both["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=both["dp"])
    wrong = []
    for name, param in model.named_parameters():
        shard = sharding.local(param)
        try:
            first = sharding.first_element(param, repr(name))
        except ValueError as error:
            if name != "1.weight":  # cut by rows and by columns
                wrong.append(str(error))
            continue
        expected = torch.arange(first, first + shard.numel(), dtype=torch.float32)
        if name == "1.weight" or not torch.equal(shard.flatten(), expected):
            wrong.append(f"{name} rank {dist.get_rank()}: {first} for {shard.flatten().tolist()}")
        reduction = sharding.reduction(param)
        norm_sq = shard.double().square().sum()
        reduction.sum_(norm_sq)
        if float(norm_sq) != float(wholes[name].double().square().sum()):
            wrong.append(f"{name}: sum of squares {float(norm_sq)}")
    return wrong


def test_tensor_parallelism_below_fsdp2():
    assert run_ranks(tensor_parallel_then_fsdp2, 4) == [[]] * 4


def test_plain_tensors_pass_through():
    param, grad = torch.ones(3), torch.zeros(3)
    assert not sharding.is_sharded(param)
    assert sharding.local(param) is param
    assert sharding.local_grad(grad, param) is grad
    assert sharding.reduction(param) is None
    assert sharding.first_element(param, "'w'") == 0
    sharding.refuse_unsupported(param, "'w'")


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("_is_flat_param", r"'w' belongs to FullyShardedDataParallel \(FSDP1\).*fully_shard"),
        ("_fsdp_flattened", r"'w' belongs to FullyShardedDataParallel.*fsdp_version=2"),
        ("ds_id", r"'w' is partitioned by DeepSpeed ZeRO-3.*fully_shard\) work"),
        ("ds_status", r"'w' is partitioned by DeepSpeed ZeRO-3"),
    ],
)
def test_what_is_refused(attribute, message):
    param = nn.Parameter(torch.ones(3))
    setattr(param, attribute, True)
    with pytest.raises(ValueError, match=message):
        sharding.refuse_unsupported(param, "'w'")


def test_plain_use_imports_no_dtensor():
    code = (
        "import sys, torch; from gradloc import sharding; before = set(sys.modules); "
        "assert sharding.local(t := torch.ones(2)) is t and sharding.reduction(t) is None; "
        "assert set(sys.modules) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
