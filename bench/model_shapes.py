"""Parameter shapes of known models by layer, and a module with such parameters on any device.

Values are random and never zeros; nothing here computes a loss or knows what is being timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from gradloc import LayerMap, LayerPlan
from gradloc.layers import Layer

SHARES = (1.0, 0.5, 0.25, 0.1, 0.02)
Row = tuple[str, str, tuple[int, ...]]  # layer's name, its kind, a parameter's shape


def gpt2(blocks: int, width: int, *, vocabulary: int = 50257, positions: int = 1024) -> list[Row]:
    """GPT-2 as transformers lays it out; the head is the token embedding."""
    rows: list[Row] = [
        ("transformer.wte", "embedding", (vocabulary, width)),
        ("transformer.wpe", "embedding", (positions, width)),
    ]
    for block in range(blocks):
        attn, mlp = f"transformer.h.{block}.attn", f"transformer.h.{block}.mlp"
        rows += [(attn, "attention", shape) for shape in ((width,), (width,))]  # its norm
        rows += [(attn, "attention", shape) for shape in ((width, 3 * width), (3 * width,))]
        rows += [(attn, "attention", shape) for shape in ((width, width), (width,))]
        rows += [(mlp, "mlp", shape) for shape in ((width,), (width,))]
        rows += [(mlp, "mlp", shape) for shape in ((width, 4 * width), (4 * width,))]
        rows += [(mlp, "mlp", shape) for shape in ((4 * width, width), (width,))]
    return [*rows, *[("transformer.ln_f", "norm", (width,))] * 2]


def llama(
    blocks: int, width: int, inner: int, key_width: int, *, tied: bool, vocabulary: int = 128256
) -> list[Row]:
    """Llama 3 as transformers lays it out; `key_width` is that of the keys of all heads."""
    rows: list[Row] = [("model.embed_tokens", "embedding", (vocabulary, width))]
    for block in range(blocks):
        attn, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        rows += [(attn, "attention", (width, width)), (attn, "attention", (key_width, width))]
        rows += [(attn, "attention", (key_width, width)), (attn, "attention", (width, width))]
        rows += [(mlp, "mlp", (inner, width)), (mlp, "mlp", (inner, width))]
        rows += [(mlp, "mlp", (width, inner))]
        rows += [(attn, "attention", (width,)), (mlp, "mlp", (width,))]  # the norms before them
    rows.append(("model.norm", "norm", (width,)))
    return rows if tied else [*rows, ("lm_head", "head", (vocabulary, width))]


def many_tensors(count: int, *, layers: int = 30, width: int = 64) -> list[Row]:
    """`count` square tensors of a few KB: what a step costs the host, not the memory."""
    return [(f"block.{i * layers // count}", "other", (width, width)) for i in range(count)]


MODELS: dict[str, Callable[[], list[Row]]] = {
    "gpt2-small": lambda: gpt2(12, 768),
    "gpt2-xl": lambda: gpt2(48, 1600),
    "llama-3.2-1b": lambda: llama(16, 2048, 8192, 512, tied=True),
    "llama-3.1-8b": lambda: llama(32, 4096, 14336, 1024, tied=False),
    "300-tensors": lambda: many_tensors(300),
    "tiny": lambda: gpt2(2, 32, vocabulary=200, positions=16),  # for rehearsals
}


def shapes_of(model: str) -> list[Row]:
    """(layer, kind, shape) of every parameter of a model, in order.

    Raises:
        ValueError: no such model.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r}: choose one of {', '.join(map(repr, MODELS))}")
    return MODELS[model]()


def num_elements(model: str) -> int:
    """Elements of all parameters of a model."""
    return sum(math.prod(shape) for _, _, shape in shapes_of(model))


class Shapes(torch.nn.Module):
    """A module with a model's parameters: random weights, random gradients, made on the device.

    Args:
        model: a key of `MODELS`.
        dtype: of parameters and gradients.
        device: where they are made; nothing passes through host memory.
        seed: of the values.
    """

    def __init__(
        self,
        model: str = "gpt2-small",
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._generator = torch.Generator(device).manual_seed(seed)
        self._rows = shapes_of(model)
        for i, (_, _, shape) in enumerate(self._rows):
            weight = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(f"p{i}", torch.nn.Parameter(weight))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.0, 0.02, generator=self._generator)
                parameter.grad = self._random_like(parameter)

    def other_gradients(self) -> list[torch.Tensor]:
        """Another set of gradients, at other addresses, as every backward pass makes them."""
        return [self._random_like(parameter) for parameter in self.parameters()]

    def _random_like(self, parameter: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(parameter).normal_(0.0, 1e-3, generator=self._generator)

    def layer_map(self) -> LayerMap:
        """The layers, as gradloc finds submodules in the model itself."""
        names: dict[str, list[int]] = {}
        for i, (layer, _, _) in enumerate(self._rows):
            names.setdefault(layer, []).append(i)
        return LayerMap([self._layer(name, ids) for name, ids in names.items()], model=self)

    def _layer(self, name: str, ids: list[int]) -> Layer:
        rest = name.partition(".h." if ".h." in name else ".layers.")[2]
        kind = self._rows[ids[0]][1]
        return Layer(
            name=name,
            kind=kind,
            stack=name.removesuffix(f".{rest}") if rest else None,
            block=int(rest.split(".")[0]) if rest else None,
            parameters=tuple(f"p{i}" for i in ids),
            num_elements=sum(math.prod(self._rows[i][2]) for i in ids),
        )


def plan_of_share(layers: LayerMap, share: float) -> tuple[LayerPlan, float]:
    """Whole layers, largest first, until about `share` of the elements train; the true share.

    At least one layer trains, the smallest, however small the share.
    """
    sizes = {layer.name: layer.num_elements for layer in layers}
    total = sum(sizes.values())
    active: set[str] = set()
    left = share * total
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size <= left * 1.02:
            active.add(name)
            left -= size
    active = active or {min(sizes, key=lambda name: sizes[name])}
    plan = LayerPlan({name: float(name in active) for name in sizes}, policy=f"share {share}")
    return plan, sum(sizes[name] for name in active) / total
