"""Published facts of the graphics cards that predictions are made for, and occupancy from them.

Nothing here was measured by this project. Every figure is the vendor's or that of the publication
named beside it; `assumed` marks the ones for which none was found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds, by compute capability.

    From NVIDIA's cuda_occupancy.h (CUDA 13.0) and the table "Technical Specifications per Compute
    Capability" of the CUDA programming guide.
    """

    max_threads: int
    max_blocks: int
    shared_bytes: int
    registers: int = 65536
    register_unit: int = 256  # registers are given to a warp in multiples of this
    shared_unit: int = 128  # bytes
    shared_reserved: int = 1024  # bytes of every block that the system keeps
    schedulers: int = 4  # each starts one instruction of one warp a cycle


LIMITS: dict[int, Limits] = {
    80: Limits(max_threads=2048, max_blocks=32, shared_bytes=164 * 1024),
    86: Limits(max_threads=1536, max_blocks=16, shared_bytes=100 * 1024),
    89: Limits(max_threads=1536, max_blocks=24, shared_bytes=100 * 1024),
    90: Limits(max_threads=2048, max_blocks=32, shared_bytes=228 * 1024),
    100: Limits(max_threads=2048, max_blocks=32, shared_bytes=228 * 1024),
    120: Limits(max_threads=1536, max_blocks=24, shared_bytes=100 * 1024),
}
ARCHITECTURES = tuple(LIMITS)


@dataclass(frozen=True)
class Device:
    """A card. `latency_cycles`: of a load that finds its data in no cache, on an idle card."""

    name: str
    architecture: int
    multiprocessors: int
    bandwidth_gb_s: float
    l2_mb: float
    clock_mhz: float  # the highest that the vendor names; under load it may be less
    memory_gb: float
    latency_cycles: float
    latency_assumed: bool = False

    @property
    def limits(self) -> Limits:
        """What one of its multiprocessors holds."""
        return LIMITS[self.architecture]

    @property
    def latency_ns(self) -> float:
        """The latency at the highest clock: measurements did not lock it."""
        return self.latency_cycles / self.clock_mhz * 1000

    @property
    def bytes_in_flight_needed(self) -> float:
        """Little's law: bytes that one multiprocessor must have asked for to fill the memory."""
        return self.bandwidth_gb_s * self.latency_ns / self.multiprocessors


# Multiprocessors, bandwidth, L2 and clock: NVIDIA's data sheets and architecture white papers
# (A100 2020, GA102 2020, H100 2022, Ada 2022, RTX Blackwell 2025) and product pages. B200: Chester
# Lam, "Nvidia's B200: Keeping the CUDA Juggernaut Rolling", Chips and Cheese, 2025 (148
# multiprocessors), and NVIDIA's 64 TB/s for the eight of a DGX B200.
#
# Latencies: Mark Dewing, "AI_kernels", latency/README.md, GitHub, read November 2026: one program
# for A100 SXM 80 GB (550 cycles), 4090 (636), H100 SXM (700), 5090 (936) and B200 (860), clocks not
# locked.
DEVICES: tuple[Device, ...] = (
    Device("A100-80GB", 80, 108, 2039, 40, 1410, 80, 550),
    # Assumed: the time that the 4090 takes, whose memory is of the same kind (636 / 2520 MHz).
    Device("RTX 3090", 86, 82, 936, 6, 1695, 24, 428, latency_assumed=True),
    Device("RTX 4090", 89, 128, 1008, 72, 2520, 24, 636),
    # Assumed: as many cycles as the 4090.
    Device("L4", 89, 58, 300, 48, 2040, 24, 636, latency_assumed=True),
    Device("H100-SXM", 90, 132, 3350, 50, 1980, 80, 700),
    # Assumed: the H100's, the same chip with other memory (690 cycles on a GH200, same source).
    Device("H200", 90, 132, 4800, 50, 1980, 141, 700, latency_assumed=True),
    Device("B200", 100, 148, 8000, 126, 1965, 180, 860),
    Device("RTX 5090", 120, 170, 1792, 96, 2407, 32, 936),
)


def blocks_per_multiprocessor(
    architecture: int, *, registers: int, shared_bytes: int, threads: int
) -> int:
    """Blocks that fit on a multiprocessor at once.

    Args:
        architecture: a key of `LIMITS`.
        registers: of a thread, as ptxas reports them.
        shared_bytes: static shared memory of a block.
        threads: of a block.
    """
    limits = LIMITS[architecture]
    warps = math.ceil(threads / WARP)
    warp_registers = _round_up(registers * WARP, limits.register_unit)
    # A scheduler has its own quarter of the registers, and a warp lives with one scheduler.
    quarter = limits.registers // limits.schedulers
    by_registers = quarter // warp_registers * limits.schedulers // warps
    by_shared = limits.shared_bytes // (
        _round_up(shared_bytes + limits.shared_reserved, limits.shared_unit)
    )
    by_threads = limits.max_threads // (warps * WARP)
    return min(by_registers, by_shared, by_threads, limits.max_blocks)


def needed_threads(architecture: int, bytes_per_thread: float) -> tuple[float, str]:
    """Threads on a multiprocessor that fill the memory of the most demanding card, and its name."""
    needs = [
        (device.bytes_in_flight_needed / bytes_per_thread, device.name)
        for device in DEVICES
        if device.architecture == architecture
    ]
    return max(needs)


def _round_up(value: int, unit: int) -> int:
    return math.ceil(value / unit) * unit
