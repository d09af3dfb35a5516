"""What a GPU visit compares: gradloc, torch, apex, bitsandbytes, and a copy of the same bytes.

A version is something to run with the bytes that it must move. All of a case work on the same
parameters and gradients, and those whose moments have one dtype share them. Nothing is timed here.

Bytes that must move for an active element: norms read the gradient; a step reads gradient,
parameter and two moments and writes parameter and moments; clipping before it reads the gradient
once more (torch, which rewrites it, reads it once more and writes it).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from adamw import MAX_NORM, OPTIONS, bytes_an_element
from model_shapes import SHARES, Shapes, num_elements, plan_of_share

from gradloc import LocalizedAdamW, layer_grad_norms

COPY = "copy of the same bytes"
OURS = "gradloc"
_MOST_COPY_BYTES = 4 << 30  # read and written together; far beyond any L2, and fits beside the rest
_SPARE_BYTES = 1 << 30


@dataclass(frozen=True)
class Version:
    """One thing to time."""

    op: str  # "norms", "step", "clip+step"
    by: str
    share: float  # asked for, of the elements
    active: float  # true share
    moments: str  # dtype of the moments, "" without
    moved_bytes: int
    run: Callable[[], Any]

    @property
    def key(self) -> str:
        """A name that no other version of the case has."""
        return f"{self.op}, {self.by} {self.moments} @ {self.share:.0%}"


def short(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def free_bytes(device: torch.device) -> float:
    """What can still be allocated; on a CPU no limit."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached


def bytes_of_case(model: str, dtype: torch.dtype) -> int:
    """What a case holds at least: parameters, gradients, moments of their dtype, copies."""
    width = torch.empty((), dtype=dtype).element_size()
    return num_elements(model) * 4 * width + _MOST_COPY_BYTES + _SPARE_BYTES


class Case:
    """A model in a dtype on a device, and the versions that work on it.

    Attributes:
        versions: what there is to time.
        left_out: what is not among them, and why.
    """

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.versions: list[Version] = []
        self.left_out: list[str] = []
        self._width = torch.empty((), dtype=dtype).element_size()
        self._shapes = Shapes(model, dtype, device=device)
        self._layers = self._shapes.layer_map()
        self._count = num_elements(model)
        # Moments of the parameters' dtype, as torch's are, and gradloc's own default beside them.
        self._states: dict[torch.dtype, Any] = {dtype: defaultdict(dict)}
        self._add_norms()
        for share in SHARES:
            self._add_localized(share, dtype)
        self._add_torch()
        if dtype != torch.float32:
            self._add_other_moments()
        self._add_others()
        self._add_copies()

    def _add(
        self,
        op: str,
        by: str,
        run: Callable[[], Any],
        an_element: int,
        *,
        share: float = 1.0,
        active: float = 1.0,
        moments: torch.dtype | None = None,
    ) -> None:
        moved = round(active * self._count) * an_element
        name = "" if moments is None else short(moments)
        self.versions.append(Version(op, by, share, active, name, moved, run))

    def _fits(self, needed: float, what: str) -> bool:
        room = free_bytes(self.device) - _MOST_COPY_BYTES - _SPARE_BYTES
        if needed > room:
            self.left_out.append(
                f"{self.model} {short(self.dtype)}, {what}: needs {needed / 1e9:.1f} GB, "
                f"{max(room, 0) / 1e9:.1f} GB left"
            )
        return needed <= room

    def _add_norms(self) -> None:
        grads = [parameter.grad for parameter in self._shapes.parameters()]
        self._add("norms", OURS, lambda: layer_grad_norms(self._shapes, self._layers), self._width)
        self._add("norms", "torch._foreach_norm", lambda: torch._foreach_norm(grads), self._width)
        total = torch.nn.utils.get_total_norm
        self._add("norms", "torch total norm", lambda: total(grads), self._width)

    def _localized(self, dtype: torch.dtype, share: float = 1.0, **options: Any) -> LocalizedAdamW:
        """Ours, on the moments of that dtype; fused=True: never plain torch by mistake."""
        plan, _ = plan_of_share(self._layers, share)
        optimizer = LocalizedAdamW(
            list(self._shapes.named_parameters()),
            **OPTIONS,
            fused=True,
            layers=self._layers,
            plan=plan,
            state_dtype=dtype,
            **options,
        )
        optimizer.state = self._states[dtype]
        return optimizer

    def _add_localized(self, share: float, dtype: torch.dtype) -> None:
        size = torch.empty((), dtype=dtype).element_size()
        _, active = plan_of_share(self._layers, share)
        about: dict[str, Any] = {"share": share, "active": active, "moments": dtype}
        clipping = self._localized(dtype, share, max_grad_norm=MAX_NORM)
        moved = bytes_an_element(self._width, size, ours=True, clip=True)
        self._add("clip+step", OURS, clipping.step, moved, **about)
        plain = self._localized(dtype, share)
        moved = bytes_an_element(self._width, size, ours=True, clip=False)
        self._add("step", OURS, plain.step, moved, **about)
        plain.step()  # makes the moments, which the others of this dtype share

    def _add_torch(self) -> None:
        moments = self._states[self.dtype]
        width = self._width
        for kind in ("fused", "foreach"):
            # foreach holds a tensor as large as the parameters for a while.
            if kind == "foreach" and not self._fits(self._count * width, "torch foreach"):
                continue
            step_device = self.device if kind == "fused" else torch.device("cpu")
            states = {
                parameter: {
                    "step": torch.ones((), dtype=torch.float32, device=step_device),
                    "exp_avg": moments[parameter]["exp_avg"],
                    "exp_avg_sq": moments[parameter]["exp_avg_sq"],
                }
                for parameter in self._shapes.parameters()
            }
            for share in SHARES if kind == "fused" else (1.0,):
                plan, active = plan_of_share(self._layers, share)
                chosen = set(plan.active)
                params = [
                    parameter
                    for _, parameter, layer in self._layers.parameters(self._shapes)
                    if self._layers.names[layer] in chosen
                ]
                optimizer = torch.optim.AdamW(params, **OPTIONS, **{kind: True})
                optimizer.state = defaultdict(dict, states)
                self._add_with_clip(f"torch {kind}", optimizer, params, share, active, self.dtype)

    def _add_with_clip(
        self, by: str, optimizer: Any, params: Any, share: float, active: float, dtype: torch.dtype
    ) -> None:
        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
            optimizer.step()

        size = torch.empty((), dtype=dtype).element_size()
        about: dict[str, Any] = {"share": share, "active": active, "moments": dtype}
        moved = bytes_an_element(self._width, size, ours=False, clip=True)
        self._add("clip+step", f"clip_grad_norm_ + {by}", clip_and_step, moved, **about)
        if share == 1.0:
            moved = bytes_an_element(self._width, size, ours=False, clip=False)
            self._add("step", by, optimizer.step, moved, **about)

    def _add_other_moments(self) -> None:
        """What torch does not offer: stochastic rounding, and float32 moments of a narrow model."""
        rounded = self._localized(self.dtype, stochastic_rounding=True)
        moved = bytes_an_element(self._width, self._width, ours=True, clip=False)
        by = f"{OURS}, stochastic rounding"
        self._add("step", by, rounded.step, moved, moments=self.dtype)
        if self._fits(self._count * 8, "gradloc with float32 moments"):
            self._states[torch.float32] = defaultdict(dict)
            self._add_localized(1.0, torch.float32)

    def _add_others(self) -> None:
        """Apex and bitsandbytes, where they are installed; both make moments of their own."""
        params = list(self._shapes.parameters())
        for module, name, by, size in (
            ("apex.optimizers", "FusedAdam", "apex FusedAdam", 4),
            ("bitsandbytes.optim", "AdamW", "bitsandbytes AdamW", 4),
            ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes AdamW8bit", 1),
        ):
            if self.device.type != "cuda" or not importlib.util.find_spec(module.split(".")[0]):
                self.left_out.append(f"{by}: not installed, or no CUDA device")
                continue
            if not self._fits(self._count * 2 * size, by):
                continue
            try:
                optimizer = getattr(importlib.import_module(module), name)(params, **OPTIONS)
            except (ImportError, OSError, RuntimeError, AttributeError) as error:
                self.left_out.append(f"{by}: installed, but {error}")
                continue
            dtype = torch.float32 if size == 4 else torch.uint8
            self._add_with_clip(by, optimizer, params, 1.0, 1.0, dtype)

    def _add_copies(self) -> None:
        """For each of ours a copy that moves as many bytes, read and written, up to a limit."""
        largest = max(v.moved_bytes for v in self.versions if v.by == OURS)
        source = torch.empty(
            min(largest, _MOST_COPY_BYTES) // 8, dtype=torch.float32, device=self.device
        ).normal_()
        target = torch.empty_like(source)
        for version in [v for v in self.versions if v.by == OURS]:
            length = min(version.moved_bytes // 8, source.numel())
            here, there = source[:length], target[:length]
            self.versions.append(
                Version(
                    version.op,
                    COPY,
                    version.share,
                    version.active,
                    version.moments,
                    8 * length,
                    lambda here=here, there=there: there.copy_(here),
                )
            )
