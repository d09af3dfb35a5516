"""Parameters of GPT-2 small by layer, as transformers lays them out: 124 M in 148 tensors."""

from __future__ import annotations

import torch


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
