"""The devices on which tests run CUDA kernels: the emulated one, and a GPU where there is one.

Both are used through gradloc's own classes, as `cpu` tensors on the emulated device. Here are
tensors on them and comparisons with the CPU core; the fixture `device` (conftest.py) chooses.
"""

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import emulator_build
import pytest
import torch
from numerics import ULP, assert_same_bits, assert_within, tensors_of
from torch import Tensor

from gradloc import ops
from gradloc.ops import AdamWSlot


@functools.cache
def emulated_core() -> ModuleType:
    """The core compiled for the emulator, loaded once in a process."""
    return emulator_build.load(emulator_build.build())


class Device:
    """What the tests need of a device.

    Attributes:
        torch_device: where its tensors are.
        exact: whether the CPU core's bits are expected: without fused multiply-add they are.
    """

    torch_device: torch.device
    exact: bool

    def to(self, tensor: Tensor) -> Tensor:
        """A copy on the device, in the same memory order."""
        return tensor.detach().to(self.torch_device, copy=True)

    def slot(self, slot: AdamWSlot, place: Callable[[Tensor], Tensor] | None = None) -> AdamWSlot:
        """A copy on the device; `place` decides where its arrays lie."""
        moved = {name: self.to(tensor) for name, tensor in tensors_of(slot).items()}
        if slot.anchor is not None:
            moved["anchor"] = self.to(slot.anchor)
        if place is not None:
            moved |= {name: place(moved[name]) for name in moved if name != "step"}
        return dataclasses.replace(slot, **moved)

    def set_seed(self, seed: int) -> None:
        """Other orders of blocks and threads, where they can be chosen."""

    @contextlib.contextmanager
    def host(self) -> Iterator[None]:
        """In it, CPU tensors are the CPU core's."""
        yield

    def launches(self, run: Callable[[], Any]) -> list[str]:
        """The kernels that a function launches; skips the test where they cannot be seen."""
        raise NotImplementedError

    def check_slot(self, ours: AdamWSlot, host: AdamWSlot, what: str = "") -> None:
        """Everything that a step changed is as the CPU core made it, see `check`."""
        for name, expected in tensors_of(host).items():
            self.check(tensors_of(ours)[name], expected, f"{what} {name}", step=name == "step")

    def check(
        self, ours: Tensor, host: Tensor, what: str, *, step: bool = False, ulps: float = 4
    ) -> None:
        """The CPU core's bits; up to fused multiply-adds where the device has them.

        Such an operation leaves out one of two roundings: a value differs by a few ulps of the
        largest operand, which in these tests is of size 1 or smaller than the result. Rounded to 16
        bits afterwards it rarely becomes the neighbour of what it would have been.
        """
        ours, host = ours.detach().cpu(), host.detach()
        if self.exact or step:
            assert_same_bits(ours, host, what)
            return
        if ours.dtype == torch.float32:
            assert_within(ours, host, ulps * ULP * (host.abs() + 1), what)
            return
        info = torch.finfo(ours.dtype)
        place = info.eps * host.float().abs() + info.smallest_normal * info.eps
        assert_within(ours, host, place, what)
        num_other = int((ours != host).sum())
        assert num_other <= 2 + ours.numel() // 50, f"{what}: {num_other} elements differ"


class EmulatedDevice(Device):
    """CUDA kernels compiled as C++, on CPU tensors; `core` has the emulator's controls too."""

    torch_device = torch.device("cpu")
    exact = True

    def __init__(self, core: ModuleType) -> None:
        self.core = core

    def set_seed(self, seed: int) -> None:
        self.core.set_seed(seed)

    @contextlib.contextmanager
    def host(self) -> Iterator[None]:
        del ops.DEVICE_CORES["cpu"]
        try:
            yield
        finally:
            ops.DEVICE_CORES["cpu"] = self.core

    def launches(self, run: Callable[[], Any]) -> list[str]:
        self.core.clear_launches()
        run()
        return [_short(launch.kernel) for launch in self.core.launches()]


class CudaDevice(Device):
    """The first GPU."""

    torch_device = torch.device("cuda", 0)
    exact = False

    def launches(self, run: Callable[[], Any]) -> list[str]:
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some versions speak of cycles, of which there is one
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            ) as profile:
                run()
                torch.cuda.synchronize()
            names = [
                event.name
                for event in sorted(profile.events(), key=lambda event: event.time_range.start)
                if event.device_type == torch.autograd.DeviceType.CUDA
                and not event.name.startswith(("Memcpy", "Memset"))
            ]
        if not names:
            pytest.skip("torch.profiler sees no kernels here")
        return [_short(name) for name in names]


def _short(kernel: str) -> str:
    """The name without namespace, template arguments and parameters; others' kernels in full."""
    found = re.search(r"gradloc::cuda::(\w+)", kernel)
    return found[1] if found else kernel


def embedded(values: Tensor, before: int) -> Tensor:
    """A copy that is a slice of a larger buffer, `before` elements into it, NaN on both sides.

    What is read beyond the slice shows as NaN in sums; `guards_intact` says whether something was
    written there. Buffers begin at multiples of 64 bytes.
    """
    size = values.numel() + before + 32
    buffer = torch.full((size,), torch.nan, dtype=values.dtype, device=values.device)
    part = buffer[before : before + values.numel()]
    part.copy_(values.flatten())
    return part


def guards_intact(part: Tensor) -> bool:
    """Whether the NaN around an `embedded` slice are all there."""
    size = part.untyped_storage().nbytes() // part.element_size()
    buffer = part.detach().as_strided((size,), (1,), 0)
    begin = part.storage_offset()
    outside = torch.cat([buffer[:begin], buffer[begin + part.numel() :]])
    return bool(outside.isnan().all())
