"""LayerMap: which layer each parameter of a model belongs to, by name, by object, and in order.

How layers are found in the module tree is `layer_discovery.py`; a map holds no weights and chooses nothing.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from gradloc.layer_discovery import Placed, place_parameters
from gradloc.layer_table import layer_table

_GRANULARITIES = ("submodule", "block", "tensor")
# Names that DDP, torch.compile, activation checkpointing and FSDP1 put into a parameter's name.
_WRAPPERS = re.compile(
    r"^(module\.)+|(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)


@dataclass(frozen=True)
class Layer:
    """A named set of parameters that is selected as one.

    Attributes:
        name: the module's path (of a parameter, with granularity "tensor").
        kind: "attention", "mlp", "embedding", "norm", "head" or "other"; "block" with granularity "block".
        stack: path of the list of blocks that the layer lies in, for example "transformer.h"; None outside blocks.
        block: position in that list; None outside blocks.
        parameters: names, as `named_parameters()` gives them.
        num_elements: elements of these parameters, a tied one counted once.
    """

    name: str
    kind: str
    stack: str | None
    block: int | None
    parameters: tuple[str, ...]
    num_elements: int


class LayerMap:
    """The layers of a model in reading order: embeddings, blocks (attention, then MLP), final norm, head.

    Pickles and deep copies know the parameters by name only, since another process or model has other objects.

    Args:
        layers: the layers, each parameter in exactly one.
        granularity: how the model was cut, for people.
        aliases: further names of tied parameters -> the name that stands in a layer.
        model: the module whose parameters `index` shall know by identity.

    Raises:
        ValueError: no layers, or a name that stands twice.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        *,
        granularity: str = "submodule",
        aliases: Mapping[str, str] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.layers: tuple[Layer, ...] = tuple(layers)
        self.names: tuple[str, ...] = tuple(layer.name for layer in self.layers)
        self.granularity = granularity
        if not self.layers:
            raise ValueError(
                "layers is empty: a map needs at least one layer (see LayerMap.from_model)"
            )
        self._index: dict[str, int] = {}
        for position, layer in enumerate(self.layers):
            if self.names.index(layer.name) != position:
                raise ValueError(
                    f"layer {layer.name!r} stands twice: give every layer its own name"
                )
            for name in layer.parameters:
                if name in self._index:
                    raise ValueError(
                        f"parameter {name!r} is in two layers: leave it in one of them"
                    )
                self._index[name] = position
        self._aliases = dict(aliases or {})
        self._identities: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        if model is not None:
            for _, parameter, position in self.parameters(model):
                self._identities[id(parameter)] = (weakref.ref(parameter), position)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        granularity: str = "submodule",
        patterns: Sequence[tuple[str, str]] | None = None,
        only_trainable: bool = False,
    ) -> LayerMap:
        r"""Find the layers of any module.

        Blocks are the children of the outermost `nn.ModuleList`s (without one, of an `nn.Sequential` that repeats a
        class). Non-floating (quantised) parameters are left out: they have no gradient.

        Args:
            model: a causal language model of transformers, with or without peft adapters, or any module.
            granularity: "submodule" (attention and MLP of a block are two layers; a norm belongs to the one that it
                feeds), "block" or "tensor". Outside blocks each module with parameters is a layer of its own.
            patterns: instead of the automatic cut, ordered (regular expression, layer name) pairs. An expression is
                searched for in each parameter's name (anchor it with ^ and $), the first that matches decides, and
                the layer name may use its groups: `(r"h\.(\d+)\.", r"block \1")`.
            only_trainable: leave out parameters with `requires_grad=False` (with peft: keep the adapters).

        Returns:
            The map; `print` shows it as a table.

        Raises:
            ValueError: the granularity is unknown, there are no (trainable) parameters, a parameter is not initialised
                yet, or patterns leave parameters without a layer (they are named).
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={model!r} is not a torch.nn.Module: load the model first")
        if granularity not in _GRANULARITIES:
            raise ValueError(
                f"granularity={granularity!r}: choose one of {', '.join(map(repr, _GRANULARITIES))}"
            )
        if patterns is not None and granularity != "submodule":
            raise ValueError(
                f"granularity={granularity!r} with patterns: patterns alone say what a layer is, leave granularity out"
            )
        placed = [item for item in place_parameters(model) if _trains(item, only_trainable)]
        if not placed:
            what = "trainable parameters (requires_grad=True)" if only_trainable else "parameters"
            raise ValueError(
                f"{type(model).__name__} has no floating-point {what}: there is nothing to make layers of"
            )
        for item in placed:
            if isinstance(item.parameter, UninitializedParameter):
                raise ValueError(
                    f"parameter {item.names[0]!r} has no shape yet: run one batch through the model first"
                )
        if patterns is not None:
            granularity = "patterns"
            groups = _group_by_patterns(placed, patterns)
        else:
            groups = {}
            for item in placed:
                name, _ = _cut(item, granularity)
                groups.setdefault(name, []).append(item)
        return cls(
            [_layer(name, items, granularity) for name, items in groups.items()],
            granularity=granularity,
            aliases={alias: item.names[0] for item in placed for alias in item.names[1:]},
            model=model,
        )

    def index(self, parameter: str | torch.Tensor) -> int:
        """Position of a parameter's layer in `names`.

        Args:
            parameter: a name (any of a tied parameter's names), or the parameter object of the model that the map was
                made from.

        Raises:
            ValueError: it is in no layer.
        """
        if isinstance(parameter, torch.Tensor):
            reference, position = self._identities.get(id(parameter), (None, -1))
            if reference is not None and reference() is parameter:
                return position
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is in no layer: it is not one of the model that this "
                "map was made from (copies are known by name only; pass model.named_parameters())"
            )
        position = self._find(parameter)
        if position < 0:
            raise ValueError(
                f"parameter {parameter!r} is in no layer of this map ({len(self)} layers, for example "
                f"{self.layers[0].parameters[0]!r} in {self.names[0]!r}): make the map from this model"
            )
        return position

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter, int]]:
        """Each parameter object of a model once, with its name and its layer's position, in the model's order.

        Parameters that the map leaves out on purpose (quantised; frozen ones, if it was made with
        `only_trainable=True`) are left out here too.

        Raises:
            ValueError: parameters of the map are missing in the model, or the model has others that train.
        """
        found: dict[int, tuple[str, nn.Parameter, int]] = {}
        present: set[str] = set()
        unknown: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            plain = _WRAPPERS.sub("", name)
            present.update((name, plain))
            position = self._find(name)
            if position >= 0:
                found.setdefault(id(parameter), (name, parameter, position))
            elif parameter.requires_grad:
                unknown[id(parameter)] = name
        missing = [name for name in self._index if not {name, _WRAPPERS.sub("", name)} & present]
        extra = [name for key, name in unknown.items() if key not in found]
        if missing or extra:
            parts = [f"it has no {_shown(missing)}"] if missing else []
            parts += [f"its {_shown(extra)} are in no layer"] if extra else []
            raise ValueError(
                f"{type(model).__name__} does not fit this map: {'; '.join(parts)}. Make the map from this model: "
                "LayerMap.from_model(model)"
            )
        return list(found.values())

    def _find(self, name: str) -> int:
        for candidate in (name, _WRAPPERS.sub("", name)):
            position = self._index.get(self._aliases.get(candidate, candidate), -1)
            if position >= 0:
                return position
        return -1

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __str__(self) -> str:
        return layer_table(self.layers, self.granularity)

    def __repr__(self) -> str:
        total = sum(layer.num_elements for layer in self.layers)
        return (
            f"LayerMap({len(self)} layers, granularity={self.granularity!r}, {total:,} parameters)"
        )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_identities": {}}


def _trains(item: Placed, only_trainable: bool) -> bool:
    # Complex parameters stay in, so that whoever can't handle them says so by name.
    numeric = item.parameter.is_floating_point() or item.parameter.is_complex()
    return numeric and (item.parameter.requires_grad or not only_trainable)


def _cut(item: Placed, granularity: str) -> tuple[str, str]:
    """Name and kind of the layer of a parameter."""
    region = item.region
    if granularity == "tensor":
        return item.names[0], region.kind
    if granularity == "block" and region.block_path is not None:
        return region.block_path, "block"
    return region.layer, region.kind


def _layer(name: str, items: Sequence[Placed], granularity: str) -> Layer:
    regions = [item.region for item in items]
    kinds = {region.kind if granularity == "patterns" else _cut(item, granularity)[1]
             for item, region in zip(items, regions, strict=True)}  # fmt: skip
    places = {(region.stack, region.block) for region in regions}
    stack, block = places.pop() if len(places) == 1 else (None, None)
    return Layer(
        name=name,
        kind=kinds.pop() if len(kinds) == 1 else "other",
        stack=stack,
        block=block,
        parameters=tuple(item.names[0] for item in items),
        num_elements=sum(item.parameter.numel() for item in items),
    )


def _group_by_patterns(
    placed: Sequence[Placed], patterns: Sequence[tuple[str, str]]
) -> dict[str, list[Placed]]:
    compiled = []
    for pattern, template in patterns:
        try:
            compiled.append((re.compile(pattern), template))
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    groups: dict[str, list[Placed]] = {}
    unmatched = []
    for item in placed:
        name = item.names[0]
        for expression, template in compiled:
            match = expression.search(name)
            if match is None:
                continue
            try:
                layer = match.expand(template)
            except (re.error, IndexError) as error:
                raise ValueError(
                    f"layer name {template!r} does not fit pattern {expression.pattern!r}: {error}"
                ) from None
            if not layer:
                raise ValueError(
                    f"pattern {expression.pattern!r} gives {name!r} an empty layer name"
                )
            groups.setdefault(layer, []).append(item)
            break
        else:
            unmatched.append(name)
    if unmatched:
        raise ValueError(
            f"{len(unmatched)} parameters are in no layer, as no pattern matches them: {_shown(unmatched)}. "
            'End the patterns with (".*", "rest") to gather what is left'
        )
    return groups


def _shown(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
