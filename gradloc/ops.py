"""The only file that calls the compiled module: tensors are checked and addresses cross here.

`NativeNorms` and `NativeAdamW` prepare a list of tensors once and then run on new gradients. They
hold the tensors, so that no address outlives its memory. What can't run natively (other devices,
float64, strided views) is for `gradloc.reference`; `runs_natively` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Before the compiled module, so that both use torch's OpenMP runtime: two runtimes in one process
# fight for the cores.
import torch
from torch import Tensor

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


def runs_natively(tensor: Tensor) -> bool:
    """Whether the compiled core can work on this tensor in place."""
    return (
        tensor.device.type == "cpu"
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
    """

    def __init__(self, sizes: Sequence[int], layers: Sequence[int], num_layers: int) -> None:
        self._work = _C.NormWork(list(sizes), list(layers), num_layers)
        self._num_layers = num_layers

    def norm_sq(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Sums of squares by layer, float64 [num_layers]; all gradients pass `runs_natively`."""
        out = _sums(self._num_layers)
        addresses = [0 if g is None else g.data_ptr() for g in grads]
        codes = [0 if g is None else DTYPE_CODES[g.dtype] for g in grads]
        self._work.norm_sq(addresses, codes, out.data_ptr(), torch.get_num_threads())
        return out


@dataclass(frozen=True)
class AdamWSlot:
    """One parameter that an optimizer updates, with its state."""

    param: Tensor
    exp_avg: Tensor  # same shape; float32 or bfloat16, or wider for a wider param
    exp_avg_sq: Tensor  # same shape and dtype as exp_avg
    max_exp_avg_sq: Tensor | None  # the same, with amsgrad
    step: Tensor  # float32, one element on the CPU
    layer: int  # index of its layer
    group: int  # index of its param group
    tensor: int = 0  # its identity for stochastic rounding
    first_element: int = 0  # position of its first element in the full tensor, when it is a shard


class NativeAdamW:
    """AdamW over a fixed list of parameters in one pass of the compiled core.

    Args:
        slots: the parameters; each must pass `runs_natively`, with moments of the same strides, all
            float32 or all bfloat16.
        num_layers: number of layers.
    """

    def __init__(self, slots: Sequence[AdamWSlot], num_layers: int) -> None:
        self.slots = tuple(slots)
        for slot in self.slots:
            moments = (slot.exp_avg, slot.exp_avg_sq, slot.max_exp_avg_sq)
            assert runs_natively(slot.param)
            assert all(
                m is None
                or (m.shape, m.stride(), m.dtype, m.device)
                == (slot.param.shape, slot.param.stride(), slot.exp_avg.dtype, slot.param.device)
                for m in moments
            )
            assert slot.exp_avg.dtype in (torch.float32, torch.bfloat16)
            assert slot.step.dtype == torch.float32
            assert slot.step.numel() == 1
        self._strides = [slot.param.stride() for slot in slots]
        self._num_layers = num_layers
        self._work = _C.AdamWWork(
            sizes=[slot.param.numel() for slot in slots],
            layers=[slot.layer for slot in slots],
            num_layers=num_layers,
            params=[slot.param.data_ptr() for slot in slots],
            param_dtypes=[DTYPE_CODES[slot.param.dtype] for slot in slots],
            moment_dtypes=[DTYPE_CODES[slot.exp_avg.dtype] for slot in slots],
            exp_avgs=[slot.exp_avg.data_ptr() for slot in slots],
            exp_avg_sqs=[slot.exp_avg_sq.data_ptr() for slot in slots],
            max_exp_avg_sqs=[
                0 if s.max_exp_avg_sq is None else s.max_exp_avg_sq.data_ptr() for s in slots
            ],
            steps=[slot.step.data_ptr() for slot in slots],
            groups=[slot.group for slot in slots],
            tensor_ids=[slot.tensor for slot in slots],
            first_elements=[slot.first_element for slot in slots],
        )

    def gather(self, grads: Sequence[Tensor | None]) -> NativeGrads:
        """Addresses of the gradients, copied where their memory order is not the parameter's."""
        kept: list[Tensor | None] = []
        addresses, codes = [], []
        for grad, slot, strides in zip(grads, self.slots, self._strides, strict=True):
            if grad is None:
                kept.append(None)
                addresses.append(0)
                codes.append(0)
                continue
            if grad.dtype not in DTYPE_CODES:
                grad = grad.float()
            grad = grad.resolve_neg()
            if grad.stride() != strides and not (
                grad.is_contiguous() and slot.param.is_contiguous()
            ):
                ordered = torch.empty_strided(
                    slot.param.shape, strides, dtype=grad.dtype, device=grad.device
                )
                grad = ordered.copy_(grad)
            if grad.numel() and not grad.data_ptr():
                grad = grad.clone()  # zeros that autograd made without giving them memory
            kept.append(grad)
            addresses.append(grad.data_ptr() or 1)  # empty tensors have no address, and no chunks
            codes.append(DTYPE_CODES[grad.dtype])
        return NativeGrads(kept, addresses, codes)

    def norm_sq(self, grads: NativeGrads) -> Tensor:
        """Sums of squares of the gradients by layer, float64 [num_layers]."""
        out = _sums(self._num_layers)
        self._work.norm_sq(grads.addresses, grads.codes, out.data_ptr(), torch.get_num_threads())
        return out

    def step(
        self,
        grads: NativeGrads,
        groups: Sequence[AdamWGroup],
        scales: Sequence[float],
        clip_coef: float,
        *,
        with_norms: bool,
        rounding_seed: int | None,
    ) -> Tensor | None:
        """Update what has a gradient; return the sums of squares by layer if asked.

        With a seed, what is stored in bfloat16 is rounded stochastically, else to nearest.
        """
        out = _sums(self._num_layers) if with_norms else None
        self._work.step(
            grads.addresses,
            grads.codes,
            [(g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, g.maximize) for g in groups],
            list(scales),
            clip_coef,
            0 if out is None else out.data_ptr(),
            None if rounding_seed is None else rounding_seed % 2**64,
            torch.get_num_threads(),
        )
        # Backward through what was changed in place is an error; autograd has to learn of it.
        torch.autograd.graph.increment_version(
            [slot.param for slot, at in zip(self.slots, grads.addresses, strict=True) if at]
        )
        return out


@dataclass(frozen=True)
class NativeGrads:
    """Gradients of one step, kept alive with their addresses."""

    tensors: list[Tensor | None]
    addresses: list[int]  # 0: no gradient
    codes: list[int]  # DTYPE_CODES
