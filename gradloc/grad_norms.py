"""layer_grad_norms: the gradient norm of every layer of a model, in one pass over the gradients."""

from __future__ import annotations

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
        ValueError: the layers are those of another model, or a gradient is sparse.
    """
    found = layers.parameters(model)
    grads = [parameter.grad for _, parameter, _ in found]
    ids = [layer for _, _, layer in found]
    for (name, _, _), grad in zip(found, grads, strict=True):
        if grad is not None and grad.layout != torch.strided:
            raise ValueError(
                f"the gradient of parameter {name!r} has layout={grad.layout}: use sparse=False "
                "in the embedding"
            )
    if all(grad is None or ops.runs_natively(grad) for grad in grads):
        sizes = [0 if grad is None else grad.numel() for grad in grads]
        return ops.NativeNorms(sizes, ids, len(layers)).norm_sq(grads).sqrt().float()
    return reference.layer_norm_sq(grads, ids, len(layers)).sqrt().float()
