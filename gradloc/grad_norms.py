"""layer_grad_norms: the gradient norm of every layer of a model, in one pass over the gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradloc import ops, reference
from gradloc.layers import LayerMap


def layer_grad_norms(model: torch.nn.Module, layers: LayerMap) -> Tensor:
    """2-norm of each layer's gradient: `N_l = sqrt(sum over its tensors and elements of g²)`.

    Sums are accumulated in float64, so that neither float16 gradients overflow nor small layers
    vanish. The same bits come out for any number of threads.

    Args:
        model: the model whose parameters have gradients; a gradient that is None counts as 0.
        layers: its layers.

    Returns:
        float32 tensor [len(layers)] in the order of `layers.names`, on the gradients' device.

    Raises:
        ValueError: the layers are those of another model; a gradient is sparse or complex;
            gradients lie on several devices.
    """
    found = layers.parameters(model)
    grads = [parameter.grad for _, parameter, _ in found]
    ids = [layer for _, _, layer in found]
    check_measurable(
        (f"the gradient of parameter {name!r}", parameter.grad)
        for name, parameter, _ in found
        if parameter.grad is not None
    )
    if all(grad is None or ops.runs_natively(grad) for grad in grads):
        sizes = [0 if grad is None else grad.numel() for grad in grads]
        return ops.NativeNorms(sizes, ids, len(layers)).norm_sq(grads).sqrt().float()
    return reference.layer_norm_sq(grads, ids, len(layers)).sqrt().float()


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
