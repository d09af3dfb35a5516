"""Where tensors are checked and their addresses cross to the compiled module.

`NativeNorms` and `NativeAdamW` prepare a list of tensors once and then run on new gradients, on the
processor or, through `ops_cuda.py`, on a CUDA device. They hold the tensors, so that no address
outlives its memory. What can't run natively (other devices, float64, strided views) is for
`gradloc.reference`; `runs_natively` decides.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# Before the compiled module, so that both use torch's OpenMP runtime: two runtimes in one process
# fight for the cores.
import torch
from torch import Tensor

from gradloc.ops_cuda import CudaAdamW, CudaNorms, Decision, Update
from gradloc.recadam import RecAdam
from gradloc.reference import AdamWGroup
from gradloc.reference import is_dense as is_dense

try:
    from gradloc import _C
except ImportError as error:
    raise ImportError(
        f"gradloc's compiled core cannot be imported ({error}): install gradloc with pip "
        "(pip install . in a clone), for the Python that runs now"
    ) from error

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# By device type, the module whose CUDA kernels work there. None at all in a build without CUDA.
DEVICE_CORES: dict[str, Any] = {"cuda": _C} if hasattr(_C, "CudaAdamWWork") else {}


def build_info() -> dict[str, Any]:
    """How the module was built and what runs: instruction set, OpenMP, CUDA and its status."""
    return dict(_C.build_info())


def select_simd(name: str) -> None:
    """Force an instruction set of the CPU backend: 'auto', 'avx512', 'avx2' or 'plain'.

    Every one gives the same bits; this is for tests and measurements.

    Raises:
        ValueError: the build or the processor does not have it.
    """
    _C.select_simd(name)


def native_devices() -> list[str]:
    """Types of the devices on which the compiled core works in this build."""
    return sorted({"cpu", *DEVICE_CORES})


def kernel_problem(device: torch.device) -> str:
    """Why the compiled kernels cannot run on a device; empty when they can."""
    if device.type not in DEVICE_CORES:
        return "no kernels were compiled for it"
    # The emulated device of the tests is no CUDA device, and runs everything.
    return _cuda_problem(device.index or 0) if device.type == "cuda" else ""


@functools.cache
def _cuda_problem(index: int) -> str:
    return str(DEVICE_CORES["cuda"].kernel_problem(index))


def runs_natively(tensor: Tensor) -> bool:
    """Whether the compiled core can work on this tensor in place."""
    return (
        (tensor.device.type == "cpu" or kernel_problem(tensor.device) == "")
        and tensor.dtype in DTYPE_CODES
        and tensor.layout == torch.strided
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_neg()  # a lazy minus sign, which the memory does not show
        and is_dense(tensor)
    )


def _sums(num_layers: int) -> Tensor:
    """Where the core writes; on the CPU, whatever torch's default device is."""
    return torch.empty(num_layers, dtype=torch.float64, device="cpu")


class NativeNorms:
    """Per-layer sums of squares over a fixed list of tensor shapes.

    Args:
        sizes: elements of each tensor.
        layers: layer index of each tensor.
        num_layers: number of layers.
        device: where all gradients will be.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        layers: Sequence[int],
        num_layers: int,
        device: torch.device | str = "cpu",
    ) -> None:
        device = torch.device(device)
        core = DEVICE_CORES.get(device.type)
        self._engine: CudaNorms | _HostNorms
        if core is not None:
            self._engine = CudaNorms(core, sizes, layers, num_layers, device)
        else:
            self._engine = _HostNorms(sizes, layers, num_layers)

    def norm_sq(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Sums of squares by layer, float64 [num_layers]; all gradients pass `runs_natively`."""
        return self._engine.norm_sq(gradients_of(grads))


class _HostNorms:
    def __init__(self, sizes: Sequence[int], layers: Sequence[int], num_layers: int) -> None:
        self._work = _C.NormWork(list(sizes), list(layers), num_layers)
        self._num_layers = num_layers

    def norm_sq(self, gradients: Any) -> Tensor:
        out = _sums(self._num_layers)
        self._work.norm_sq(gradients, out.data_ptr(), torch.get_num_threads())
        return out


def gradients_of(grads: Sequence[Tensor | None]) -> Any:
    """Gradients as the core takes them; all pass `runs_natively` or are None."""
    grads = [None if grad is None else _with_memory(grad) for grad in grads]
    # Empty tensors have no address, and no chunks: any but that of a missing gradient will do.
    addresses = [0 if grad is None else grad.data_ptr() or 1 for grad in grads]
    codes = [0 if grad is None else DTYPE_CODES[grad.dtype] for grad in grads]
    return _C.Gradients(addresses, codes, [grad for grad in grads if grad is not None])


@dataclass(frozen=True)
class AdamWSlot:
    """One parameter that an optimizer updates, with its state."""

    param: Tensor
    exp_avg: Tensor  # same shape; float32 or bfloat16, or wider for a wider param
    exp_avg_sq: Tensor  # same shape and dtype as exp_avg
    max_exp_avg_sq: Tensor | None  # the same, with amsgrad
    step: Tensor  # float32, one element: on the device where `counts_on_device`, else on the CPU
    layer: int  # index of its layer
    group: int  # index of its param group
    tensor: int = 0  # its identity for stochastic rounding
    first_element: int = 0  # position of its first element in the full tensor, when it is a shard
    anchor: Tensor | None = None  # same shape, float32 or bfloat16 (or wider): RecAdam pulls there


def counts_on_device(param: Tensor) -> bool:
    """Whether kernels read and write a parameter's step count, so that it lies beside it."""
    return param.device.type in DEVICE_CORES


class NativeAdamW:
    """AdamW over a fixed list of parameters in one pass of the compiled core.

    Args:
        slots: the parameters, all on one device; each must pass `runs_natively`, with moments of
            the same strides, all float32 or all bfloat16; all of them have anchors or none.
        num_layers: number of layers.

    Raises:
        ValueError: a parameter's or a moment's memory was freed.
    """

    def __init__(self, slots: Sequence[AdamWSlot], num_layers: int) -> None:
        self.slots = tuple(slots)
        for slot in self.slots:
            _check_slot(slot)
        anchors = [slot.anchor for slot in slots if slot.anchor is not None]
        assert len(anchors) in (0, len(self.slots))
        self._params = [slot.param for slot in slots]
        self._strides = [param.stride() for param in self._params]
        device = slots[0].param.device if slots else torch.device("cpu")
        work = {
            "sizes": [slot.param.numel() for slot in slots],
            "layers": [slot.layer for slot in slots],
            "num_layers": num_layers,
            "params": [slot.param.data_ptr() for slot in slots],
            "param_dtypes": [DTYPE_CODES[slot.param.dtype] for slot in slots],
            "moment_dtypes": [DTYPE_CODES[slot.exp_avg.dtype] for slot in slots],
            "exp_avgs": [slot.exp_avg.data_ptr() for slot in slots],
            "exp_avg_sqs": [slot.exp_avg_sq.data_ptr() for slot in slots],
            "max_exp_avg_sqs": [
                0 if s.max_exp_avg_sq is None else s.max_exp_avg_sq.data_ptr() for s in slots
            ],
            "steps": [slot.step.data_ptr() for slot in slots],
            "groups": [slot.group for slot in slots],
            "tensor_ids": [slot.tensor for slot in slots],
            "first_elements": [slot.first_element for slot in slots],
            "anchors": [anchor.data_ptr() for anchor in anchors],
            "anchor_dtypes": [DTYPE_CODES[anchor.dtype] for anchor in anchors],
        }
        core = DEVICE_CORES.get(device.type)
        self.on_device = core is not None
        self._engine: AdamWEngine
        if core is not None:
            self._engine = CudaAdamW(core, work, len(slots), num_layers, device)
        else:
            self._engine = _HostAdamW(work)

    def gather(self, grads: Sequence[Tensor | None]) -> Any:
        """The gradients as the core takes them, copied where their memory order is another."""
        return gradients_of(
            [
                None if grad is None else _ordered(grad, slot.param, strides)
                for grad, slot, strides in zip(grads, self.slots, self._strides, strict=True)
            ]
        )

    def prepare(self, grads: Any, scales: Sequence[float]) -> None:
        """Have all ready that the next passes over these gradients need beside them."""
        self._engine.prepare(grads, scales)

    def norm_sq(
        self, grads: Any, scales: Sequence[float], decision: Decision | None = None
    ) -> Tensor:
        """Sums of squares of the gradients by layer, float64 [num_layers] on their device.

        Args:
            grads: from `gather`.
            scales: by layer, as the step will have them.
            decision: what the device decides from them (`on_device` only).
        """
        return self._engine.norm_sq(grads, scales, decision)

    def step(
        self,
        grads: Any,
        groups: Sequence[AdamWGroup],
        scales: Sequence[float],
        coef: float | Tensor,
        *,
        with_norms: bool,
        rounding_seed: int | None,
        recadam: RecAdam | None = None,
    ) -> Tensor | None:
        """Update what has a gradient; return the sums of squares by layer if asked.

        With a seed, what is stored in bfloat16 is rounded stochastically, else to nearest.

        Args:
            grads: from `gather`.
            groups: hyperparameters by param group.
            scales: by layer.
            coef: what gradients are multiplied by; or what `Decision` calls a control (`on_device`
                only).
            with_norms: whether sums of squares are wanted.
            rounding_seed: of stochastic rounding.
            recadam: settings of the pull, where the slots have anchors.
        """
        seed = None if rounding_seed is None else rounding_seed % 2**64
        norm_sq = self._engine.step(grads, Update(groups, scales, coef, with_norms, seed, recadam))
        # Backward through what was changed in place is an error; autograd has to learn of it.
        changed = self._params
        if not grads.all_present:
            changed = [p for p, present in zip(changed, grads.present, strict=True) if present]
        torch.autograd.graph.increment_version(changed)
        return norm_sq


class AdamWEngine(Protocol):
    """What runs the passes of `NativeAdamW` on one kind of device; see its methods."""

    def prepare(self, gradients: Any, scales: Sequence[float]) -> None:
        """Before the passes."""

    def norm_sq(self, gradients: Any, scales: Sequence[float], decision: Decision | None) -> Tensor:
        """Sums of squares by layer."""

    def step(self, gradients: Any, update: Update) -> Tensor | None:
        """One step."""


class _HostAdamW:
    def __init__(self, work: dict[str, Any]) -> None:
        self._work = _C.AdamWWork(**work)
        self._num_layers: int = work["num_layers"]

    def prepare(self, gradients: Any, scales: Sequence[float]) -> None:
        """Nothing is uploaded."""

    def norm_sq(self, gradients: Any, scales: Sequence[float], decision: Decision | None) -> Tensor:
        assert decision is None
        out = _sums(self._num_layers)
        self._work.norm_sq(gradients, out.data_ptr(), torch.get_num_threads())
        return out

    def step(self, gradients: Any, update: Update) -> Tensor | None:
        assert not isinstance(update.coef, Tensor)
        out = _sums(self._num_layers) if update.with_norms else None
        self._work.step(
            gradients,
            [(g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, g.maximize) for g in update.groups],
            list(update.scales),
            update.coef,
            0 if out is None else out.data_ptr(),
            update.rounding_seed,
            update.recadam_numbers,
            torch.get_num_threads(),
        )
        return out


def _check_slot(slot: AdamWSlot) -> None:
    moments = (slot.exp_avg, slot.exp_avg_sq, slot.max_exp_avg_sq)
    assert runs_natively(slot.param)
    assert all(
        m is None
        or (m.shape, m.stride(), m.dtype, m.device)
        == (slot.param.shape, slot.param.stride(), slot.exp_avg.dtype, slot.param.device)
        for m in moments
    )
    assert slot.exp_avg.dtype in (torch.float32, torch.bfloat16)
    anchor = slot.anchor
    if anchor is not None:
        assert (anchor.shape, anchor.stride()) == (slot.param.shape, slot.param.stride())
        assert anchor.device == slot.param.device
        assert anchor.dtype in (torch.float32, torch.bfloat16)
    assert slot.step.dtype == torch.float32
    assert slot.step.numel() == 1
    assert slot.step.device == (slot.param.device if counts_on_device(slot.param) else _CPU)
    kinds = ("parameter", slot.param), ("step count", slot.step), ("anchor", anchor)
    for what, tensor in (*kinds, *(("moment", m) for m in moments)):
        if tensor is not None and tensor.numel() and not tensor.data_ptr():
            raise ValueError(_no_memory(what, tensor))


def _no_memory(what: str, tensor: Tensor) -> str:
    return (
        f"a {what} of shape {tuple(tensor.shape)} has no memory (data_ptr() == 0): its storage was "
        "freed or resized to 0; bring its values back before step()"
    )


_CPU = torch.device("cpu")


def _ordered(grad: Tensor, param: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The gradient in a dtype and a memory order that the core takes, itself where it can be."""
    if grad.dtype not in DTYPE_CODES:
        grad = grad.float()
    grad = grad.resolve_neg()
    if grad.stride() != strides and not (grad.is_contiguous() and param.is_contiguous()):
        ordered = torch.empty_strided(param.shape, strides, dtype=grad.dtype, device=grad.device)
        grad = ordered.copy_(_with_memory(grad))
    return grad


def _with_memory(grad: Tensor) -> Tensor:
    """The gradient, or a copy of zeros that autograd made without giving them memory."""
    if grad.data_ptr() or not grad.numel():
        return grad
    if not grad._is_zerotensor():
        raise ValueError(_no_memory("gradient", grad))
    return grad.clone()
