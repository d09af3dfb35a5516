"""Show layers as a plain-text table, the same layer of alike blocks in one row.

Nothing is measured or chosen here, and no terminal is asked for its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradloc.layers import Layer

_HEADER = ("layer", "kind", "layers", "parameters each", "parameters", "share")
_Row = tuple[str, str, int, int]  # name, kind, how many layers, elements of one


def layer_table(layers: Sequence[Layer], granularity: str) -> str:
    """A table with a row a layer, the same layer of alike blocks taken together, and totals.

    Args:
        layers: in reading order.
        granularity: named in the last line.

    Returns:
        Lines of text without a newline at the end.
    """
    total = sum(layer.num_elements for layer in layers)
    lines = [
        (name, kind, str(count), _count(each), _count(each * count), _share(each * count, total))
        for name, kind, count, each in _rows(layers)
    ]
    widths = [
        max(len(line[column]) for line in [_HEADER, *lines]) for column in range(len(_HEADER))
    ]

    def aligned(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    tensors = sum(len(layer.parameters) for layer in layers)
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    summary = (
        f"{_plural(len(layers), 'layer')} (granularity {granularity}), "
        f"{_plural(tensors, 'tensor')}, {_plural(total, 'parameter')}"
    )
    return "\n".join([aligned(_HEADER), rule, *map(aligned, lines), rule, summary])


def _rows(layers: Sequence[Layer]) -> list[_Row]:
    rows: list[_Row] = []
    position = 0
    while position < len(layers):
        layer = layers[position]
        if _within_block(layer) is None:
            rows.append((layer.name, layer.kind, 1, layer.num_elements))
            position += 1
            continue
        blocks: dict[int, list[Layer]] = {}
        while position < len(layers) and layers[position].stack == layer.stack:
            inside = layers[position]
            if inside.block is None or _within_block(inside) is None:
                break
            blocks.setdefault(inside.block, []).append(inside)
            position += 1
        rows += _block_rows(str(layer.stack), blocks)
    return rows


def _block_rows(stack: str, blocks: dict[int, list[Layer]]) -> list[_Row]:
    alike: dict[tuple[str, str, int], list[int]] = {}
    for block, inside in blocks.items():
        for one in inside:
            looks = (str(_within_block(one)), one.kind, one.num_elements)
            alike.setdefault(looks, []).append(block)
    prefix = f"{stack}." if stack else ""
    return [
        (f"{prefix}{_numbers(numbers)}{rest}", kind, len(numbers), each)
        for (rest, kind, each), numbers in alike.items()
    ]


def _within_block(layer: Layer) -> str | None:
    """What follows the block's path in a layer's name; None if the name does not begin with it."""
    if layer.stack is None or layer.block is None:
        return None
    path = f"{layer.stack}.{layer.block}" if layer.stack else str(layer.block)
    if layer.name == path or layer.name.startswith(f"{path}."):
        return layer.name[len(path) :]
    return None


def _numbers(blocks: Sequence[int]) -> str:
    """[3] -> 3, [0, 1, 2] -> {0–2}, [0, 2, 4, 6] -> {0, 2, …, 6}, [0, 1, 5] -> {0–1, 5}."""
    if len(blocks) == 1:
        return str(blocks[0])
    step = blocks[1] - blocks[0]
    if (
        step > 1
        and len(blocks) > 3
        and list(blocks) == list(range(blocks[0], blocks[-1] + 1, step))
    ):
        return f"{{{blocks[0]}, {blocks[1]}, …, {blocks[-1]}}}"
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    if len(shown) > 4:
        shown = [*shown[:2], "…", shown[-1]]
    return f"{{{', '.join(shown)}}}"


def _count(elements: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if elements >= size:
            return f"{elements / size:.1f} {unit}"
    return f"{elements}  "  # as wide as a number with a unit, so that digits align


def _share(elements: int, total: int) -> str:
    return f"{100 * elements / total:.1f} %" if total else "-"


def _plural(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
