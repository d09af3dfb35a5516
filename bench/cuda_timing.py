"""Clocks for a CUDA device: time on the device, time on the host, and what was launched.

On a CPU, for rehearsals, the same calls measure with the wall clock. Nothing here knows what is
being timed, and what is made of the numbers is `timing.py`'s.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import wall_clock

_MOST_LEAD_MS = 20.0


class DeviceClock:
    """Device seconds of a run, between two events, the launches queued up before the first.

    Before each run the device spins for as long as the host needs to queue that run, so that the
    events span work on the device and no wait for the host. Then it reads a buffer of four times
    the L2 cache: the run finds neither its data there nor another's changes to write back. On a CPU
    it is the wall clock.

    Args:
        device: where the runs happen.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lead_ms: dict[str, float] = {}
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(l2_bytes, dtype=torch.float32, device=device).normal_()
            self._cycles_a_ms = self._measure_spin()

    def __call__(self, name: str, run: Callable[[], Any]) -> float:
        """Seconds of one run."""
        if self._device.type != "cuda":
            return wall_clock(name, run)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        torch.cuda._sleep(round(self._lead_ms.get(name, _MOST_LEAD_MS) * self._cycles_a_ms))
        self._flush.sum()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def set_lead(self, name: str, host_seconds: float) -> None:
        """Say how long the host needs to queue a run; half as much is added."""
        self._lead_ms[name] = min(_MOST_LEAD_MS, 1.5e3 * host_seconds + 0.2)

    def _measure_spin(self) -> float:
        """Cycles of a spin in a millisecond."""
        cycles = 10_000_000
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first loads the kernel
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return cycles / start.elapsed_time(end)


def host_seconds(
    run: Callable[[], Any],
    device: torch.device,
    *,
    calls: int = 15,
    before: Callable[[], Any] = lambda: None,
) -> tuple[float, tuple[float, float]]:
    """Median and quartiles of what a call takes the host, the device idle when it begins.

    On a CPU that is the whole run.

    Args:
        run: the call.
        device: where its work happens.
        calls: how many.
        before: what happens before each, untimed.
    """
    samples = []
    for _ in range(calls):
        before()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        samples.append(time.perf_counter() - begin)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    low, median, high = statistics.quantiles(samples, n=4)
    return median, (low, high)


@dataclass(frozen=True)
class Launches:
    """What one run put on the device."""

    kernels: int
    copies: int  # copies and fills


def count_launches(run: Callable[[], Any], device: torch.device) -> Launches | None:
    """What a run puts on the device, from torch's profiler; None where that sees nothing."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    names = [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return Launches(len(names) - copies, copies) if names else None
