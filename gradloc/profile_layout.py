"""Where each layer of a profile lies in its heatmap: rows and columns. Draws nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradloc.measurement import ProfiledLayer

_TITLES = {"mlp": "MLP", "attention": "attention", "block": "whole block"}
OUTSIDE = "outside the blocks"


@dataclass(frozen=True)
class Group:
    """Columns of one section that show the same part of every block.

    Args:
        title: what stands above the columns.
        layers: row -> layer name; rows that have no such layer are absent.
    """

    title: str
    layers: Mapping[int, str]


@dataclass(frozen=True)
class Section:
    """Rows that are drawn together: a stack of blocks, or the layers outside all stacks.

    Args:
        stack: module path of the stack; None: outside.
        rows: labels, top to bottom (block numbers, or names).
        groups: columns, left to right.
    """

    stack: str | None
    rows: tuple[str, ...]
    groups: tuple[Group, ...]


def sections_of(layers: Sequence[ProfiledLayer]) -> tuple[Section, ...]:
    """Stacks in model order, then what lies outside them."""
    stacks: dict[str, list[ProfiledLayer]] = {}
    outside = []
    for layer in layers:
        if layer.stack is None or layer.block is None:
            outside.append(layer)
        else:
            stacks.setdefault(layer.stack, []).append(layer)
    sections = [_stack_section(stack, inside) for stack, inside in stacks.items()]
    if outside:
        names = [layer.name for layer in outside]
        group = Group(OUTSIDE if stacks else "", dict(enumerate(names)))
        sections.append(Section(None, tuple(_short(names)), (group,)))
    return tuple(sections)


def _stack_section(stack: str, layers: Sequence[ProfiledLayer]) -> Section:
    blocks = sorted({layer.block for layer in layers if layer.block is not None})
    rows = {block: row for row, block in enumerate(blocks)}
    parts: dict[str, dict[int, str]] = {}
    kinds: dict[str, str] = {}
    for layer in layers:
        # The same part of two blocks has the same name after the block's own path.
        part = layer.name.removeprefix(f"{stack}.{layer.block}").removeprefix(".")
        assert layer.block is not None
        parts.setdefault(part, {})[rows[layer.block]] = layer.name
        kinds.setdefault(part, layer.kind)
    # A kind is the better title, where only one part of the block has it.
    common = Counter(kinds.values())
    groups = tuple(
        Group(
            _TITLES.get(kinds[part], kinds[part]) if common[kinds[part]] == 1 else _tail(part),
            found,
        )
        for part, found in parts.items()
    )
    return Section(stack, tuple(str(block) for block in blocks), groups)


def _tail(part: str) -> str:
    """The last component, SelfAttention; of a parameter the last two, q_proj.weight."""
    pieces = part.split(".")
    return ".".join(pieces[-2:]) if pieces[-1] in ("weight", "bias") else pieces[-1] or "block"


def _short(names: Sequence[str]) -> list[str]:
    """Last components, or whole names where these are not unique or say too little."""
    tails = [name.rsplit(".", 1)[-1] for name in names]
    count = Counter(tails)
    return [
        name if count[tail] > 1 or tail in ("weight", "bias") or tail.isdigit() else tail
        for name, tail in zip(names, tails, strict=True)
    ]
