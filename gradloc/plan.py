"""LayerPlan: a learning-rate scale for every layer. Policies make plans; the optimizer obeys."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from gradloc.files import read_json, write_json
from gradloc.wording import quoted

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gradloc.layers import LayerMap
    from gradloc.memory import MemoryEstimate
    from gradloc.recadam import RecAdam

_SCHEMA = "gradloc.plan"
_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """Learning-rate scales by layer name.

    Args:
        scales: layer name -> scale, a finite number >= 0. A layer with scale s trains with learning
            rate lr·s; 0 freezes it: parameters, moments and step count stay bit for bit as they
            are.
        policy: what made the plan, for people who read the file later.

    Raises:
        ValueError: a scale is negative or not finite, or there are no layers.
    """

    scales: Mapping[str, float]
    policy: str = "by hand"

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError(
                "scales is empty: a plan names every layer of the model (see LayerMap.names)"
            )
        scales = {}
        for name, scale in self.scales.items():
            try:
                value = float(scale)
            except (TypeError, ValueError):  # of None or a word in a file that someone edited
                value = math.nan
            if not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"scales[{name!r}]={scale!r}: a scale is a finite number >= 0 (0 freezes the "
                    "layer)"
                )
            scales[name] = value
        object.__setattr__(self, "scales", MappingProxyType(scales))

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the layers that train (scale > 0), in the plan's order."""
        return tuple(name for name, scale in self.scales.items() if scale > 0)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the layers that don't."""
        return tuple(name for name, scale in self.scales.items() if scale == 0)

    def check(self, names: Iterable[str]) -> None:
        """Check that the plan is about exactly these layers.

        Raises:
            ValueError: layers of the plan are unknown, or layers of the model are not named; both
                are listed.
        """
        expected = tuple(names)
        known = set(expected)
        unknown = [name for name in self.scales if name not in known]
        missing = [name for name in expected if name not in self.scales]
        if unknown or missing:
            parts = []
            if unknown:
                parts.append(f"unknown layers {quoted(unknown)}")
            if missing:
                parts.append(f"layers without a scale {quoted(missing)}")
            raise ValueError(
                f"the plan does not fit the model: {'; '.join(parts)}. Make the plan from "
                "LayerMap.names of this "
                f"model with the same granularity (the model has {len(expected)} layers, the plan "
                f"{len(self.scales)})"
            )

    def memory(
        self,
        model: nn.Module,
        *,
        layers: LayerMap | None = None,
        state_dtype: torch.dtype | None = None,
        amsgrad: bool = False,
        gradients: str = "active",
        recadam: RecAdam | None = None,
    ) -> MemoryEstimate:
        """Predict the bytes of parameters, gradients and moments, beside those of full training.

        Args:
            model: the model to train; only shapes and dtypes are read, so the meta device will do.
            layers: the plan's map; None: made from the model, with the granularity that fits.
            state_dtype: of the moments, as for `LocalizedAdamW`; None: float32 for parameters in
                float32, bfloat16 and float16, float64 for float64.
            amsgrad: as for `LocalizedAdamW`: a third moment.
            gradients: "active": frozen layers have `requires_grad=False` and no gradient; "all":
                every layer has one.
            recadam: as for `LocalizedAdamW`: anchors too.

        Returns:
            A row each for the embeddings, the head and the other layers, and totals. `print` shows
            a table.

        Raises:
            ValueError: the plan does not fit the model, or an unknown `gradients` or `state_dtype`.
        """
        from gradloc.memory import estimate_memory

        return estimate_memory(
            self,
            model,
            layers=layers,
            state_dtype=state_dtype,
            amsgrad=amsgrad,
            gradients=gradients,
            recadam=recadam,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_json(
            path,
            {"policy": self.policy, "scales": dict(self.scales)},
            schema=_SCHEMA,
            version=_VERSION,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerPlan:
        """Read a plan that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a plan.
        """
        body = read_json(path, schema=_SCHEMA, version=_VERSION)
        if not isinstance(body.get("scales"), dict):
            raise ValueError(f"{os.fspath(path)!r} has no scales: it is not a whole plan file")
        return cls(scales=body["scales"], policy=str(body.get("policy", "unknown")))

    def __str__(self) -> str:
        return f"LayerPlan({len(self.active)} of {len(self.scales)} layers train; {self.policy})"

    def __reduce__(self) -> tuple[type[LayerPlan], tuple[dict[str, float], str]]:
        # A mappingproxy neither pickles nor deep-copies; the plan does.
        return LayerPlan, (dict(self.scales), self.policy)
