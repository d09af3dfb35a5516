"""The compiled core's work on CUDA devices: tables uploaded when they change, launches, decisions.

Device memory comes from torch and is kept here, so that the core allocates nothing; launches go to
the stream that is current for the tensors' device; a work is used on one stream at a time. No call
waits for the device. The classes take the compiled module as an argument, because the tests run the
same code on an emulated device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradloc.recadam import ANNEALS, RecAdam
from gradloc.reference import AdamWGroup


class Stream(NamedTuple):
    """Where launches go."""

    device: int  # index of the device
    handle: int  # the stream, as CUDA knows it


@dataclass(frozen=True)
class Decision:
    """What turns the norm of all gradients into a step's control, on the device.

    Attributes:
        control: float32 [3] on the device: the coefficient of the gradients, whether the step is
            skipped (1), and how many were; the first two are written, the third counted up.
        max_norm: clip to this total norm; None: don't.
        skip_nonfinite: whether an infinite or NaN norm skips the step.
        found_inf: float32 [1] on the device, not 0 where GradScaler found an overflow; or None.
        grad_scale: float32 [1] on the device, GradScaler's scale, which is undone; or None.
    """

    control: Tensor
    max_norm: float | None
    skip_nonfinite: bool
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None


class Update(NamedTuple):
    """What a step does with its gradients.

    Attributes:
        groups: hyperparameters by param group.
        scales: learning-rate scales by layer.
        coef: what gradients are multiplied by, or a control (see `Decision`).
        with_norms: whether sums of squares are wanted.
        rounding_seed: of stochastic rounding, 0 to 2^64 - 1; None rounds to nearest.
        recadam: where the parameters have anchors.
    """

    groups: Sequence[AdamWGroup]
    scales: Sequence[float]
    coef: float | Tensor
    with_norms: bool
    rounding_seed: int | None
    recadam: RecAdam | None = None

    @property
    def recadam_numbers(self) -> tuple[float, float, float, int] | None:
        """RecAdam's settings as the core takes them."""
        pull = self.recadam
        if pull is None:
            return None
        return pull.gamma, pull.k, pull.t0, ANNEALS.index(pull.anneal)


def refuse_capture(device: torch.device) -> None:
    """Check that no CUDA graph is being captured, where something would be made that outlives it.

    What is filled inside a capture is filled only when the graph runs, and then every time.

    Raises:
        RuntimeError: one is.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "what CUDA graphs capture must have run before, on the same parameters, plan and "
            "dtypes: run an ordinary step before torch.cuda.graph(...), and again before each "
            "capture after set_plan() or load_state_dict(). Nothing was changed"
        )


class CudaTables:
    """What a work has in device memory: tables, scratch memory, and the addresses of a step.

    Args:
        core: the compiled module.
        work: one of its CUDA works.
        device: where the tensors are.
    """

    def __init__(self, core: Any, work: Any, device: torch.device) -> None:
        refuse_capture(device)
        self._core = core
        self._work = work
        self._device = device
        self._on_cuda = device.type == "cuda"  # not so on the emulated device
        self._written = False
        self._scales: Sequence[float] | None = None  # that were written; never changed in place
        # Zeros, because the counters among it count from 0.
        self._scratch = torch.zeros(work.scratch_bytes, dtype=torch.uint8, device=device)
        self._tables = torch.empty(work.table_bytes, dtype=torch.uint8, device=device)
        self._streams: set[int] = set()  # on which the memory was used
        # Host memory for a capture to come, by use and bytes.
        self._spare: dict[tuple[str, int], Tensor] = {}
        self._captured: list[Tensor] = []  # host memory that captured graphs copy from

    def stream(self) -> Stream:
        """The current stream of the device."""
        if not self._on_cuda:
            return Stream(0, 0)
        assert self._device.index is not None
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream not in self._streams:
            # Freed while a stream that did not allocate them still reads them, they would be reused
            # too early.
            self._tables.record_stream(stream)
            self._scratch.record_stream(stream)
            self._streams.add(stream.cuda_stream)
        return Stream(self._device.index, stream.cuda_stream)

    def addresses(self, gradients: Any, scales: Sequence[float] | None = None) -> tuple[int, int]:
        """Addresses of tables and scratch memory, after an upload if what is in them is new.

        Args:
            gradients: of the dtypes that the tables are to know.
            scales: by layer, where the work takes them.

        Raises:
            RuntimeError: an upload would be needed while a CUDA graph is captured.
        """
        same_scales = scales is self._scales or scales == self._scales
        if not (self._written and same_scales and self._work.written_for(gradients)):
            refuse_capture(self._device)
            host = self._host(self._tables.numel())
            self._written = False  # until all of what follows went well
            contents = (gradients,) if scales is None else (gradients, list(scales))
            self._work.write_tables(host.data_ptr(), *contents)
            self._tables.copy_(host, non_blocking=True)
            self._scales, self._written = scales, True
        return self._tables.data_ptr(), self._scratch.data_ptr()

    def table_of_gradients(self, launch: str, gradients: Any, count: int) -> Tensor | None:
        """Gradient addresses in device memory; None where they fit into a launch's parameters."""
        if count <= self._core.MAX_INLINE_TENSORS:
            return None
        return self._uploaded(launch, 8 * count, self._core.write_gradients, gradients)

    def table_of_groups(self, groups: list[tuple[Any, ...]]) -> Tensor | None:
        """Param groups in device memory; None where they fit into a launch's parameters."""
        if len(groups) <= self._core.MAX_INLINE_GROUPS:
            return None
        num_bytes = self._core.GROUP_BYTES * len(groups)
        return self._uploaded("groups", num_bytes, self._core.write_groups, groups)

    def _uploaded(
        self, use: str, num_bytes: int, write: Callable[[int, Any], None], what: Any
    ) -> Tensor:
        """Host memory that `write` fills, on the device."""
        key = use, num_bytes
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            # Pinned memory is not to be had inside a capture, and a replay copies from it again.
            if key not in self._spare:
                refuse_capture(self._device)
            host = self._spare.pop(key)
            self._captured.append(host)
        else:
            host = self._host(num_bytes)
            if self._on_cuda and key not in self._spare:
                self._spare[key] = self._host(num_bytes)
        write(host.data_ptr(), what)
        # From pinned memory, which torch does not hand out again before the copy is done.
        return host.to(self._device, non_blocking=True)

    def _host(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._on_cuda)


class CudaNorms:
    """Per-layer sums of squares over a fixed list of tensor shapes on one device.

    Args:
        core: the compiled module.
        sizes: elements of each tensor.
        layers: layer index of each tensor.
        num_layers: number of layers.
        device: where the gradients will be.
    """

    def __init__(
        self,
        core: Any,
        sizes: Sequence[int],
        layers: Sequence[int],
        num_layers: int,
        device: torch.device,
    ) -> None:
        self._work = core.CudaNormWork(list(sizes), list(layers), num_layers)
        self._tables = CudaTables(core, self._work, device)
        self._count = len(sizes)
        self._sums = _Sums(num_layers, device)

    def norm_sq(self, gradients: Any) -> Tensor:
        """Sums of squares by layer, float64 [num_layers] on the device. One launch."""
        out = self._sums.new()
        addresses = self._tables.addresses(gradients)
        table = self._tables.table_of_gradients("norms", gradients, self._count)
        self._work.norm_sq(
            *addresses, gradients, _address(table), out.data_ptr(), *self._tables.stream()
        )
        return out


class CudaAdamW:
    """AdamW over a fixed list of parameters on one device, in one launch.

    Args:
        core: the compiled module.
        work: what its CudaAdamWWork is made from.
        count: number of tensors.
        num_layers: number of layers.
        device: where the tensors are.
    """

    def __init__(
        self, core: Any, work: dict[str, Any], count: int, num_layers: int, device: torch.device
    ) -> None:
        self._work = core.CudaAdamWWork(**work)
        self._device = device
        self._tables = CudaTables(core, self._work, device)
        self._count = count
        self._sums = _Sums(num_layers, device)

    def prepare(self, gradients: Any, scales: Sequence[float]) -> None:
        """Upload what the next launches read beside these gradients, so that they cannot fail."""
        self._tables.addresses(gradients, scales)

    def norm_sq(self, gradients: Any, scales: Sequence[float], decision: Decision | None) -> Tensor:
        """Sums of squares by layer, float64 [num_layers]; with a decision also what follows."""
        out = self._sums.new()
        addresses = self._tables.addresses(gradients, scales)
        table = self._tables.table_of_gradients("norms", gradients, self._count)
        max_norm = None if decision is None else decision.max_norm
        self._work.norm_sq(
            *addresses,
            gradients,
            _address(table),
            out.data_ptr(),
            0 if decision is None else decision.control.data_ptr(),
            -1.0 if max_norm is None else max_norm,
            decision is not None and decision.skip_nonfinite,
            _address(None if decision is None else decision.found_inf),
            _address(None if decision is None else decision.grad_scale),
            *self._tables.stream(),
        )
        return out

    def step(self, gradients: Any, update: Update) -> Tensor | None:
        """Update what has a gradient; return the sums of squares by layer if asked. One launch."""
        out = self._sums.new() if update.with_norms else None
        addresses = self._tables.addresses(gradients, update.scales)
        lrs = [self._lr(group.lr_tensor) for group in update.groups]
        tuples = [
            (g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, g.maximize, _address(lr))
            for g, lr in zip(update.groups, lrs, strict=True)
        ]
        table = self._tables.table_of_gradients("step", gradients, self._count)
        group_table = self._tables.table_of_groups(tuples)
        coef = update.coef
        self._work.step(
            *addresses,
            gradients,
            _address(table),
            tuples,
            _address(group_table),
            coef.data_ptr() if isinstance(coef, Tensor) else 0,
            1.0 if isinstance(coef, Tensor) else coef,
            _address(out),
            update.rounding_seed,
            update.recadam_numbers,
            *self._tables.stream(),
        )
        return out

    def _lr(self, lr: Tensor | None) -> Tensor | None:
        if lr is None:
            return None
        return lr.reshape(()).to(self._device, torch.float32, non_blocking=True)


class _Sums:
    """Where launches write sums of squares."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._num_layers = num_layers
        self._device = device

    def new(self) -> Tensor:
        return torch.empty(self._num_layers, dtype=torch.float64, device=self._device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
