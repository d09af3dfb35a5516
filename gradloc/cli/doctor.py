"""`gradloc doctor`: what is installed, on what it runs, and why CUDA does not if it does not."""

from __future__ import annotations

import argparse
import os
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from gradloc.cli.arguments import add_command

_PACKAGES = ("torch", "numpy", "transformers", "accelerate", "datasets", "peft")
# The instruction sets that decide which code of the core and of torch runs.
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve")


def add_parser(commands: Any) -> None:
    """Add the command."""
    add_command(
        commands,
        "doctor",
        run,
        summary="what is installed and what it runs on",
        about="Versions, processor, devices, and which backend of gradloc runs.",
        example="  gradloc doctor",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the report; always succeeds, as it is for machines where something does not work."""
    lines = report()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


def report() -> list[tuple[str, str]]:
    """(what, value) lines, in the order in which they are printed."""
    import torch

    from gradloc import __version__

    lines = [("gradloc", __version__), ("python", f"{platform.python_version()} on {_system()}")]
    lines += [(name, _version(name)) for name in _PACKAGES]
    lines += [
        ("processor", _processor()),
        ("instruction sets", " ".join(_instruction_sets()) or "unknown"),
        ("cores", f"{_usable_cores()} usable of {os.cpu_count()}"),
        ("threads", f"{torch.get_num_threads()} in torch and gradloc"),
        ("memory", _memory()),
    ]
    return [*lines, *_devices(torch), *_core()]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _system() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    found: dict[str, str] = {}
    if path.is_file():
        for line in (
            path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        ):
            key, _, value = line.partition(":")
            found[key.strip()] = value.strip()
    return found


def _processor() -> str:
    return _cpuinfo().get("model name") or platform.processor() or "unknown"


def _instruction_sets() -> list[str]:
    info = _cpuinfo()
    present = set((info.get("flags") or info.get("Features") or "").split())
    return [flag for flag in _FLAGS if flag in present]


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> str:
    path = Path("/proc/meminfo")
    if not path.is_file():
        return "unknown"
    kib = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        kib[name] = int(value.split()[0])
    total, free = kib.get("MemTotal", 0), kib.get("MemAvailable", 0)
    return f"{free / 2**20:.1f} GiB available of {total / 2**20:.1f} GiB"


def _devices(torch: Any) -> list[tuple[str, str]]:
    with warnings.catch_warnings():
        # torch warns of what `_why_no_device` says.
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return [("CUDA devices", f"none: {_why_no_device(torch)}")]
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        lines.append(
            (f"cuda:{index}", f"{device.name}, {memory}, compute {device.major}.{device.minor}")
        )
    return lines


def _why_no_device(torch: Any) -> str:
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    why = f"torch (CUDA {torch.version.cuda}) finds none"
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        first = str(error).strip().splitlines()[:1]
        why += f": {first[0] if first else type(error).__name__}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return why if visible is None else f"{why} (CUDA_VISIBLE_DEVICES={visible!r})"


def _core() -> list[tuple[str, str]]:
    """The compiled module: which code of it runs, and what is missing."""
    try:
        import torch

        from gradloc import ops
    except ImportError as error:
        return [("compiled core", f"not usable: {error}")]
    info = ops.build_info()
    openmp = "with OpenMP" if info.get("openmp") else "without OpenMP: one thread"
    available = ", ".join(info.get("simd_available") or ()) or "unknown"
    cuda = info.get("cuda_compiled")
    # Why it was left out, or what the runtime answered: only the core knows.
    status = info.get("cuda_status")
    compiled = f"compiled with CUDA {cuda}" if cuda else "not compiled in, plain torch instead"
    rows = [
        (f"kernels on cuda:{index}", ops.kernel_problem(torch.device("cuda", index)) or "run")
        for index in range(int(info.get("cuda_devices") or 0))
    ]
    return [
        ("CPU backend", f"{info.get('simd', 'unknown')} (of {available}), {openmp}"),
        ("compiler", str(info.get("compiler", "unknown"))),
        ("CUDA backend", f"{compiled}: {status}" if status else compiled),
        *rows,
    ]
