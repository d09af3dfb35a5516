"""Proof that a selection is in force: a check at the first step, one line, and a table any time.

Reads the optimizer's state and changes nothing. The line goes to the logger "gradloc" (INFO).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradloc.optim_anchor import ANCHOR
from gradloc.optim_state import MOMENTS, state_bytes
from gradloc.plan import LayerPlan
from gradloc.wording import bytes_in_words, listed

logger = logging.getLogger("gradloc")


@dataclass
class LayerRow:
    """One layer as the optimizer sees it."""

    name: str
    scale: float
    num_model_elements: int  # of the layer, whether the optimizer has them or not
    num_elements: int = 0  # that train if the layer does
    moment_bytes: int = 0  # on the parameters' device, as the next
    anchor_bytes: int = 0
    offloaded_bytes: int = 0
    num_steps: int = 0  # of the tensor that has taken the most
    norm: float | None = None  # of the last gradient


def check_in_force(
    plan: LayerPlan,
    *,
    present: Collection[str],
    with_grad: Collection[str],
    in_part: Collection[str],
) -> None:
    """Check, at the first step of a plan, that its active layers have gradients.

    Args:
        plan: the plan.
        present: layers of which the optimizer has parameters.
        with_grad: the active layers of which a parameter has a gradient.
        in_part: the active layers of which another parameter does not train, as it has
            requires_grad=False, or has a gradient and is not in the optimizer.

    Raises:
        RuntimeError: no active layer has a gradient.

    Warns:
        RuntimeWarning: some active layers have none, or train only in part.
    """
    without = [name for name in plan.active if name in present and name not in with_grad]
    if not with_grad:
        raise RuntimeError(
            f"nothing trains under the plan ({plan.policy}): none of its {len(without)} active "
            "layers has a gradient in its first step. Did backward() come first, and is "
            "requires_grad=True set on them? If the model was sharded (fully_shard) or converted "
            "since the optimizer was made, it has other parameters now: make the optimizer after"
        )
    if without:
        warnings.warn(
            f"the plan ({plan.policy}) is in force, but these active layers have no gradient and "
            f"do not train: {listed(without)}. Was requires_grad=False set on them, or did "
            "backward() not reach them?",
            RuntimeWarning,
            stacklevel=4,
        )
    if in_part:
        warnings.warn(
            f"the plan ({plan.policy}) trains only a part of these layers: "
            f"{listed(sorted(in_part))}. Others of their parameters have requires_grad=False, or "
            "have gradients and are not in the optimizer; give it all parameters, and set "
            "requires_grad=False only afterwards, on whole layers",
            RuntimeWarning,
            stacklevel=4,
        )


def in_force_line(policy: str, rows: Sequence[LayerRow]) -> str:
    """The line about a plan: layers, parameters, bytes; policy: what made it."""
    active = [row for row in rows if row.scale > 0 and row.num_elements]
    trained = sum(row.num_elements for row in active)
    total = sum(row.num_model_elements for row in rows)
    anchors = sum(row.anchor_bytes for row in rows)
    away = sum(row.offloaded_bytes for row in rows)
    return (
        f"plan in force ({policy}): {len(active)} of {len(rows)} layers train, "
        f"{trained:,} of {total:,} parameters ({trained / max(total, 1):.1%}); moments "
        f"{bytes_in_words(sum(row.moment_bytes for row in rows))}"
        + (f", anchors {bytes_in_words(anchors)}" if anchors else "")
        + (f", {bytes_in_words(away)} offloaded" if away else "")
    )


def report_table(headline: str, rows: Sequence[LayerRow]) -> str:
    """A table of the layers, for people."""
    width = max(5, *(len(row.name) for row in rows))
    anchors = any(row.anchor_bytes for row in rows)
    away = any(row.offloaded_bytes for row in rows)
    head = f"{'layer':{width}}  {'scale':>6}  {'parameters':>12}  {'steps':>6}  {'moments':>10}"
    head += (f"  {'anchors':>10}" if anchors else "") + (f"  {'offloaded':>10}" if away else "")
    lines = [headline, head + f"  {'grad norm':>10}"]
    for row in rows:
        scale = "frozen" if row.scale == 0 else f"{row.scale:.3g}"
        lines.append(
            f"{row.name:{width}}  {scale:>6}  {row.num_model_elements:>12,}  {row.num_steps:>6}  "
            f"{bytes_in_words(row.moment_bytes):>10}"
            + (f"  {bytes_in_words(row.anchor_bytes):>10}" if anchors else "")
            + (f"  {bytes_in_words(row.offloaded_bytes):>10}" if away else "")
            + f"  {'-' if row.norm is None else f'{row.norm:.3e}':>10}"
        )
    return "\n".join(lines)


def layer_rows(
    names: Sequence[str],
    scales: Sequence[float],
    num_elements: Sequence[int] | None,
    params: Iterable[tuple[Tensor, int]],
    states: Mapping[Tensor, dict[str, Any]],
    away: Collection[Tensor],
) -> list[LayerRow]:
    """A row a layer.

    Args:
        names: of the layers.
        scales: by layer.
        num_elements: of the whole layers; None: those of `params`.
        params: the optimizer's parameters, each with the index of its layer.
        states: the optimizer's state.
        away: the parameters whose moments are offloaded.
    """
    whole = [0] * len(names) if num_elements is None else num_elements
    rows = [LayerRow(*three) for three in zip(names, scales, whole, strict=True)]
    for param, layer in params:
        row, state = rows[layer], states.get(param, {})
        if param.requires_grad or param.grad is not None:
            row.num_elements += param.numel()
        if num_elements is None:
            row.num_model_elements += param.numel()
        if param in away:
            row.offloaded_bytes += state_bytes(state)
        else:
            row.moment_bytes += state_bytes(state, MOMENTS)
            row.anchor_bytes += state_bytes(state, (ANCHOR,))
        row.num_steps = max(row.num_steps, int(state.get("step", 0)))
    return rows
