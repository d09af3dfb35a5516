"""Parameters of GPT-2 small by layer, as transformers lays them out: 124 M in 148 tensors."""

from __future__ import annotations

import torch

from gradloc import LayerMap, LayerPlan

SHARES = (1.0, 0.5, 0.25, 0.1)


def plan_of_share(layers: LayerMap, share: float) -> tuple[LayerPlan, float]:
    """Whole layers, largest first, until about `share` of the elements train; the true share."""
    sizes = {layer.name: layer.num_elements for layer in layers}
    total = sum(sizes.values())
    active: set[str] = set()
    left = share * total
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size <= left * 1.02:
            active.add(name)
            left -= size
    plan = LayerPlan({name: float(name in active) for name in sizes}, policy=f"share {share}")
    return plan, sum(sizes[name] for name in active) / total


def gpt2_small() -> list[tuple[str, tuple[int, ...]]]:
    """(layer name, shape) of every parameter; the layers are gradloc's submodules."""
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("transformer.wte", (50257, 768)),
        ("transformer.wpe", (1024, 768)),
    ]
    for block in range(12):
        attn, mlp = f"transformer.h.{block}.attn", f"transformer.h.{block}.mlp"
        shapes += [(attn, (768,)), (attn, (768,)), (attn, (768, 2304)), (attn, (2304,))]
        shapes += [(attn, (768, 768)), (attn, (768,)), (mlp, (768,)), (mlp, (768,))]
        shapes += [(mlp, (768, 3072)), (mlp, (3072,)), (mlp, (3072, 768)), (mlp, (768,))]
    return [*shapes, ("transformer.ln_f", (768,)), ("transformer.ln_f", (768,))]


class Shapes(torch.nn.Module):
    """A module with those parameters, random weights and random gradients."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layer_of: dict[str, str] = {}
        for i, (layer, shape) in enumerate(gpt2_small()):
            weight = torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
            parameter = torch.nn.Parameter(weight)
            parameter.grad = torch.randn(shape, generator=generator).mul_(1e-3).to(dtype)
            name = f"p{i}"
            self.register_parameter(name, parameter)
            self.layer_of[name] = layer

    def patterns(self) -> list[tuple[str, str]]:
        """For `LayerMap.from_model(patterns=...)`: each parameter to its layer."""
        return [(f"^{name}$", layer) for name, layer in self.layer_of.items()]
