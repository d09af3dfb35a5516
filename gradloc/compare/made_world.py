"""MadeWorld: what the worlds hand to `study`. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradloc.compare.material import Material


@dataclass(frozen=True, kw_only=True)
class MadeWorld:
    """One seed of a world.

    Args:
        material: its texts and probes.
        model: the base model's folder, relative to the seed's.
        about: what the base's record should say, ready for JSON.
    """

    material: Material
    model: str
    about: Mapping[str, Any] = field(default_factory=dict)
