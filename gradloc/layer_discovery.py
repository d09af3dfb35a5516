"""Find the layers of a whole model: stacks of blocks, what stands outside, a reader's order.

It runs no forward pass and keeps no reference to the model. What one block consists of is
`layer_blocks.py`; granularity, patterns and look-ups are LayerMap's business in `layers.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from gradloc import layer_kinds as kinds
from gradloc.layer_blocks import Region, cut_block


@dataclass(frozen=True)
class Placed:
    """A parameter, all its names (first the one that `named_parameters` gives), and its region."""

    names: tuple[str, ...]
    parameter: nn.Parameter
    region: Region


@dataclass(frozen=True)
class _Stack:
    path: str
    blocks: tuple[tuple[str, int, nn.Module], ...]  # (path, index in the stack, block)


def place_parameters(model: nn.Module) -> list[Placed]:
    """Give every parameter of a model its region.

    Args:
        model: any module.

    Returns:
        Each parameter object once, in the order in which a reader expects the layers: embeddings,
        the blocks in order (attention before MLP), the final norm, the head.
    """
    stacks = _find_stacks(model)
    regions: dict[str, Region] = {}
    rank: dict[str, int] = {}  # layer inside a block -> its place among the layers of all blocks
    for stack in stacks:
        for path, index, block in stack.blocks:
            found = cut_block(path, block, Region(path, "other", stack.path, index, path))
            regions.update(found)
            inside = {region.layer: region for region in found.values()}.values()
            for region in sorted(inside, key=lambda r: (r.layer == path, r.kind == "mlp")):
                rank[region.layer] = len(rank)

    modules = dict(model.named_modules(remove_duplicate=False))
    heads = _output_embeddings(model)
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    placed = []
    for key, aliases in names.items():
        candidates = [
            _inside_region(name, regions) or _outside_region(name, modules, heads)
            for name in aliases
        ]
        # A tied weight belongs to the embedding, wherever the model happens to define the head.
        preferred = [r for kind in ("embedding", "head") for r in candidates if r.kind == kind]
        placed.append(Placed(tuple(aliases), parameters[key], (preferred or candidates)[0]))
    head_paths = [path for path, module in modules.items() if id(module) in heads]
    return _in_reading_order(placed, stacks, rank, head_paths)


def _find_stacks(model: nn.Module) -> list[_Stack]:
    for container in (nn.ModuleList, nn.Sequential):
        stacks = list(_walk_stacks(model, "", container, set()))
        if stacks:
            return stacks
    return []


def _walk_stacks(
    module: nn.Module, path: str, container: type[nn.Module], seen: set[int]
) -> Iterator[_Stack]:
    # What can be reached twice is where it is defined first, as in named_parameters.
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, container):
        blocks = tuple(
            (_join(path, name), int(name) if name.isdigit() else index, child)
            for index, (name, child) in enumerate(module.named_children())
            if kinds.owns_parameters(child) and not kinds.is_plain(child)
        )
        classes = [type(block) for _, _, block in blocks]
        repeated = any(classes.count(cls) > 1 for cls in classes)
        if blocks and (container is nn.ModuleList or repeated):
            yield _Stack(path, blocks)
            return
    for name, child in module.named_children():
        yield from _walk_stacks(child, _join(path, name), container, seen)


def _inside_region(name: str, regions: Mapping[str, Region]) -> Region | None:
    """The region of the nearest module above a parameter, None outside blocks."""
    path = name
    while path:
        if path in regions:
            return regions[path]
        path = path.rpartition(".")[0]
    return None


def _outside_region(name: str, modules: Mapping[str, nn.Module], heads: set[int]) -> Region:
    """The layer of a parameter in no block: the module that owns it, or that peft adapted."""
    path = name.rpartition(".")[0]
    steps = path.split(".")
    for length in range(1, len(steps)):
        outer = ".".join(steps[:length])
        if kinds.is_adapted(modules[outer]):
            path = outer
            break
    module, core = modules[path], kinds.unwrapped(modules[path])
    kind = kinds.outside_kind(
        (path or name).rpartition(".")[2].lower(),
        core,
        is_head=id(module) in heads or id(core) in heads,
        heads_known=bool(heads),
    )
    return Region(path or name, kind)  # a parameter of the model itself is a layer by its own name


def _output_embeddings(model: nn.Module) -> set[int]:
    """Identities of the head's module, as the model itself names it."""
    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return set()
    try:
        head = get()
    except (
        NotImplementedError,
        AttributeError,
    ):  # the method is inherited by models without a head
        return set()
    if not isinstance(head, nn.Module) or isinstance(kinds.unwrapped(head), nn.Embedding):
        return set()
    return {id(head), id(kinds.unwrapped(head))}


def _in_reading_order(
    placed: list[Placed],
    stacks: Sequence[_Stack],
    rank: Mapping[str, int],
    head_paths: Sequence[str],
) -> list[Placed]:
    """Sort by layer: what stands before a stack, its blocks, what stands after; then heads."""
    if not stacks:
        return placed
    first: dict[str, int] = {}  # layer -> where it is defined
    for position, item in enumerate(placed):
        first.setdefault(item.region.layer, position)
    starts = [
        min(
            (first[item.region.layer] for item in placed if item.region.stack == stack.path),
            default=0,
        )
        for stack in stacks
    ]

    def key(item: Placed) -> tuple[int, int, int]:
        region, defined = item.region, first[item.region.layer]
        if region.stack is not None:
            number = next(n for n, stack in enumerate(stacks) if stack.path == region.stack)
            return number, 1, rank[region.layer]
        near = [_shared_steps(region.layer, stack.path) for stack in stacks]
        nearest = [n for n, steps in enumerate(near) if steps == max(near)]
        if region.kind == "embedding":
            return nearest[0], 0, defined
        to_head = max((_shared_steps(region.layer, path) for path in head_paths), default=0)
        if region.kind == "head" or to_head > max(near):
            return len(stacks), int(region.kind == "head"), defined
        passed = [n for n in nearest if starts[n] < defined]
        # OPT defines the final norm before the blocks; an embedding's norm really stands there.
        final_norm = region.kind == "norm" and "emb" not in region.layer
        number = passed[-1] if passed else nearest[0]
        return number, 2 if passed or final_norm else 0, defined

    return sorted(placed, key=key)


def _shared_steps(path: str, other: str) -> int:
    steps = 0
    for mine, theirs in zip(path.split("."), other.split("."), strict=False):
        if mine != theirs:
            break
        steps += 1
    return steps


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
