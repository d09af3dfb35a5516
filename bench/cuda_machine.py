"""What machine a GPU visit ran on: device, driver, compilers, Python packages. Measures nothing.

Needs torch and not gradloc, so that it can speak where the build fails.

    python bench/cuda_machine.py [--rehearse]
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_TOOLS = {
    "nvidia-smi": [],
    "nvcc": ["--version"],
    "g++": ["--version"],
    "cmake": ["--version"],
    "ninja": ["--version"],
    "compute-sanitizer": ["--version"],
}
_PACKAGES = re.compile(
    r"torch|nvidia|cuda|triton|numpy|pybind11|scikit.build|cmake|ninja|pytest|hypothesis|apex|"
    r"bitsandbytes|transformers|accelerate|peft|datasets",
    re.IGNORECASE,
)


def device_facts() -> dict[str, Any]:
    """The device that is measured; {} where there is none."""
    if not torch.cuda.is_available():
        return {}
    facts = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "l2_bytes": facts.L2_cache_size,
        "memory_bytes": total,
        "free_bytes": free,
        "torch_cuda": torch.version.cuda,
    }


def tool(name: str, arguments: list[str]) -> str:
    """What a tool says of itself."""
    path = shutil.which(name)
    if path is None:
        return "not found"
    ran = subprocess.run(
        [path, *arguments], capture_output=True, text=True, timeout=20, check=False
    )
    return (ran.stdout + ran.stderr).strip() or f"exit status {ran.returncode}"


def packages() -> list[str]:
    """Installed packages that may matter, with versions."""
    found = {
        f"{dist.metadata['Name']} {dist.version}"
        for dist in metadata.distributions()
        if _PACKAGES.search(dist.metadata["Name"] or "")
    }
    return sorted(found, key=str.lower)


def memory_gb() -> str:
    """The machine's memory, from /proc/meminfo."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemTotal:\s+(\d+) kB", info.read_text()) if info.exists() else None
    return f"{int(found[1]) / 1e6:.0f} GB" if found else "unknown"


def main() -> int:
    print(datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
    print(f"{platform.platform()}, {os.cpu_count()} cores, memory {memory_gb()}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    facts = device_facts()
    for name, value in facts.items():
        print(f"{name}: {value}")
    if not facts:
        print("no CUDA device")
    for name, arguments in _TOOLS.items():
        print(f"\n== {name}\n{tool(name, arguments)}")
    print("\n== packages", *packages(), sep="\n")
    if not facts and "--rehearse" not in sys.argv:
        print("no CUDA device: use --rehearse where there is none")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
