"""Cut one block into its layers: attention, MLP, other mixers, each with its norms.

A block is looked at alone. Where blocks are, and what stands outside, is `layer_discovery.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from gradloc import layer_kinds as kinds


@dataclass(frozen=True)
class Region:
    """The layer (granularity "submodule") of the parameters at one place of the module tree.

    Attributes:
        layer: its name.
        kind: as in `Layer.kind`.
        stack: path of the list of blocks, None outside blocks.
        block: position in that list.
        block_path: path of the block.
    """

    layer: str
    kind: str
    stack: str | None = None
    block: int | None = None
    block_path: str | None = None


@dataclass(frozen=True)
class Sublayer:
    """A part of a block that becomes a layer.

    Attributes:
        name: as the block calls it, in lower case; the names of norms refer to it.
        path: the layer's name.
        kind: "attention", "mlp" or "other".
        normalises_input: the norm in front of it is inside.
    """

    name: str
    path: str
    kind: str
    normalises_input: bool = False


@dataclass
class _Contents:
    """What a block consists of, before anything is joined.

    Attributes:
        sublayers: modules that may become layers.
        norms: lower-case name -> path.
        loose: matrices of the block itself, the same way.
        inner: regions found in blocks within the block, by path.
        parts: paths of sublayers that have no modules inside.
    """

    sublayers: list[Sublayer] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)
    loose: dict[str, str] = field(default_factory=dict)
    inner: dict[str, Region] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)


def cut_block(path: str, block: nn.Module, own: Region) -> dict[str, Region]:
    """Regions by module path inside a block.

    Args:
        path: the block's path.
        block: the block.
        own: the region for whatever no sublayer claims.

    Returns:
        Module path -> region; a parameter belongs to the region of the nearest module above it.
    """
    wrapper = kinds.transparent_child(block)
    if wrapper is not None:
        return cut_block(f"{path}.{wrapper}", block.get_submodule(wrapper), own)
    contents = _contents(path, block, own)
    sublayers = contents.sublayers
    whole = kinds.class_kind(block)
    if whole is not None and not contents.inner and all(sub.kind == "other" for sub in sublayers):
        # The list holds the sublayers themselves, as in XLM.
        return {path: replace(own, kind=whole)}

    joined = _join_mixture(contents)  # path -> path of the sublayer that it is a part of
    leftover = []
    has_mlp = bool(contents.inner) or any(sub.kind == "mlp" for sub in sublayers)
    for name, at in contents.loose.items():
        if kinds.PROJECTION.match(name) or kinds.sublayer_kind(name) == "attention":
            kind, default = "attention", "attn"
        elif not has_mlp or kinds.MIXTURE_PART.search(name) or kinds.MLP.search(name):
            kind, default = "mlp", "mlp"
        else:
            leftover.append(name)  # beside a whole MLP an odd matrix is the block's own
            continue
        target = next((sub for sub in sublayers if sub.kind == kind), None)
        if target is None:
            target = Sublayer(default, f"{path}.{default}", kind)
            sublayers.append(target)
        joined[at] = target.path

    regions = {path: own, **contents.inner}
    by_path = {sub.path: replace(own, layer=sub.path, kind=sub.kind) for sub in sublayers}
    regions.update(by_path)
    regions.update({at: by_path[target] for at, target in joined.items()})
    if sublayers:
        ordered = sorted(sublayers, key=lambda sub: sub.kind == "mlp")
        for name, place in place_norms(tuple(contents.norms), ordered, leftover).items():
            regions[contents.norms[name]] = by_path[ordered[place].path]
    return regions


def _contents(path: str, block: nn.Module, own: Region) -> _Contents:
    found = _Contents()
    for relative, child in _children(block):
        at, name = f"{path}.{relative}", relative.rpartition(".")[2].lower()
        core = kinds.unwrapped(child)
        kind = kinds.sublayer_kind(name, core)
        if not kinds.owns_parameters(child):
            continue
        if kinds.is_norm(name, core):
            found.norms[name] = at
        elif isinstance(core, nn.ModuleList) and kind is None:
            # T5 keeps a block's sublayers in a list; each of its items reads as a small block.
            for index, item in core.named_children():
                item_own = replace(own, layer=f"{at}.{index}")
                found.inner.update(cut_block(f"{at}.{index}", item, item_own))
        elif _is_block(core):
            found.inner.update(cut_block(at, child, replace(own, layer=at)))
        elif isinstance(core, nn.Embedding):
            found.inner[at] = replace(own, layer=at, kind="embedding")
        elif kinds.is_linear(core) or name in ("intermediate", "output"):
            found.loose[name] = at
        elif kind is not None or not kinds.is_leaf(core):
            found.sublayers.append(
                Sublayer(name, at, kind or "other", kinds.normalises_input(core))
            )
            if not core._modules:
                found.parts.add(at)
    return found


def _children(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A block's children; one that is named after norms and attention alike (DBRX) is opened up."""
    for name, child in block.named_children():
        core = kinds.unwrapped(child)
        if kinds.NORM.search(name) and kinds.ATTENTION.search(name) and not kinds.is_leaf(core):
            for inner, part in child.named_children():
                yield f"{name}.{inner}", part
        else:
            yield name, child


def _is_block(core: nn.Module) -> bool:
    """Whether a block's child has attention and an MLP of its own (Zamba's shared transformer)."""
    found = {
        kinds.sublayer_kind(name.lower())
        for name, child in core.named_children()
        if kinds.owns_parameters(child) and not kinds.is_leaf(child)
    }
    return {"attention", "mlp"} <= found


def _join_mixture(contents: _Contents) -> dict[str, str]:
    """Make one MLP of router and experts, and give gates and scales to what they act on."""
    joined: dict[str, str] = {}
    for kind in ("attention", "mlp"):
        alike = [sub for sub in contents.sublayers if sub.kind == kind]
        whole = [sub for sub in alike if sub.path not in contents.parts] or alike
        for sub in alike:
            mixture = kind == "mlp" and any(
                kinds.MIXTURE_PART.search(name) for name in (whole[0].name, sub.name)
            )
            if sub is not whole[0] and (mixture or sub not in whole):
                joined[sub.path] = whole[0].path
                contents.sublayers.remove(sub)
    return joined


def place_norms(
    norms: Sequence[str], sublayers: Sequence[Sublayer], leftover: Collection[str] = ()
) -> dict[str, int]:
    """Which sublayer each norm of a block belongs to.

    It is the one whose input the norm scales or, with post-norms, whose output. The order of
    definition is not the order of execution (Llama defines both norms last), so names decide, and
    where they don't, the k-th norm goes to the k-th sublayer that has none yet.

    Args:
        norms: lower-case names, in the order of definition.
        sublayers: the others first, then the MLPs; not empty.
        leftover: names of the block's own matrices; a norm named after one stays with the block.

    Returns:
        Norm name -> position in `sublayers`.
    """
    every = range(len(sublayers))
    mlps = [i for i in every if sublayers[i].kind == "mlp"]
    crosses = [
        i for i in every if i not in mlps and kinds.CROSS_ATTENTION.search(sublayers[i].name)
    ]
    mixers = [i for i in every if i not in mlps and i not in crosses] or crosses or [0]
    mixer = next((i for i in mixers if sublayers[i].kind == "attention"), mixers[0])
    mlp = mlps[0] if mlps else len(sublayers) - 1

    before_mlp = any(re.search(r"pre_?(mlp|ff|feed|moe)", norm) for norm in norms)
    after_mlp = any(re.search(r"post_?(mlp|ff|feed|moe)", norm) for norm in norms)
    before_mixer = any(
        re.search(r"input|pre_?(self_?)?att|^(self_?)?att|1$", norm) for norm in norms
    )
    placed: dict[str, int] = {}
    unnamed = []
    for norm in norms:
        named = [i for i in every if re.search(rf"(^|_){re.escape(sublayers[i].name)}(_|$)", norm)]
        if re.search(r"post_?self_?att", norm):
            placed[norm] = mixer  # GLM-4 has a post_attention norm in front of the MLP besides
        elif re.search(r"post_?att", norm):
            # In front of the MLP as in Llama, unless another norm stands there (Gemma 2) or
            # attention has none in front (OLMo 2): then it scales what attention gives.
            on_output = before_mlp or (after_mlp and not before_mixer)
            placed[norm] = mixer if on_output else mlp
        elif crosses and kinds.CROSS_ATTENTION.search(norm):
            placed[norm] = crosses[0]
        elif re.search(r"(pre|post)_?(mlp|ff|feed|moe)", norm) or norm.startswith("final"):
            placed[norm] = mlp
        elif re.match(r"([qkv]_)?input", norm):
            placed[norm] = mixer
        elif named:
            placed[norm] = max(named, key=lambda i: len(sublayers[i].name))
        elif kinds.ATTENTION.search(norm) or kinds.MLP.search(norm):
            placed[norm] = mixer if kinds.ATTENTION.search(norm) else mlp
        else:
            unnamed.append(norm)
    taken = set(placed.values())
    ordered = []
    for norm in unnamed:
        about = re.sub(r"^(pre|post)_|_?(layer_?)?norm$", "", norm)
        if norm.startswith("pre_ln"):
            placed[norm] = mixer  # RWKV's first block has it besides the usual two
        elif not about or not any(about in name for name in leftover):
            ordered.append(norm)
    free = [i for i in every if i not in taken and not sublayers[i].normalises_input]
    if not free:  # a second round of norms, or one behind everything
        free = list(every) if len(ordered) >= len(sublayers) else [len(sublayers) - 1]
    for k, norm in enumerate(ordered):
        # With more norms than sublayers each sublayer has one in front and one behind.
        placed[norm] = free[k * len(free) // max(len(ordered), len(free))]
    return placed
