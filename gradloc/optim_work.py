"""The work of an optimizer step, prepared once and used until a tensor of it moves.

Holds no optimizer state of its own; `LocalizedAdamW` decides when to prepare anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradloc import backends, ops
from gradloc.optim_checks import parameter_name
from gradloc.optim_state import laid_out, mend_step

Active = tuple[Tensor, int, int, int]  # parameter, layer, param group, position in the group


def prepare_works(
    active: Sequence[Active],
    groups: Sequence[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    num_layers: int,
) -> list[tuple[backends.AdamWWork, list[int]]]:
    """One work for each backend, with the positions in `active` of its parameters.

    Parameters without state are left out: they have had no gradient yet. Moments that came in
    another layout are brought into the parameter's.

    Raises:
        ValueError: a moment has another shape than its parameter, or fused=True asks for the
            compiled core where it cannot run.
    """
    found: dict[type[Any], tuple[list[ops.AdamWSlot], list[int]]] = {}
    for position, (param, layer, g, i) in enumerate(active):
        state = states.get(param)
        if not state:
            continue
        group = groups[g]
        slot = ops.AdamWSlot(
            param.detach(),
            laid_out(state, "exp_avg", param),
            laid_out(state, "exp_avg_sq", param),
            laid_out(state, "max_exp_avg_sq", param) if group["amsgrad"] else None,
            mend_step(state),
            layer,
            g,
        )
        backend = backends.choose(param, group["fused"], parameter_name(group, g, i))
        slots, positions = found.setdefault(backend, ([], []))
        slots.append(slot)
        positions.append(position)
    return [(backend(slots, num_layers), at) for backend, (slots, at) in found.items()]


def state_key(
    active: Sequence[Active],
    groups: Sequence[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
) -> list[Any]:
    """What prepared work depends on; it is prepared anew when this changes."""
    key: list[Any] = [(group["amsgrad"], group["fused"]) for group in groups]
    for param, _, _, _ in active:
        # Addresses and not objects: a tensor may get other memory in place (share_memory_, .data).
        state = states.get(param, {})
        key.append((param.shape, param.stride(), param.data_ptr(), *map(_address, state.values())))
    return key


def _address(value: Any) -> int | None:
    return value.data_ptr() if isinstance(value, Tensor) else None
