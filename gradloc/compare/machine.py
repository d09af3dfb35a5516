"""What a figure was measured on: device, processor, threads, versions. Measures nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def work_device() -> torch.device:
    """Where models are traced, trained and scored: a CUDA device where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, str]:
    """Name -> value, for a record or a report."""
    import transformers

    from gradloc import __version__

    found = {
        "processor": _processor(),
        "logical processors": str(os.cpu_count()),
        "threads used": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "gradloc": __version__,
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
