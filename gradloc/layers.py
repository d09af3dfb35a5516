"""LayerMap: which layer each parameter of a model belongs to, by name, by object, and in order.

A map holds no weights and chooses nothing. How layers are found in a model is `layer_discovery.py`.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from gradloc.layer_discovery import Placed, place_parameters
from gradloc.layer_kinds import WRAPPER_NAMES
from gradloc.layer_table import layer_table
from gradloc.wording import quoted

_GRANULARITIES = ("submodule", "block", "tensor")


@dataclass(frozen=True)
class Layer:
    """A named set of parameters that is selected as one.

    Attributes:
        name: path of the module ("transformer.h.0.attn"), of the block, or of the parameter.
        kind: "attention", "mlp", "embedding", "norm", "head", "other"; "block" for whole blocks.
        stack: path of the list of blocks that the layer is in ("transformer.h"), None outside.
        block: position in that list, None outside.
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
    """The layers of a model in reading order: embeddings, blocks, final norm, head.

    Pickles and deep copies know parameters by name only, as a copied model has other objects.

    Args:
        layers: the layers, each parameter in exactly one.
        granularity: how the model was cut, for people.
        aliases: further names of tied parameters -> the name that stands in a layer.
        model: the module whose parameters `index` shall know by identity.

    Attributes:
        layers: the layers.
        names: their names.
        granularity: "submodule", "block", "tensor" or "patterns".

    Raises:
        ValueError: there are no layers, or a layer or parameter stands twice.
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
        self._index: dict[str, int] = {}
        self._aliases = dict(aliases or {})
        self._identities: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        if not self.layers:
            raise ValueError("layers is empty: a map needs at least one (see LayerMap.from_model)")
        seen: set[str] = set()
        for position, layer in enumerate(self.layers):
            if layer.name in seen:
                raise ValueError(f"layer {layer.name!r} stands twice: give each its own name")
            seen.add(layer.name)
            for name in layer.parameters:
                if name in self._index:
                    other = self.names[self._index[name]]
                    raise ValueError(
                        f"parameter {name!r} is in {other!r} and {layer.name!r}: leave it in one"
                    )
                self._index[name] = position
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

        Blocks are the children of the outermost `nn.ModuleList`s; where there is none, of an
        `nn.Sequential` that repeats a class. Parameters that are not floating point (quantised
        weights) are left out, as they have no gradient.

        Args:
            model: a language model of transformers, with or without peft adapters, or any module.
            granularity: "submodule" (attention and MLP of a block are two layers, a norm belongs to
                the one that it feeds), "block" or "tensor". Outside blocks each module that owns
                parameters is a layer, with "tensor" each parameter.
            patterns: in place of the automatic cut, ordered (regular expression, layer name) pairs.
                An expression is searched for in a parameter's name (anchor it with ^ and $), the
                first that is found decides, and the layer's name may use its groups:
                `(r"\.h\.(\d+)\.", r"block \1")`.
            only_trainable: leave out parameters with `requires_grad=False`; with peft the adapters
                stay.

        Returns:
            The map. `print` shows it as a table.

        Raises:
            ValueError: the granularity is unknown, there are no (trainable) parameters, one has no
                shape yet, or patterns leave some without a layer (they are named).
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={model!r} is not a torch.nn.Module: load the model first")
        if granularity not in _GRANULARITIES:
            choices = ", ".join(map(repr, _GRANULARITIES))
            raise ValueError(f"granularity={granularity!r}: choose one of {choices}")
        if patterns is not None and granularity != "submodule":
            raise ValueError(
                f"granularity={granularity!r} with patterns: patterns alone say what a layer is, "
                "leave granularity out"
            )
        model = _without_wrapper(model)
        for name, parameter in model.named_parameters():
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(
                    f"parameter {name!r} has no shape yet: run one batch through the model first"
                )
        placed = [item for item in place_parameters(model) if _trains(item, only_trainable)]
        if not placed:
            what = "parameters with requires_grad=True" if only_trainable else "parameters"
            raise ValueError(
                f"model={type(model).__name__} has no floating-point {what}: pass one that has"
            )
        if patterns is not None:
            granularity = "patterns"
            groups = _group_by_patterns(placed, patterns)
        else:
            groups = {}
            for item in placed:
                groups.setdefault(_cut(item, granularity)[0], []).append(item)
        return cls(
            [_layer(name, items, granularity) for name, items in groups.items()],
            granularity=granularity,
            aliases={alias: item.names[0] for item in placed for alias in item.names[1:]},
            model=model,
        )

    def index(self, parameter: str | torch.Tensor) -> int:
        """Position in `names` of the layer that a parameter is in.

        Args:
            parameter: a name (a tied parameter has several), or a parameter object of the very
                model that the map was made from.

        Raises:
            ValueError: it is in no layer.
        """
        if isinstance(parameter, torch.Tensor):
            reference, position = self._identities.get(id(parameter), (None, -1))
            # An id alone may be that of a tensor that is long gone.
            if reference is not None and reference() is parameter:
                return position
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is in no layer: it is not of the "
                "model that this map was made from. Make the map from this model; a copied or "
                "loaded map knows parameters by name only (pass model.named_parameters())"
            )
        position = self._find(parameter)
        if position < 0:
            raise ValueError(
                f"parameter {parameter!r} is in no layer of this map ({len(self)} layers, the "
                f"first with {self.layers[0].parameters[0]!r}): make the map from this model"
            )
        return position

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter, int]]:
        """Each parameter object of a model once: its name, itself, its layer's position.

        The model may be wrapped (DDP, torch.compile) since the map was made. Frozen parameters that
        the map does not know are left out; so are quantised ones.

        Returns:
            Triples in the model's order.

        Raises:
            ValueError: parameters of the map are not in the model, or the model trains others.
        """
        found: dict[int, tuple[str, nn.Parameter, int]] = {}
        unknown: dict[int, str] = {}
        present: set[str] = set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            present.add(_plain(name))
            position = self._find(name)
            if position >= 0:
                found.setdefault(id(parameter), (name, parameter, position))
            elif parameter.requires_grad:
                unknown[id(parameter)] = name
        missing = [name for name in self._index if _plain(name) not in present]
        extra = [name for key, name in unknown.items() if key not in found]
        if missing or extra:
            parts = [f"the model has no {quoted(missing)}"] if missing else []
            parts += [f"{quoted(extra)} of the model in no layer"] if extra else []
            raise ValueError(
                f"model={type(model).__name__} does not fit this map: {'; '.join(parts)}. Make the "
                "map from this model: LayerMap.from_model(model)"
            )
        return list(found.values())

    def known_parameters(self) -> list[tuple[torch.Tensor, int]]:
        """The parameters that `index` knows by identity and that are alive, each with its layer."""
        alive = ((reference(), position) for reference, position in self._identities.values())
        return [(parameter, position) for parameter, position in alive if parameter is not None]

    def _find(self, name: str) -> int:
        for candidate in (name, _plain(name)):
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


def _without_wrapper(model: nn.Module) -> nn.Module:
    inner = model._modules.get("_orig_mod")
    if inner is None and isinstance(model, (DataParallel, DistributedDataParallel)):
        inner = model.module
    return model if inner is None else _without_wrapper(inner)


def _plain(name: str) -> str:
    """A parameter's name without what DDP, torch.compile and checkpoint wrappers put into it."""
    return WRAPPER_NAMES.sub("", name).removeprefix("module.")


def _trains(item: Placed, only_trainable: bool) -> bool:
    # Complex parameters stay in, so that whoever can't handle them says so by name.
    numeric = item.parameter.is_floating_point() or item.parameter.is_complex()
    return numeric and (item.parameter.requires_grad or not only_trainable)


def _cut(item: Placed, granularity: str) -> tuple[str, str]:
    """Name and kind of the layer that a parameter is in."""
    region = item.region
    if granularity == "tensor":
        return WRAPPER_NAMES.sub("", item.names[0]), region.kind
    if granularity == "block" and region.block_path is not None:
        return WRAPPER_NAMES.sub("", region.block_path), "block"
    return WRAPPER_NAMES.sub("", region.layer), region.kind


def _layer(name: str, items: Sequence[Placed], granularity: str) -> Layer:
    kinds = {_cut(item, granularity)[1] for item in items}
    places = {(item.region.stack, item.region.block) for item in items}
    # Patterns may gather from several places: then the layer lies in no block.
    stack, block = places.pop() if len(places) == 1 else (None, None)
    return Layer(
        name=name,
        kind=kinds.pop() if len(kinds) == 1 else "other",
        stack=stack if stack is None else WRAPPER_NAMES.sub("", stack),
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
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
    groups: dict[str, list[Placed]] = {}
    unmatched = []
    for item in placed:
        for expression, template in compiled:
            match = expression.search(item.names[0])
            if match is not None:
                groups.setdefault(_expanded(match, template), []).append(item)
                break
        else:
            unmatched.append(item.names[0])
    if unmatched:
        raise ValueError(
            f"patterns leave {len(unmatched)} parameters in no layer: {quoted(unmatched)}. "
            'End them with (".*", "rest") to gather what is left'
        )
    return groups


def _expanded(match: re.Match[str], template: str) -> str:
    try:
        name = match.expand(template)
    except (re.error, IndexError) as error:
        raise ValueError(
            f"layer name {template!r} does not fit pattern {match.re.pattern!r}: {error}"
        ) from None
    if not name:
        raise ValueError(
            f"layer name {template!r} is empty for parameter {match.string!r}: give it a name"
        )
    return name
