"""Gather dotted names into few regular expressions: block numbers and endings as alternatives.

Knows strings only. Which names are meant, and what an expression is for, `export.py` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# What a regular expression reads otherwise. Dots are apart, as axolotl treats them differently.
_SPECIAL = re.compile(r"[\\^$*+?{}\[\]|()]")


@dataclass(frozen=True)
class NameGroup:
    """Names that one expression matches: prefix.number.rest, or prefix alone without numbers."""

    prefix: str
    numbers: tuple[str, ...]  # ("[0-9]+",): all that there are
    rests: tuple[str, ...]
    is_module: bool


def prefixes(name: str) -> list[str]:
    """Paths of the modules that a parameter is in, the outermost first."""
    steps = name.split(".")
    return [".".join(steps[:length]) for length in range(1, len(steps))]


def group_names(units: list[tuple[str, bool]], everything: Iterable[str]) -> list[NameGroup]:
    """Gather paths that differ in the block's number or in what follows it.

    Args:
        units: (path, whether everything below it is meant; else the path is a whole name).
        everything: all names that there are. Where each block that has an ending is meant, its
            numbers become [0-9]+.
    """
    numbers_of: dict[tuple[str, str, bool], list[str]] = {}
    for path, is_module in units:
        prefix, number, rest = numbered(path)
        found = numbers_of.setdefault((prefix, rest, is_module), [])
        if number is not None:
            found.append(number)
    present: dict[tuple[str, str], set[str]] = {}
    for name in everything:
        for path in (*prefixes(name), name):
            prefix, number, rest = numbered(path)
            if number is not None:
                present.setdefault((prefix, rest), set()).add(number)
    merged: dict[tuple[str, tuple[str, ...], bool], list[str]] = {}
    for (prefix, rest, is_module), numbers in numbers_of.items():
        every = len(numbers) > 1 and set(numbers) == present[prefix, rest]
        key = (prefix, ("[0-9]+",) if every else tuple(numbers), is_module)
        merged.setdefault(key, []).append(rest)
    return [
        NameGroup(prefix, numbers, tuple(rests), is_module)
        for (prefix, numbers, is_module), rests in merged.items()
    ]


def numbered(path: str) -> tuple[str, str | None, str]:
    """(what stands before the first number of a path, the number, what follows)."""
    steps = path.split(".")
    place = next((place for place, step in enumerate(steps) if step.isdigit()), None)
    if place is None:
        return path, None, ""
    return ".".join(steps[:place]), steps[place], ".".join(steps[place + 1 :])


def expression(group: NameGroup, dot: str) -> str:
    """The regular expression of a group without anchors, `dot` standing for a literal dot."""

    def one_of(choices: Iterable[str]) -> str:
        made = list(choices)
        return made[0] if len(made) == 1 else f"({'|'.join(made)})"

    def path(text: str) -> str:
        return _SPECIAL.sub(r"\\\g<0>", text).replace(".", dot)

    parts = [path(group.prefix)] if group.prefix else []
    if group.numbers:
        parts.append(one_of(group.numbers))
    if any(group.rests):
        parts.append(one_of(map(path, group.rests)))
    return dot.join(parts)
