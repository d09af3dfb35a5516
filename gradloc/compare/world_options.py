"""Reads the options of a world from a configuration into the dataclass that has them.

Knows no world.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

Options = TypeVar("Options")


def read_options(
    kind: type[Options], options: Mapping[str, Any], *, world: str, without: Sequence[str] = ()
) -> Options:
    """Make a dataclass of `options`; whole numbers pass where it has fractions.

    Args:
        kind: a dataclass whose fields have defaults.
        options: name -> value.
        world: its name, for messages.
        without: fields that a configuration may not set.

    Raises:
        ValueError: an unknown option, or a value of another type than the default's.
    """
    defaults = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    allowed = [name for name in defaults if name not in without]
    for name, value in options.items():
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(allowed)}"
            raise ValueError(f"world {world!r} has no option {name!r}{hint}")
        expected = type(defaults[name])
        fits = type(value) is expected or (expected is float and type(value) is int)
        if not fits and defaults[name] is not None:
            raise ValueError(
                f"world option {name}={value!r}: expected {expected.__name__}, as in "
                f"{name}={defaults[name]!r}"
            )
    return kind(**options)
