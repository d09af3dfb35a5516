"""layer_grad_norms: the gradient norm of every layer of a model, in one pass over the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gradloc import ops, reference, sharding
from gradloc.layers import LayerMap


def layer_grad_norms(model: torch.nn.Module, layers: LayerMap) -> Tensor:
    """2-norm of each layer's gradient: `N_l = sqrt(sum over its tensors and elements of g²)`.

    Sums are accumulated in float64, so that neither float16 gradients overflow nor small layers
    vanish. The same bits come out for any number of threads. Of sharded models (FSDP2) the norms
    are those of the whole layers on every rank, whatever the sharding; every rank has to call it.

    Args:
        model: the model whose parameters have gradients; a gradient that is None counts as 0.
        layers: its layers.

    Returns:
        float32 tensor [len(layers)] in the order of `layers.names`, on the gradients' device.

    Raises:
        ValueError: the layers are those of another model; a gradient is sparse or complex;
            gradients lie on several devices; a gradient is a DTensor and its parameter is not.
    """
    found = layers.parameters(model)
    check_measurable(
        (f"the gradient of parameter {name!r}", parameter.grad)
        for name, parameter, _ in found
        if parameter.grad is not None
    )
    # By the ranks to add over. Parameters without a gradient count too: all ranks then add over the
    # same ranks in the same order, even if a gradient is missing on some.
    parts: dict[sharding.Reduction | None, list[tuple[Tensor | None, int]]] = {}
    device = torch.device("cpu")
    for _, parameter, layer in found:
        grad = parameter.grad
        if grad is not None:
            grad = sharding.local_grad(grad, parameter)
        part = parts.setdefault(sharding.reduction(parameter), [])
        part.append((grad, layer))
        device = parameter.device if grad is not None or sharding.is_sharded(parameter) else device
    total = None
    for reduction, part in parts.items():
        norm_sq = _norm_sq(part, layers).to(device)
        if reduction is not None:
            reduction.sum_(norm_sq)
        total = norm_sq if total is None else total + norm_sq
    assert total is not None
    return total.sqrt().float()


def _norm_sq(part: Sequence[tuple[Tensor | None, int]], layers: LayerMap) -> Tensor:
    """Sums of squares by layer of plain gradients, float64 [num_layers] on their device."""
    grads, ids = [grad for grad, _ in part], [layer for _, layer in part]
    present = [grad for grad in grads if grad is not None]
    if all(ops.runs_natively(grad) for grad in present):
        sizes = [0 if grad is None else grad.numel() for grad in grads]
        device = present[0].device if present else torch.device("cpu")
        return _work(layers, sizes, ids, device).norm_sq(grads)
    return reference.layer_norm_sq(grads, ids, len(layers))


# The last work of each map: a device's tables are uploaded once for a model, not in every call.
_WORKS: WeakKeyDictionary[LayerMap, tuple[Any, ops.NativeNorms]] = WeakKeyDictionary()


def _work(
    layers: LayerMap, sizes: list[int], ids: list[int], device: torch.device
) -> ops.NativeNorms:
    key = (sizes, ids, device)
    found = _WORKS.get(layers)
    if found is None or found[0] != key:
        found = key, ops.NativeNorms(sizes, ids, len(layers), device)
        _WORKS[layers] = found
    return found[1]


def check_measurable(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check that norms of these tensors, or of gradients that are like them, can be computed.

    Args:
        tensors: what a message calls each, and the tensor.

    Raises:
        ValueError: one is sparse, complex, or on another device than the first.
    """
    first: tuple[str, torch.device] | None = None
    for what, tensor in tensors:
        if tensor.layout != torch.strided:
            raise ValueError(
                f"{what} has layout={tensor.layout}: use sparse=False in the embedding"
            )
        if tensor.is_complex():
            raise ValueError(
                f"{what} has dtype={tensor.dtype}, and layers are measured over real numbers: "
                "make the parameter torch.view_as_real of it, or freeze it and leave it out with "
                "LayerMap.from_model(model, only_trainable=True)"
            )
        if first is None:
            first = what, tensor.device
        elif tensor.device != first[1]:
            raise ValueError(
                f"{what} is on device={tensor.device}, {first[0]} on {first[1]}: layers are "
                "measured on one device; move the whole model there with model.to(device), and "
                "load it without device_map"
            )
