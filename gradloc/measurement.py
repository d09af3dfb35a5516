"""What a GradientProfile is made of: layers, norms, and the check that they fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradloc.wording import quoted

REFERENCE_LOSSES = ("all", "matched-spans")


@dataclass(frozen=True)
class ProfiledLayer:
    """What a profile remembers of a layer: enough to draw it and to recognise its model.

    Args:
        name: the layer's name in its `LayerMap`.
        kind: "attention", "mlp", … as in `Layer.kind`.
        stack: module path of the list of blocks that the layer lies in, or None outside the blocks.
        block: index in that list, or None.
        num_elements: parameters in the layer; 0 where unknown.
    """

    name: str
    kind: str = "other"
    stack: str | None = None
    block: int | None = None
    num_elements: int = 0


@dataclass(frozen=True)
class Measurement:
    """Gradient norms of one set of batches: means over batches and their standard errors.

    Args:
        norms: [num_layers], finite and >= 0.
        standard_errors: [num_layers], standard deviation over batches / sqrt(num_batches); nan for
            a single batch.
        num_batches: batches averaged.
        num_sequences: rows of all batches.
        num_tokens: tokens that the loss fell on.
    """

    norms: tuple[float, ...]
    standard_errors: tuple[float, ...]
    num_batches: int = 1
    num_sequences: int = 0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "norms", tuple(float(norm) for norm in self.norms))
        # One nan object, so that equal measurements compare equal (tuples compare by identity
        # first).
        errors = tuple(
            math.nan if math.isnan(error) else float(error) for error in self.standard_errors
        )
        object.__setattr__(self, "standard_errors", errors)


def check_measurements(
    layers: Sequence[ProfiledLayer],
    probes: Mapping[str, Measurement],
    references: Mapping[str, Mapping[str, Measurement]],
) -> None:
    """Check that the parts of a `GradientProfile` are sound and fit together.

    Raises:
        ValueError: says which part is wrong, and what is wrong with it.
    """
    names = [layer.name for layer in layers]
    if not names or len(set(names)) != len(names):
        raise ValueError(
            f"layers: {len(names)} names, {len(set(names))} different: a profile needs each once"
        )
    if not probes:
        raise ValueError("probes is empty: a profile holds at least one kind of probe")
    if "reference" in probes:
        raise ValueError("kind='reference' is the reference's own name: rename these probes")
    if not references:
        raise ValueError("references is empty: a profile holds at least one")
    for kind, probe in probes.items():
        _check_norms(f"probes[{kind!r}]", probe, names)
    for loss, by_kind in references.items():
        if loss not in REFERENCE_LOSSES:
            raise ValueError(f"reference_loss={loss!r}: choose 'all' or 'matched-spans'")
        if set(by_kind) != set(probes):
            raise ValueError(
                f"references[{loss!r}] has kinds {list(by_kind)}, the probes {list(probes)}"
            )
        for kind, probe in probes.items():
            _check_norms(f"references[{loss!r}][{kind!r}]", by_kind[kind], names)
            both = zip(names, probe.norms, by_kind[kind].norms, strict=True)
            silent = [name for name, norm, reference in both if norm > 0 and reference == 0]
            if silent:
                raise ValueError(
                    f"layers {quoted(silent)} get a gradient from the {kind!r} probes and none "
                    f"from the reference (loss on {loss!r}), so their ratio is not defined: give "
                    "more reference batches, or leave these layers out of the LayerMap"
                )


def _check_norms(what: str, one: Measurement, names: Sequence[str]) -> None:
    for field, values in (("norms", one.norms), ("standard_errors", one.standard_errors)):
        if len(values) != len(names):
            raise ValueError(f"{what}.{field} has {len(values)} values for {len(names)} layers")
    for name, norm, error in zip(names, one.norms, one.standard_errors, strict=True):
        if not math.isfinite(norm) or norm < 0 or error < 0 or math.isinf(error):
            raise ValueError(
                f"{what}: layer {name!r} has norm {norm!r} ± {error!r}: both must be finite, >= 0"
            )
