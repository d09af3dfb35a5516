"""What LocalizedAdamW's state dict carries beside torch's: the plan, clipping, settings, counts.

One JSON string in the first param group, under `KEY`: as a single value of a plain type it passes
every way in which optimizer states are saved (`weights_only=True`, Accelerate, the flattening of
torch.distributed.checkpoint). torch.optim.AdamW ignores it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from gradloc.plan import LayerPlan
from gradloc.recadam import RecAdam

KEY = "localization"


@dataclass(frozen=True)
class Record:
    """Everything of ours that the next step depends on."""

    plan: LayerPlan | None
    max_grad_norm: float | None
    on_nonfinite: str
    stochastic_rounding: bool
    seed: int
    num_skipped_steps: int
    num_states: int  # parameters with state, so that a load can tell when some were left behind
    recadam: RecAdam | None = None

    def to_text(self) -> str:
        """The JSON string; floats keep every bit."""
        plan = self.plan and {"scales": dict(self.plan.scales), "policy": self.plan.policy}
        recadam = self.recadam and asdict(self.recadam)
        return json.dumps({**self.__dict__, "plan": plan, "recadam": recadam})

    @classmethod
    def from_text(cls, text: Any) -> Record:
        """Read what `to_text` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            body = json.loads(text)
            plan = body["plan"] and LayerPlan(body["plan"]["scales"], body["plan"]["policy"])
            limit, recadam = body["max_grad_norm"], body.get("recadam")
            return cls(
                plan=plan,
                max_grad_norm=None if limit is None else float(limit),
                on_nonfinite=str(body["on_nonfinite"]),
                stochastic_rounding=bool(body["stochastic_rounding"]),
                seed=int(body["seed"]),
                num_skipped_steps=int(body["num_skipped_steps"]),
                num_states=int(body["num_states"]),
                recadam=recadam and RecAdam(**recadam),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"state_dict: {KEY!r} of the first param group is not what LocalizedAdamW writes "
                f"({type(error).__name__}: {error}): remove the key to load without its plan"
            ) from error


def take_record(state_dict: dict[str, Any]) -> tuple[dict[str, Any], Record | None]:
    """A state dict without the record, and the record, if there is one.

    The state dict that was given is not changed.

    Raises:
        ValueError: the record cannot be read, or the state of parameters is missing.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    texts = [group.pop(KEY) for group in groups if KEY in group]
    record = Record.from_text(texts[0]) if texts else None
    found = sum(bool(state) for state in state_dict["state"].values())
    if record is not None and found < record.num_states:
        raise ValueError(
            f"state_dict: it was saved with the state of {record.num_states} parameters and has "
            f"that of {found}. torch.distributed.checkpoint reads only what the optimizer has "
            "state for already: call gradloc.distributed.prepare_to_load(model, optimizer, "
            f"checkpoint) before get_state_dict; or remove {KEY!r} from the first param group to "
            "load without the rest"
        )
    return {**state_dict, "param_groups": groups}, record


def recadam_after(record: Record | None, before: RecAdam | None) -> RecAdam | None:
    """RecAdam's settings after a load: those of the record where it has some, else as before.

    A state that was saved without must not turn a pull off that the optimizer was made with.
    """
    return before if record is None or record.recadam is None else record.recadam
