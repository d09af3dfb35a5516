"""MemoryEstimate: the bytes that a plan will take in training, known before it starts.

Counts parameters, gradients and the optimizer's moments and anchors from shapes and dtypes, so a
model on the meta device will do. Activations, buffers, the batch and what an allocator adds are not
counted; of a sharded model it counts the whole, not one rank's part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from gradloc.layers import Layer, LayerMap
from gradloc.optim_anchor import anchor_dtype
from gradloc.optim_state import moment_dtype
from gradloc.wording import bytes_in_words

if TYPE_CHECKING:
    from gradloc.plan import LayerPlan
    from gradloc.recadam import RecAdam

GRANULARITIES = ("submodule", "block", "tensor")
_STATE_DTYPES = (None, torch.float32, torch.bfloat16)
_ROWS = {"embedding": "embeddings", "head": "head"}
_REST, _OUTSIDE = "the other layers", "in no layer"


@dataclass(frozen=True)
class MemoryRow:
    """A part of the model: its layers, and bytes under the plan and in full training.

    Attributes:
        name: "embeddings", "head", "the other layers"; or "in no layer" for parameters that no plan
            can train (quantised ones, and what a map with only_trainable leaves out).
        num_layers: how many layers.
        num_active: how many of them train.
        parameter_bytes: of the parameters; the same in full training.
        gradient_bytes: of the gradients that exist at the end of a backward pass.
        moment_bytes: of the optimizer's moments once every active tensor has been updated.
        full_gradient_bytes: the same where every layer trains.
        full_moment_bytes: the same where every layer trains.
        anchor_bytes: of RecAdam's anchors, once every active tensor has been updated.
        full_anchor_bytes: the same where every layer trains.
    """

    name: str
    num_layers: int
    num_active: int
    parameter_bytes: int
    gradient_bytes: int
    moment_bytes: int
    full_gradient_bytes: int
    full_moment_bytes: int
    anchor_bytes: int = 0
    full_anchor_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Parameters, gradients, moments and anchors under the plan."""
        return self.parameter_bytes + self.gradient_bytes + self.moment_bytes + self.anchor_bytes

    @property
    def full_bytes(self) -> int:
        """Parameters, gradients, moments and anchors in full training."""
        states = self.full_moment_bytes + self.full_anchor_bytes
        return self.parameter_bytes + self.full_gradient_bytes + states


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of training under a plan, by part of the model; `print` shows them as a table.

    Attributes:
        rows: the parts, each parameter in one; parts that the model lacks are absent.
        assumptions: what was counted how, a sentence each.
    """

    rows: tuple[MemoryRow, ...]
    assumptions: tuple[str, ...] = ()

    @property
    def total(self) -> MemoryRow:
        """The sums over all rows."""
        sums = [
            sum(getattr(row, field) for row in self.rows)
            for field in list(MemoryRow.__dataclass_fields__)[1:]
        ]
        return MemoryRow("total", *sums)

    @property
    def parameter_bytes(self) -> int:
        """Of all parameters."""
        return self.total.parameter_bytes

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients under the plan."""
        return self.total.gradient_bytes

    @property
    def moment_bytes(self) -> int:
        """Of the optimizer's moments under the plan."""
        return self.total.moment_bytes

    @property
    def anchor_bytes(self) -> int:
        """Of RecAdam's anchors under the plan."""
        return self.total.anchor_bytes

    @property
    def total_bytes(self) -> int:
        """Parameters, gradients, moments and anchors under the plan."""
        return self.total.total_bytes

    @property
    def full_bytes(self) -> int:
        """Parameters, gradients, moments and anchors in full training."""
        return self.total.full_bytes

    def __str__(self) -> str:
        total = self.total
        anchored = total.full_anchor_bytes > 0
        kinds = ("parameters", "gradients", "moments", *(("anchors",) if anchored else ()))
        lines: list[Sequence[str]] = [("", "train", *kinds, "together", "full training")]
        for row in (*self.rows, total):
            counts = [row.parameter_bytes, row.gradient_bytes, row.moment_bytes]
            sums = (*((row.anchor_bytes,) if anchored else ()), row.total_bytes, row.full_bytes)
            trains = f"{row.num_active} of {row.num_layers}" if row.num_layers else "-"
            lines.append((row.name, trains, *map(bytes_in_words, (*counts, *sums))))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        text = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        saved = total.full_bytes - total.total_bytes
        share = saved / total.full_bytes if total.full_bytes else 0.0
        summary = (
            f"saved: {bytes_in_words(saved)} of {bytes_in_words(total.full_bytes)} ({share:.0%})"
        )
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1], summary, *self.assumptions])


def estimate_memory(
    plan: LayerPlan,
    model: nn.Module,
    *,
    layers: LayerMap | None = None,
    state_dtype: torch.dtype | None = None,
    amsgrad: bool = False,
    gradients: str = "active",
    recadam: RecAdam | None = None,
) -> MemoryEstimate:
    """What `LayerPlan.memory` returns; arguments and errors are described there."""
    if gradients not in ("active", "all"):
        raise ValueError(
            f"gradients={gradients!r}: choose 'active' (frozen layers have requires_grad=False) or "
            "'all' (every layer computes its gradient, as where plans change during training)"
        )
    if state_dtype not in _STATE_DTYPES:
        raise ValueError(
            f"state_dtype={state_dtype!r}: choose None (float32, or float64 for float64 "
            "parameters), torch.float32 or torch.bfloat16"
        )
    layers = fitting_layers(plan, model, layers)
    active = set(plan.active)
    # name of the row -> layers, active ones, and the bytes in MemoryRow's order
    sums: dict[str, list[int]] = {}
    for layer in layers:
        row = sums.setdefault(_ROWS.get(layer.kind, _REST), [0] * 9)
        row[0] += 1
        row[1] += layer.name in active
    known = layers.parameters(model)
    for _, parameter, position in known:
        layer = layers.layers[position]
        trains = layer.name in active
        gradient = parameter.numel() * parameter.element_size()
        itemsize = moment_dtype(parameter, state_dtype).itemsize
        moments = (3 if amsgrad else 2) * parameter.numel() * itemsize
        of_anchor = anchor_dtype(parameter, recadam)
        anchor = 0 if of_anchor is None else parameter.numel() * of_anchor.itemsize
        row = sums[_ROWS.get(layer.kind, _REST)]
        row[2] += gradient  # a parameter is as large as its gradient
        row[3] += gradient if trains or gradients == "all" else 0
        row[4] += moments if trains else 0
        row[5] += gradient
        row[6] += moments
        row[7] += anchor if trains else 0
        row[8] += anchor
    others = _others(model, {id(parameter) for _, parameter, _ in known})
    if others:
        size = sum(parameter.numel() * parameter.element_size() for parameter in others)
        sums[_OUTSIDE] = [0, 0, size, *[0] * 6]
    order = (*_ROWS.values(), _REST, _OUTSIDE)
    rows = tuple(MemoryRow(name, *sums[name]) for name in order if name in sums)
    return MemoryEstimate(rows, tuple(_assumptions(model, layers, gradients)))


def fitting_layers(plan: LayerPlan, model: nn.Module, layers: LayerMap | None = None) -> LayerMap:
    """The map whose layers the plan names.

    Args:
        plan: the plan.
        model: the model that it is for.
        layers: the map, if known; None: made from the model, with the granularity that fits.

    Raises:
        ValueError: the plan does not fit `layers`, or no granularity of the model fits it.
    """
    if layers is not None:
        plan.check(layers.names)
        return layers
    wanted = set(plan.scales)
    maps = [LayerMap.from_model(model, granularity=one) for one in GRANULARITIES]
    for found in maps:
        if set(found.names) == wanted:
            return found
    nearest = max(maps, key=lambda one: len(wanted & set(one.names)))
    try:
        plan.check(nearest.names)
    except ValueError as error:
        raise ValueError(
            f"{error}. Tried granularity {', '.join(GRANULARITIES)}; {nearest.granularity} is "
            "nearest. If the plan's map was made otherwise (patterns, only_trainable), pass it as "
            "layers"
        ) from None
    raise AssertionError("a plan of the same names passed its own check")  # pragma: no cover


def tied_names(model: nn.Module, layer: Layer) -> list[tuple[str, str]]:
    """(name in the layer, further name of the same parameter) for the tied ones of a layer."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    first = {found[0]: found[1:] for found in names.values()}
    return [(name, alias) for name in layer.parameters for alias in first.get(name, ())]


def _others(model: nn.Module, known: set[int]) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if id(parameter) not in known]


def _assumptions(model: nn.Module, layers: Iterable[Layer], gradients: str) -> list[str]:
    said = [
        f"{name} is also {alias}: counted once, as {_ROWS['embedding']}"
        for layer in layers
        if layer.kind == "embedding"
        for name, alias in tied_names(model, layer)
    ]
    if gradients == "all":
        said.append("frozen layers have gradients too (requires_grad=True)")
    return [*said, "activations are not counted"]
