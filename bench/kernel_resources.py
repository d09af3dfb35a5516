r"""What every kernel takes of a multiprocessor: registers, shared memory, spills, resident threads.

Compiles the CUDA sources for every architecture (no card is needed) and reads what ptxas reports.
Fails when a kernel spills, or when fewer threads fit than the memory of the fastest card of an
architecture asks for. Says nothing about how fast anything is.

    python bench/kernel_resources.py --out bench/results/kernel-resources.md \
        --json bench/results/kernel-resources.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from devices import ARCHITECTURES, LIMITS, blocks_per_multiprocessor, needed_threads
from ptx_loops import Kernel, Turn, kernels_of

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = ("adamw_step.cu", "norms.cu")
# As in CMakeLists.txt, GRADLOC_WERROR included.
FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings")
HOST_FLAGS = ("-Xcompiler=-ffp-contract=off", "-Xcompiler=-Wall,-Wextra,-Werror")
NORM_LOADS = 4  # kNormLoads in csrc/cuda/norms.cuh
Row = dict[str, Any]


def find_nvcc() -> str | None:
    """The compiler that CMake would take: CUDACXX, then nvcc on PATH, then the usual folders."""
    named = os.environ.get("CUDACXX", "").split()
    if named:
        return shutil.which(named[0])
    folders = [os.environ.get(name, "") for name in ("CUDA_PATH", "CUDA_HOME")]
    usual = [f"{folder}/bin/nvcc" for folder in (*folders, "/usr/local/cuda") if folder]
    return next(filter(None, map(shutil.which, ("nvcc", *usual))), None)


def nvcc_version(nvcc: str) -> str:
    """The full version, as "13.0.88"."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.findall(r"\bV([\d.]+)", text)[0]


def run_nvcc(nvcc: str, *arguments: str) -> str:
    """Runs nvcc and returns what it reports.

    Raises:
        RuntimeError: with the compiler's message.
    """
    done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_ptx(
    nvcc: str, architecture: int, csrc: Path = CSRC, sources: Sequence[str] = SOURCES
) -> dict[str, Kernel]:
    """The kernels as PTX, by readable name."""
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            out = f"{folder}/{source}.ptx"
            arch = f"-arch=compute_{architecture}"
            run_nvcc(nvcc, *FLAGS, arch, "-ptx", "-o", out, f"{csrc}/cuda/{source}")
            kernels += kernels_of(Path(out).read_text())
    return {readable(kernel.name): kernel for kernel in kernels}


def compile_resources(
    nvcc: str,
    architectures: Iterable[int] = ARCHITECTURES,
    csrc: Path = CSRC,
    sources: Sequence[str] = SOURCES,
    jobs: int = 2,
) -> list[Row]:
    """Resources of every kernel on every architecture, sorted by both.

    Raises:
        RuntimeError: the compiler refuses a source or warns of something.
    """
    work = [(arch, source) for arch in architectures for source in sources]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:

        def compile_one(arch: int, source: str) -> list[Row]:
            # -cubin and not -c: the host's half needs to be compiled once only, see the tests.
            report = run_nvcc(
                nvcc, *FLAGS, f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin",
                "-o", f"{folder}/{source}.{arch}", f"{csrc}/cuda/{source}",
            )  # fmt: skip
            return [{"architecture": arch, **row} for row in parse_report(report)]

        rows = [row for rows in pool.map(lambda job: compile_one(*job), work) for row in rows]
    return sorted(rows, key=lambda row: (row["kernel"], row["architecture"]))


def parse_report(report: str) -> list[Row]:
    """What ptxas -v says of each kernel."""
    rows = []
    for part in re.split(r"Compiling entry function '", report)[1:]:
        name = part[: part.index("'")]
        stack, stores, loads = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )[0]
        shared = re.findall(r"(\d+) bytes smem", part)
        rows.append(
            {
                "kernel": readable(name),
                "registers": int(re.findall(r"Used (\d+) registers", part)[0]),
                "shared_bytes": int(shared[0]) if shared else 0,
                "stack_bytes": int(stack),
                "spill_stores_bytes": int(stores),
                "spill_loads_bytes": int(loads),
            }
        )
    return rows


def readable(mangled: str) -> str:
    """`adamw_kernel<false, true, false, 416>` for the name that a linker sees."""
    match = re.search(r"\d+([a-z_]+_kernel)I((?:L[a-z]+\d+E)+)E", mangled)
    if match is None:
        return mangled
    values = re.findall(r"L([a-z]+)(\d+)E", match[2])
    words = ["false" if v == "0" else "true" if kind == "b" else v for kind, v in values]
    return f"{match[1]}<{', '.join(words)}>"


def num_streams(kernel: str) -> tuple[int, int]:
    """Arrays that a kernel reads, and those of them that it writes.

    The gradients; with parameter and two or three moments. With anchors, of which the kernel takes
    amsgrad's third moment as well: what it does without that.
    """
    if kernel.startswith("norms"):
        return 1, 0
    amsgrad, _, anchored, _ = kernel.partition("<")[2].split(", ")
    if anchored == "true":
        return 5, 3
    return (5, 4) if amsgrad == "true" else (4, 3)


def fast_turns(name: str, kernel: Kernel) -> dict[str, Turn]:
    """The turns of the main loop when everything is float32, or all of it bfloat16, and aligned.

    Raises:
        RuntimeError: there is no way round the loop with 16-byte accesses alone.
    """
    turns, (loaded, stored) = kernel.turns(), num_streams(name)
    if stored == 0:
        # The cheapest two of the ways leave float32 and bfloat16 as is, or shift it into place.
        # float16 has to be converted.
        key = (NORM_LOADS, 0)
        if len(turns.get(key, [])) < 2:
            raise RuntimeError(f"{name}: no loop with {NORM_LOADS} loads of 16 bytes alone")
        return {"float32": turns[key][0], "bfloat16": turns[key][1]}
    found = {}
    for dtype, accesses in (("float32", 2), ("bfloat16", 1)):  # of 16 bytes for 8 elements
        key = (accesses * loaded, accesses * stored)
        if key not in turns:
            raise RuntimeError(
                f"{name}: no way round the loop with {key[0]} loads and {key[1]} stores "
                f"of 16 bytes alone ({dtype}); there are {sorted(turns)}"
            )
        found[dtype] = turns[key][0]
    return found


def with_occupancy(rows: Sequence[Row], ptx: dict[str, Kernel]) -> list[Row]:
    """Adds threads, parameters, resident threads and those that the memory asks for."""
    flying = {
        name: min(16 * turn.loads_in_flight for turn in fast_turns(name, kernel).values())
        for name, kernel in ptx.items()
    }
    out = []
    for row in rows:
        kernel, in_flight = ptx[row["kernel"]], flying[row["kernel"]]
        blocks = blocks_per_multiprocessor(
            row["architecture"],
            registers=row["registers"],
            shared_bytes=row["shared_bytes"],
            threads=kernel.threads,
        )
        needed, device = needed_threads(row["architecture"], in_flight)
        out.append(
            {
                **row,
                "param_bytes": kernel.param_bytes,
                "threads": kernel.threads,
                "blocks_resident": blocks,
                "threads_resident": blocks * kernel.threads,
                "threads_most": LIMITS[row["architecture"]].max_threads,
                "bytes_in_flight_per_thread": in_flight,
                "threads_needed": round(needed),
                "needed_by": device,
            }
        )
    return out


def problems(rows: Sequence[Row]) -> list[str]:
    """What must not be: spills, and too few threads to fill the memory."""
    found = []
    for row in rows:
        where = f"{row['kernel']} on sm_{row['architecture']}"
        if row["spill_stores_bytes"] or row["spill_loads_bytes"] or row["stack_bytes"]:
            found.append(f"{where}: uses local memory ({row['stack_bytes']} bytes of stack)")
        if row["threads_resident"] < row["threads_needed"]:
            found.append(
                f"{where}: {row['threads_resident']} threads fit, the memory of {row['needed_by']} "
                f"asks for {row['threads_needed']}"
            )
    return found


def markdown(rows: Sequence[Row], version: str) -> str:
    """The table, with what its columns mean."""
    lines = [
        "# What each kernel takes of a multiprocessor",
        "",
        f"Compiled with nvcc {version} by `python bench/kernel_resources.py`; nothing here was run "
        "on a card. Template arguments: `adamw_kernel<amsgrad, stochastic rounding, anchors, "
        "gradient addresses in the parameters>`, `norms_kernel<gradient addresses in the "
        "parameters>`.",
        "",
        "*Spills*: bytes of stores / loads. *Resident*: threads that fit on a multiprocessor at "
        "once, of those that it can hold. *Needed*: threads that must wait for memory at once so "
        "that the memory of the card named never idles (Little's law: bandwidth × latency of an "
        "idle card, bench/devices.py), each with *in flight* bytes (16-byte loads before the first "
        "use, the narrowest dtype). A loaded card answers more slowly, so that twice as many is "
        "comfortable.",
        "",
        "| kernel | sm | registers | shared | spills | parameters | resident | in flight "
        "| needed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['kernel']}` | {row['architecture']} | {row['registers']} "
            f"| {row['shared_bytes']} | {row['spill_stores_bytes']} / {row['spill_loads_bytes']} "
            f"| {row['param_bytes']} | {row['threads_resident']} of {row['threads_most']} "
            f"| {row['bytes_in_flight_per_thread']} "
            f"| {row['threads_needed']} ({row['needed_by']}) |"
        )
    return "\n".join(lines) + "\n"


def measure(nvcc: str, csrc: Path = CSRC) -> dict[str, Any]:
    """Everything that is written as JSON."""
    rows = with_occupancy(compile_resources(nvcc, csrc=csrc), compile_ptx(nvcc, 90, csrc))
    return {"nvcc": nvcc_version(nvcc), "rows": rows}


def main() -> int:
    """Compiles, prints the table, writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--out", type=Path, help="write the table here")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc: put it on PATH or set CUDACXX to it", file=sys.stderr)
        return 2
    result = measure(nvcc)
    table = markdown(result["rows"], result["nvcc"])
    print(table)
    if arguments.out:
        arguments.out.write_text(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    found = problems(result["rows"])
    print("\n".join(found) or "no spills, and enough threads everywhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
