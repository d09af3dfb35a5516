"""What the optimizer and the norms need to know of sharded parameters: the shard, its place, sums.

A sharded parameter is a `torch.distributed.tensor.DTensor`, as FSDP2 (`fully_shard`) and tensor
parallelism make them. Plain tensors pass through every function here; nothing is imported for them.
Which parallelism cannot work is refused here too. No parameter, gradient or state is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor is a DTensor, be it cut or a replica."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has a DTensor without it
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard as a plain tensor that shares its memory; a plain tensor is returned."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        # Of a Parameter newer torch gives a Parameter again; what is wanted is its memory.
        shard: Tensor = tensor.to_local().detach()
    # What an asynchronous collective returned is complete once it was waited for.
    return shard.wait() if hasattr(shard, "wait") else shard


def local_grad(grad: Tensor, param: Tensor) -> Tensor:
    """This rank's shard of a gradient, cut as its parameter is.

    A gradient with other placements (a partial sum, a replica) is redistributed, which is a
    collective: every rank has to come here.

    Raises:
        ValueError: one of the two is a DTensor and the other is not, or they live on different
            meshes.
    """
    if not is_sharded(param):
        if is_sharded(grad):
            raise ValueError(
                f"the gradient is a DTensor (placements={grad.placements}) and its parameter, of "
                f"shape={tuple(param.shape)}, is a plain tensor: make the optimizer after "
                "fully_shard or distribute_tensor, from the parameters that the model has then"
            )
        return grad
    if not is_sharded(grad):
        raise ValueError(
            f"the gradient, of shape={tuple(grad.shape)}, is a plain tensor and its parameter a "
            f"DTensor (placements={param.placements}): give a gradient made with "
            "distribute_tensor(grad, param.device_mesh, param.placements), or let backward make it"
        )
    if grad.device_mesh != param.device_mesh:
        raise ValueError(
            f"the gradient lives on {grad.device_mesh}, its parameter on {param.device_mesh}: "
            "both have to be on one mesh; call zero_grad() after a model was sharded anew"
        )
    if grad.placements != param.placements:
        with torch.no_grad():
            grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


@dataclass(frozen=True)
class Reduction:
    """Over which processes the sums of shards have to be added. Equal ones can share a call.

    Attributes:
        groups: the process group of each mesh dimension on which the tensor is cut.
    """

    groups: tuple[Any, ...]

    def sum_(self, norm_sq: Tensor) -> None:
        """Add up sums of squares over the processes, in place; every process gets the same bits.

        Args:
            norm_sq: float64 (float32 where the device has no float64), any shape, on the device
                of the shards.
        """
        import torch.distributed as dist

        for group in self.groups:
            dist.all_reduce(norm_sq, group=group)


def reduction(param: Tensor) -> Reduction | None:
    """Over which processes sums over the parameter's shards are added; None: each has it whole.

    Raises:
        ValueError: the parameter is a partial sum.
    """
    if not is_sharded(param):
        return None
    mesh = param.device_mesh
    cut = [dim for dim, placement in enumerate(_placements(param)) if not placement.is_replicate()]
    return Reduction(tuple(mesh.get_group(dim) for dim in cut)) if cut else None


def first_element(param: Tensor, name: str) -> int:
    """Position of the shard's first element in the whole tensor's memory order.

    With it an element has one number, however the tensor is cut. 0 for plain tensors, replicas and
    empty shards.

    Args:
        param: the parameter.
        name: what a message calls it.

    Raises:
        ValueError: the shard is not one contiguous range of the whole tensor.
    """
    if not is_sharded(param):
        return 0
    sizes, offsets = _local_range(param)
    shard = local(param)
    if tuple(shard.shape) != tuple(sizes):
        raise ValueError(
            f"parameter {name}: the shard has shape={tuple(shard.shape)}, and by its placements="
            f"{param.placements} on {param.device_mesh} it should have {tuple(sizes)}: shard it "
            "with fully_shard or distribute_tensor"
        )
    if shard.numel() == 0:
        return 0
    # From the slowest dimension to the fastest: single indices, then one range, then whole ones.
    order = sorted(range(param.dim()), key=lambda dim: param.stride()[dim], reverse=True)
    order = [dim for dim in order if param.shape[dim] > 1]
    rest = list(dropwhile(lambda dim: sizes[dim] == 1, order))[1:]
    is_range = all(sizes[dim] == param.shape[dim] for dim in rest)
    num_before = 1
    for dim in reversed(order):
        is_range = is_range and (sizes[dim] == 1 or shard.stride()[dim] == num_before)
        num_before *= sizes[dim]
    if not is_range:
        raise ValueError(
            f"parameter {name}: its shard is not one range of the whole tensor (placements="
            f"{param.placements}, shape={tuple(param.shape)}), and stochastic rounding numbers "
            "elements by that range: shard on dimension 0 (fully_shard's default), or use "
            "stochastic_rounding=False"
        )
    return sum(offset * stride for offset, stride in zip(offsets, param.stride(), strict=True))


def refuse_unsupported(param: Tensor, name: str) -> None:
    """Refuse parameters that are not what they look like: those of FSDP1 and of ZeRO-3.

    Both hide the shapes that layers are made of, and hold shards where an optimizer takes a
    parameter for a whole tensor.

    Args:
        param: the parameter.
        name: what a message calls it.

    Raises:
        ValueError: it is one of these.
    """
    supported = "DistributedDataParallel and FSDP2 (torch.distributed.fsdp.fully_shard) work"
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"parameter {name} belongs to FullyShardedDataParallel (FSDP1), which flattens the "
            f"parameters of many layers into one: {supported}; with Accelerate or the Trainer set "
            "fsdp_version=2"
        )
    if hasattr(param, "ds_id") or hasattr(param, "ds_status"):
        raise ValueError(
            f"parameter {name} is partitioned by DeepSpeed ZeRO-3, which steps on flat partitions "
            f"of its own: {supported}, ZeRO does not"
        )


def _placements(param: DTensor) -> Sequence[Any]:
    for placement in param.placements:
        if placement.is_partial():
            raise ValueError(
                f"a parameter of shape={tuple(param.shape)} has placements={param.placements}: a "
                "partial sum cannot be trained; redistribute it to Replicate() or Shard(0)"
            )
    return param.placements


def _local_range(param: DTensor) -> tuple[list[int], list[int]]:
    """Sizes of this rank's shard and where it begins, by dimension, as `torch.chunk` cuts."""
    mesh = param.device_mesh
    sizes, offsets = list(param.shape), [0] * param.dim()
    coordinate = mesh.get_coordinate()
    placements = _placements(param)
    if coordinate is None:  # this process is not on the mesh and holds nothing
        return [0] * param.dim(), offsets
    for mesh_dim in _cutting_order(placements, tuple(mesh.shape)):
        dim = placements[mesh_dim].dim
        part = -(-sizes[dim] // mesh.size(mesh_dim))
        start = min(coordinate[mesh_dim] * part, sizes[dim])
        sizes[dim] = min(part, sizes[dim] - start)
        offsets[dim] += start
    return sizes, offsets


def _cutting_order(placements: Sequence[Any], mesh_shape: tuple[int, ...]) -> list[int]:
    """Mesh dimensions in the order in which they cut the tensor.

    It is left to right, except where FSDP2 cuts what tensor parallelism, on a later mesh dimension,
    had cut before: torch writes that as a strided shard whose `split_factor` is the number of
    earlier parts.
    """
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    order: list[int] = []
    for mesh_dim in reversed(cut):
        factor = getattr(placements[mesh_dim], "split_factor", None)
        position, parts = 0, 1
        while factor is not None and parts < factor and position < len(order):
            other = order[position]
            if placements[other].dim == placements[mesh_dim].dim:
                parts *= mesh_shape[other]
            position += 1
        if factor is not None and parts != factor:
            raise ValueError(
                f"placements={tuple(placements)} on a mesh of shape {mesh_shape} interleave the "
                "parameter's rows over the processes: shard on dimension 0 (fully_shard's default)"
            )
        order.insert(position, mesh_dim)
    return order
