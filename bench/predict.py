"""What the hardware should do, on paper: the time of norms, step and clip + step for known models.

Works from the compiled kernels (bench/kernel_resources.py), the turns of their loops
(bench/ptx_loops.py) and published facts of cards (bench/devices.py). Nothing here is measured; the
page that it writes says so. No card is needed, nvcc is.

    python bench/predict.py --out bench/results/predicted.md --json bench/results/predicted.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from devices import DEVICES, WARP, Device, blocks_per_multiprocessor
from kernel_resources import compile_ptx, compile_resources, fast_turns, find_nvcc, nvcc_version
from model_shapes import SHARES, shapes_of

MODELS = ("gpt2-small", "gpt2-xl", "llama-3.2-1b", "llama-3.1-8b")
OPERATIONS = ("norms", "step", "clip+step")
WIDTHS = {"float32": 4, "bfloat16": 2}
CHUNK = 32768

# Assumed, all of them; a visit to a card is what corrects them.
ATTAINABLE = 0.92  # of the published bandwidth, by a copy
LAUNCH_US = 2.5  # from the launch until the first block runs
SETUP_LATENCIES = 6  # dependent reads of a block before its loop and after it, scalars included
END_LATENCIES = 10  # the same of the block that comes last: sums of segments and layers
FLOAT64_LANES = {80: 32, 86: 2, 89: 2, 90: 64, 100: 64, 120: 2}  # NVIDIA's white papers
SPECIAL_LANES = 16  # likewise, all architectures


@dataclass(frozen=True)
class Loop:
    """One turn of a kernel's main loop, by thread, and how many threads are there."""

    elements: int
    loaded_bytes: int
    in_flight_bytes: int
    instructions: int
    special: int
    float64: int
    registers: int
    shared_bytes: int
    threads: int

    def blocks(self, device: Device) -> int:
        """Blocks on a multiprocessor at once."""
        return blocks_per_multiprocessor(
            device.architecture,
            registers=self.registers,
            shared_bytes=self.shared_bytes,
            threads=self.threads,
        )


@dataclass(frozen=True)
class Limits:
    """Elements a second that each part of a card could handle, were it alone."""

    memory: float
    issue: float
    special: float
    float64: float
    latency: float

    @property
    def rate(self) -> float:
        """What is left of all of them together."""
        return min(vars(self).values())

    @property
    def name(self) -> str:
        """The tightest."""
        return min(vars(self), key=lambda name: getattr(self, name))


def limits_of(loop: Loop, device: Device, bytes_per_element: float) -> Limits:
    """The limits of a kernel with enough blocks to fill the card."""
    clock = device.clock_mhz * 1e6 * device.multiprocessors
    resident = loop.blocks(device) * loop.threads
    warps = resident / WARP / device.limits.schedulers  # of a scheduler
    # The pessimistic end: all warps of a scheduler wait together, then compute one after the other.
    turn_cycles = device.latency_cycles + warps * loop.instructions
    # A thread whose loads do not all go out at once waits once more for the rest.
    turn_cycles += device.latency_cycles * (loop.loaded_bytes / loop.in_flight_bytes - 1)

    def units(lanes: float, operations: int) -> float:
        return clock * lanes * loop.elements / operations if operations else math.inf

    return Limits(
        memory=device.bandwidth_gb_s * 1e9 * ATTAINABLE / bytes_per_element,
        issue=units(device.limits.schedulers * WARP, loop.instructions),
        special=units(SPECIAL_LANES, loop.special),
        float64=units(FLOAT64_LANES[device.architecture], loop.float64),
        latency=clock * resident * loop.elements / turn_cycles,
    )


def launch_seconds(
    loop: Loop,
    device: Device,
    sizes: Iterable[int],
    share: float,
    bytes_per_element: float,
    chunk: int = CHUNK,
) -> float:
    """Seconds of one launch over `share` of tensors of these sizes.

    Args:
        loop: the kernel's.
        device: the card.
        sizes: elements of every tensor.
        share: of the elements, spread evenly over the tensors.
        bytes_per_element: read and written.
        chunk: elements of a block.
    """
    sizes = list(sizes)
    elements = share * sum(sizes)
    blocks = max(1.0, share * sum(math.ceil(size / chunk) for size in sizes))
    latency = device.latency_ns * 1e-9
    limits = limits_of(loop, device, bytes_per_element)
    resident = loop.blocks(device) * device.multiprocessors
    setup = SETUP_LATENCIES * latency

    # A block with the card to itself: one turn after the other, its warps on four schedulers.
    turns = math.ceil(min(chunk, elements / blocks) / (loop.threads * loop.elements))
    warps = loop.threads / WARP / device.limits.schedulers
    cycles = device.latency_cycles * loop.loaded_bytes / loop.in_flight_bytes
    cycles += warps * loop.instructions
    alone = setup + turns * cycles / (device.clock_mhz * 1e6)

    # Full speed while there are blocks enough; or, with many short blocks, their setup.
    streaming = max(elements / limits.rate, blocks / resident * alone)
    # Resident blocks end one by one; the last few cannot fill the memory: half of one, on average.
    tail = alone / 2 if blocks * chunk > limits.rate * alone else 0.0
    seconds = max(streaming, alone) + tail
    tensors = max(1.0, share * len(sizes))
    end = (END_LATENCIES + 2 * math.ceil(tensors / loop.threads)) * latency
    return seconds + end + LAUNCH_US * 1e-6


def bytes_of(operation: str, dtype: str) -> int:
    """Bytes that must move for an element: norms read the gradient; a step writes three of four."""
    return WIDTHS[dtype] * {"norms": 1, "step": 7}[operation]


def milliseconds(
    loops: dict[tuple[str, str], Loop],
    device: Device,
    model: str,
    dtype: str,
    operation: str,
    share: float = 1.0,
    chunk: int = CHUNK,
) -> float:
    """Predicted time of an operation; clip + step is two launches."""
    parts = ("norms", "step") if operation == "clip+step" else (operation,)
    sizes = [math.prod(shape) for _, _, shape in shapes_of(model)]
    return 1e3 * sum(
        launch_seconds(loops[p, dtype], device, sizes, share, bytes_of(p, dtype), chunk)
        for p in parts
    )


def figures(
    loops: dict[tuple[str, str], Loop], device: Device, model: str, dtype: str
) -> dict[str, float]:
    """Milliseconds of everything that bench/cuda_kernels.py times, under its names."""
    found = {op: milliseconds(loops, device, model, dtype, op) for op in OPERATIONS}
    for share in SHARES[1:]:
        name = f"clip+step @ {100 * share:g}%"
        found[name] = milliseconds(loops, device, model, dtype, "clip+step", share)
    return found


def fits(device: Device, model: str, dtype: str) -> bool:
    """Whether parameters, gradients and two moments of a dtype fit into the card's memory."""
    elements = sum(math.prod(shape) for _, _, shape in shapes_of(model))
    return 4 * WIDTHS[dtype] * elements < 0.97e9 * device.memory_gb


def compile_loops(nvcc: str) -> dict[int, dict[tuple[str, str], Loop]]:
    """The loops of norms and of a plain step, by architecture, then (operation, dtype)."""
    names = {"norms_kernel<416>": "norms", "adamw_kernel<false, false, false, 416>": "step"}
    rows = [row for row in compile_resources(nvcc) if row["kernel"] in names]
    ptx = compile_ptx(nvcc, 90)
    loops: dict[int, dict[tuple[str, str], Loop]] = {}
    for row in rows:
        kernel = ptx[row["kernel"]]
        for dtype, turn in fast_turns(row["kernel"], kernel).items():
            operation = names[row["kernel"]]
            streams = {"norms": 1, "step": 4}[operation]
            loaded = 16 * turn.loads
            loops.setdefault(row["architecture"], {})[operation, dtype] = Loop(
                elements=loaded // (streams * WIDTHS[dtype]),
                loaded_bytes=loaded,
                in_flight_bytes=16 * turn.loads_in_flight,
                instructions=turn.instructions,
                special=turn.special,
                float64=turn.float64,
                registers=row["registers"],
                shared_bytes=row["shared_bytes"],
                threads=kernel.threads,
            )
    return loops


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def limits_table(loops: dict[int, dict[tuple[str, str], Loop]]) -> list[str]:
    """For every card and kernel: Little's law, and what limits it."""
    rows = []
    for device in DEVICES:
        for (operation, dtype), loop in loops[device.architecture].items():
            width = bytes_of(operation, dtype)
            limits = limits_of(loop, device, width)
            flying = loop.blocks(device) * loop.threads * loop.in_flight_bytes
            needed = device.bytes_in_flight_needed
            others = (limits.issue, limits.special, limits.float64, limits.latency)
            rows.append(
                [
                    device.name,
                    f"{operation}, {dtype}",
                    f"{flying / 1024:.0f} KB",
                    f"{needed / 1024:.1f} KB{'*' if device.latency_assumed else ''}",
                    f"{flying / needed:.1f}",
                    f"{loop.instructions / loop.elements:.1f}",
                    *(f"{100 * limits.memory / o:.0f} %" for o in others),
                    limits.name,
                ]
            )
    return table(
        [
            "card", "kernel", "in flight", "needed", "ratio", "instructions / element",
            "issue", "special", "float64", "latency", "limit",
        ],
        rows,
    )  # fmt: skip


def times_tables(loops: dict[int, dict[tuple[str, str], Loop]]) -> list[str]:
    """Milliseconds of every operation; clip + step also at every share."""
    lines = []
    for model in MODELS:
        rows = []
        for device in DEVICES:
            for dtype in WIDTHS:
                if not fits(device, model, dtype):
                    continue
                mine = loops[device.architecture]
                time = [milliseconds(mine, device, model, dtype, op) for op in OPERATIONS]
                shares = [milliseconds(mine, device, model, dtype, "clip+step", s) for s in SHARES]
                rows.append(
                    [device.name, dtype, *(f"{ms:.3f}" for ms in time)]
                    + [f"{ms:.3f} ({100 * ms / time[2]:.1f} %)" for ms in shares[1:]]
                )
        head = ["card", "dtype", *OPERATIONS, *(f"{100 * s:g} % of the layers" for s in SHARES[1:])]
        lines += [f"### {model}", "", *table(head, rows)]
    return lines


def alternatives_table(loops: dict[int, dict[tuple[str, str], Loop]]) -> list[str]:
    """The same step with other choices, relative to the ones made; registers held at today's."""

    def threads_of(loop: Loop, threads: int) -> Loop:
        return replace(loop, threads=threads)

    def half(loop: Loop) -> Loop:
        return replace(
            loop,
            elements=loop.elements // 2,
            loaded_bytes=loop.loaded_bytes // 2,
            in_flight_bytes=loop.in_flight_bytes // 2,
            instructions=math.ceil(loop.instructions / 2),
        )

    rows = []
    for device in DEVICES:
        mine = loops[device.architecture]
        for model, share in (("gpt2-small", 1.0), ("gpt2-small", 0.02), ("llama-3.2-1b", 1.0)):
            if not fits(device, model, "bfloat16"):
                continue

            def ratio(change: dict[tuple[str, str], Loop], chunk: int = CHUNK) -> str:
                args = (device, model, "bfloat16", "clip+step", share)  # noqa: B023
                return f"{milliseconds(change, *args, chunk) / milliseconds(mine, *args):.3f}"  # noqa: B023

            rows.append(
                [device.name, f"{model}, {100 * share:g} %"]
                + [ratio(mine, chunk) for chunk in (8192, 16384, 65536)]
                + [ratio({k: threads_of(v, t) for k, v in mine.items()}) for t in (128, 512)]
                + [ratio({k: half(v) for k, v in mine.items()})]
            )
    head = [
        "card", "clip + step, bfloat16", "chunk 8,192", "16,384", "65,536", "128 threads",
        "512 threads", "half the elements a thread",
    ]  # fmt: skip
    return table(head, rows)


def page(loops: dict[int, dict[tuple[str, str], Loop]], version: str) -> str:
    """The whole page."""
    intro, reading, choice = (
        Path(__file__).with_name("predicted_text.md").read_text().split("\n---\n")
    )
    lines = [
        intro.strip().format(version=version, attainable=f"{100 * ATTAINABLE:.0f}"),
        "",
        *limits_table(loops),
        "## Milliseconds",
        "",
        *times_tables(loops),
        "## Other choices",
        "",
        reading.strip(),
        "",
        *alternatives_table(loops),
        choice.strip(),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compiles, computes, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--json", type=Path, help="write {card: {model: {dtype: {operation: ms}}}}")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc: put it on PATH or set CUDACXX to it", file=sys.stderr)
        return 2
    loops = compile_loops(nvcc)
    text = page(loops, nvcc_version(nvcc))
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    if arguments.json:
        found = {
            device.name: {
                model: {
                    dtype: figures(loops[device.architecture], device, model, dtype)
                    for dtype in WIDTHS
                    if fits(device, model, dtype)
                }
                for model in MODELS
            }
            for device in DEVICES
        }
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
