"""Notices between two steps whether an optimizer's tensors were exchanged, and collects gradients.

Answers only yes, no, or None for "look yourself": what is wrong with a gradient, and what to do
when a tensor was exchanged, is for `optim_work.py`. The compiled class asks torch's C interface;
the class in Python, many times as slow, serves where torch cannot be asked that way.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gradloc import _C  # after torch, as in ops.py
from gradloc.ops import DTYPE_CODES

_FUNCTIONS = (
    "aoti_torch_get_layout",
    "aoti_torch_get_device_type",
    "aoti_torch_get_device_index",
    "aoti_torch_get_dtype",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_data_ptr",
    "aoti_torch_is_defined",
    "aoti_torch_new_uninitialized_tensor",
    "aoti_torch_assign_tensors",
    "aoti_torch_delete_tensor_object",
)
# What the C interface does not have: at::native::is_neg(at::Tensor const&), which gives a bool, and
# c10::TensorImpl::grad() const, which gives an at::Tensor const&. A C++ name does not say what the
# function gives, so these are for the versions of which that is known; the others ask Python
# objects, which takes a few times as long.
_IS_NEG = "_ZN2at6native6is_negERKNS_6TensorE"
_GRAD = "_ZNK3c1010TensorImpl4gradEv"
_KNOWN_TO = (2, 13)
_CODES = {
    "strided": "aoti_torch_layout_strided",
    "cpu": "aoti_torch_device_type_cpu",
    "cuda": "aoti_torch_device_type_cuda",
    "float32": "aoti_torch_dtype_float32",
    "bfloat16": "aoti_torch_dtype_bfloat16",
    "float16": "aoti_torch_dtype_float16",
}


class Watch(Protocol):
    """What `watch` gives."""

    def remember(self, parts: Sequence[Sequence[int]]) -> bool:
        """Take the present state as the one to compare with.

        Remembered are, by identity: the groups, their parameters and the values of `amsgrad` and
        `fused`, the state's keys and values; and of active parameters and their state the addresses
        too, of the parameters also shape, strides, dtype and device.

        Args:
            parts: which active parameters' gradients belong together, by their positions.

        Returns:
            False when it holds something that cannot be watched, such as a sharded parameter;
            `unchanged` says no then.
        """

    def unchanged(self) -> bool:
        """Whether all is as it was remembered; no when in doubt."""

    def gradients(self) -> list[_C.Gradients] | None:
        """The gradients of each part, to be called after `unchanged` or `remember` has said yes.

        None when a gradient is not an ordinary one: another shape, device or memory order than its
        parameter's, another dtype than those of the core, sparse, of a subclass, with a lazy minus
        sign, without memory, or that of a parameter which is in no part.
        """

    @property
    def layers_with_grad(self) -> frozenset[int]:
        """Layers of which the last `gradients` found one."""


def watch(
    groups: Sequence[dict[str, Any]],
    states: MutableMapping[Tensor, dict[str, Any]],
    active: Sequence[Tensor],
    layers: Sequence[int],
) -> Watch:
    """A watch over an optimizer.

    Args:
        groups: its param groups, the list itself.
        states: its state, the dict itself.
        active: the parameters of which gradients are collected.
        layers: the index of the layer of each of them.
    """
    interface = torch_interface()
    if interface is not None and isinstance(groups, list) and isinstance(states, dict):
        return _C.TensorWatch(interface, groups, states, list(active), list(layers))
    return PlainWatch(groups, states, active, layers)


class PlainWatch:
    """The same in Python, for a torch that cannot be asked in another way."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        states: MutableMapping[Tensor, dict[str, Any]],
        active: Sequence[Tensor],
        layers: Sequence[int],
    ) -> None:
        self._groups = groups
        self._states = states
        self._active = list(active)
        self._layers = list(layers)
        self._ids = {id(param) for param in self._active}
        self._sizes: list[int] = []
        self._slots: dict[int, tuple[int, int]] = {}  # active parameter -> part, position in it
        self._objects: list[Any] | None = None
        self._views: list[Any] = []
        self.layers_with_grad: frozenset[int] = frozenset()

    def remember(self, parts: Sequence[Sequence[int]]) -> bool:
        """Take the present state as the one to compare with."""
        self._sizes = [len(part) for part in parts]
        self._slots = {
            member: (at, position)
            for at, part in enumerate(parts)
            for position, member in enumerate(part)
        }
        assert len(self._slots) == sum(self._sizes), f"parts={parts} overlap"
        self._objects, self._views = self._now()
        # An ordinary parameter's view ends with what `gradients` compares; None: not ordinary.
        if None in self._views or any(p.dtype not in DTYPE_CODES for p in self._active):
            self._objects = None
        return self._objects is not None

    def unchanged(self) -> bool:
        """Whether all is as it was remembered; no when in doubt."""
        if self._objects is None:
            return False
        objects, views = self._now()
        return (
            views == self._views
            and len(objects) == len(self._objects)
            and all(now is then for now, then in zip(objects, self._objects, strict=True))
        )

    def gradients(self) -> list[_C.Gradients] | None:
        """The gradients of each part, or None when one of them is not ordinary."""
        if self._objects is None:
            return None
        kept: list[list[Tensor]] = [[] for _ in self._sizes]
        addresses = [[0] * size for size in self._sizes]
        codes = [[0] * size for size in self._sizes]
        for member, param in enumerate(self._active):
            grad = param.grad
            if grad is None:
                continue
            if member not in self._slots or not _fits(grad, param):
                return None
            part, at = self._slots[member]
            kept[part].append(grad)
            addresses[part][at] = grad.data_ptr() or 1  # empty: any address but "no gradient"
            codes[part][at] = DTYPE_CODES[grad.dtype]
        self.layers_with_grad = frozenset(
            self._layers[member]
            for member, (part, at) in self._slots.items()
            if addresses[part][at]
        )
        return [_C.Gradients(*part) for part in zip(addresses, codes, kept, strict=True)]

    def _now(self) -> tuple[list[Any], list[Any]]:
        """Objects whose identity counts, and values; a None among these: not ordinary."""
        objects: list[Any] = []
        for group in self._groups:
            objects += (group, *(group.get(key, self) for key in ("params", "amsgrad", "fused")))
            objects += group["params"]
        views: list[Any] = [_view(param) for param in self._active]
        for param, state in self._states.items():
            objects += (param, state)
            if id(param) in self._ids:
                for key, value in state.items():
                    objects += (key, value)
                    if type(value) in (Tensor, torch.nn.Parameter):
                        views.append(value.data_ptr() if _has_address(value) else None)
        return objects, views


def _view(tensor: Tensor) -> tuple[Any, ...] | None:
    """Address, dtype, device, shape and strides of an ordinary tensor."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and _has_address(tensor)
    if not plain or tensor.is_neg():  # a lazy minus sign, which the memory does not show
        return None
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _has_address(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type in ("cpu", "cuda")


def _fits(grad: Tensor, param: Tensor) -> bool:
    view = _view(grad)
    return (
        view is not None
        and grad.dtype in DTYPE_CODES
        and grad.device == param.device
        and grad.shape == param.shape
        and (grad.stride() == param.stride() or (grad.is_contiguous() and param.is_contiguous()))
        and not (grad.numel() and not grad.data_ptr())
    )


@functools.cache
def torch_interface() -> _C.TorchInterface | None:
    """The C interface of torch, for the compiled classes; None where it is not the one we know."""
    try:
        library, base = _loaded("libtorch_cpu.so"), _loaded("libc10.so")
        functions = {name: _address(getattr(library, name)) for name in _FUNCTIONS}
        codes = {name: int(getattr(library, function)()) for name, function in _CODES.items()}
        allocate = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
        take_back = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr
    except (OSError, AttributeError):
        return None
    functions |= {"is_neg": 0, "grad": 0}
    known = tuple(map(int, torch.__version__.split(".")[:2])) <= _KNOWN_TO
    if known and hasattr(library, _IS_NEG) and hasattr(base, _GRAD):
        functions["is_neg"] = _address(getattr(library, _IS_NEG))
        functions["grad"] = _address(getattr(base, _GRAD))
    tensor = torch.zeros(1, device="cpu")
    (handle,) = allocate([tensor])
    try:
        interface = _C.TorchInterface(functions, codes, tensor, handle, torch.nn.Parameter)
    except RuntimeError:
        return None
    finally:
        take_back(handle)
    return interface if _reads_rightly(interface) else None


def _loaded(library: str) -> ctypes.CDLL:
    """What is loaded already: another torch would not know this one's tensors."""
    return ctypes.CDLL(library, mode=os.RTLD_LAZY | os.RTLD_NOLOAD)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _reads_rightly(interface: _C.TorchInterface) -> bool:
    """Whether it sees the same as Python, in tensors of every kind that matters."""
    whole = torch.zeros(3, 4, device="cpu")
    kinds = [whole, whole[1:, ::2], whole.t(), torch.nn.Parameter(whole), torch._neg_view(whole)]
    kinds += [whole.to(dtype) for dtype in (*DTYPE_CODES, torch.float64, torch.int64)]
    params = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in kinds[:-1]]
    for param, tensor in zip(params, kinds, strict=False):
        param.grad = tensor
    return (
        all(interface.describe(tensor) == _description(tensor) for tensor in kinds)
        and all(interface.describe_grad(param) == _description(param.grad) for param in params)
        and interface.describe_grad(whole) is None
        and interface.describe_grad(torch.nn.Parameter(whole)) is None
    )


def _description(tensor: Tensor | None) -> tuple[Any, ...]:
    assert tensor is not None
    return (
        tensor.data_ptr(),
        tuple(tensor.shape),
        tensor.stride(),
        DTYPE_CODES.get(tensor.dtype, -1),
        tensor.device.type,
        tensor.is_neg(),
    )
