"""The JSON form of a GradientProfile, and what is said of a file that is not whole.

Reads and writes no file itself; `GradientProfile.save` and `.load` do, through `gradloc.files`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradloc.measurement import Measurement, ProfiledLayer

if TYPE_CHECKING:
    from gradloc.profile import GradientProfile

SCHEMA = "gradloc.profile"
VERSION = 1

_COUNTS = ("num_batches", "num_sequences", "num_tokens")


def profile_to_json(profile: GradientProfile) -> dict[str, Any]:
    """The profile as JSON values; a reference that all kinds share is written once ("shared")."""
    references: dict[str, Any] = {}
    for loss, by_kind in profile.references.items():
        measurements = list(by_kind.values())
        if loss == "all" and all(one == measurements[0] for one in measurements):
            references[loss] = {"shared": _measurement_to_json(measurements[0])}
        else:
            written = {kind: _measurement_to_json(one) for kind, one in by_kind.items()}
            references[loss] = {"by_kind": written}
    return {
        "gradloc": profile.gradloc_version,
        "torch": profile.torch_version,
        "granularity": profile.granularity,
        "seed": profile.seed,
        "step": profile.step,
        "reference_loss": profile.reference_loss,
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "stack": layer.stack,
                "block": layer.block,
                "num_elements": layer.num_elements,
            }
            for layer in profile.layers
        ],
        "probes": {kind: _measurement_to_json(one) for kind, one in profile.probes.items()},
        "references": references,
    }


def profile_from_json(body: Mapping[str, Any], path: str) -> GradientProfile:
    """The profile that `profile_to_json` wrote.

    Args:
        body: what the file holds.
        path: the file's name, for messages.

    Raises:
        ValueError: something is missing, of the wrong type or contradictory; the message names file
            and field.
    """
    from gradloc.profile import GradientProfile

    read = _Reader(path)
    layers = []
    for index, entry in enumerate(read.field(body, "layers", list)):
        where = f"layers[{index}]"
        layer = read.typed(entry, dict, where)
        stack, block = layer.get("stack"), layer.get("block")
        layers.append(
            ProfiledLayer(
                name=read.field(layer, "name", str, where),
                kind=read.field(layer, "kind", str, where),
                stack=None if stack is None else read.typed(stack, str, f"{where}.stack"),
                block=None if block is None else read.typed(block, int, f"{where}.block"),
                num_elements=read.field(layer, "num_elements", int, where),
            )
        )
    probes = {
        kind: read.measurement(entry, f"probes[{kind!r}]")
        for kind, entry in read.field(body, "probes", dict).items()
    }
    references = {}
    for loss, entry in read.field(body, "references", dict).items():
        where = f"references[{loss!r}]"
        reference = read.typed(entry, dict, where)
        if "shared" in reference:
            shared = read.measurement(reference["shared"], f"{where}.shared")
            references[loss] = dict.fromkeys(probes, shared)
        else:
            references[loss] = {
                kind: read.measurement(one, f"{where}.by_kind[{kind!r}]")
                for kind, one in read.field(reference, "by_kind", dict, where).items()
            }
    try:
        return GradientProfile(
            layers=tuple(layers),
            probes=probes,
            references=references,
            reference_loss=read.field(body, "reference_loss", str),
            granularity=read.field(body, "granularity", str),
            seed=read.field(body, "seed", int),
            step=read.field(body, "step", int),
            gradloc_version=read.field(body, "gradloc", str),
            torch_version=read.field(body, "torch", str),
        )
    except ValueError as error:
        raise ValueError(f"{path!r} is not a whole profile: {error}") from error


def _measurement_to_json(one: Measurement) -> dict[str, Any]:
    # JSON has no nan: an unknown standard error is null.
    errors = [None if math.isnan(error) else error for error in one.standard_errors]
    counts = {count: getattr(one, count) for count in _COUNTS}
    return {**counts, "norms": list(one.norms), "standard_errors": errors}


class _Reader:
    """Takes values out of parsed JSON; names file, field and type when one is wrong."""

    def __init__(self, path: str) -> None:
        self.path = path

    def typed(self, value: Any, wanted: type, where: str) -> Any:
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(
                f"{self.path!r} is not a whole profile: {where} is {value!r:.60}, "
                f"not {wanted.__name__}; trace the model again"
            )
        return value

    def field(self, body: Mapping[str, Any], key: str, wanted: type, where: str = "") -> Any:
        return self.typed(body.get(key), wanted, f"{where}.{key}" if where else key)

    def measurement(self, value: Any, where: str) -> Measurement:
        entry = self.typed(value, dict, where)
        norms = self.field(entry, "norms", list, where)
        errors = self.field(entry, "standard_errors", list, where)
        return Measurement(
            norms=tuple(self.number(norm, f"{where}.norms") for norm in norms),
            standard_errors=tuple(
                math.nan if error is None else self.number(error, f"{where}.standard_errors")
                for error in errors
            ),
            num_batches=self.field(entry, "num_batches", int, where),
            num_sequences=self.field(entry, "num_sequences", int, where),
            num_tokens=self.field(entry, "num_tokens", int, where),
        )

    def number(self, value: Any, where: str) -> float:
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return float(self.typed(value, float, where))
