"""What the emulator cannot show: fences, and reads that no cache may answer, in the generated PTX.

The emulator runs blocks one after the other, so that a missing fence has no effect there; on a card
another block's sum would be read too early, now and then. And predictions are those of the sources.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # last: bench/trace.py is not the standard library's
import kernel_resources  # noqa: E402
from test_cuda_build import NVCC, nvcc  # noqa: E402, F401  (a fixture: skips, or fails in CI)

pytestmark = pytest.mark.usefixtures("nvcc")


def protocol_of(ptx: str) -> list[list[str]]:
    """For each kernel the order of stores and loads of doubles, fences, barriers and atomics."""
    kinds = {
        r"st\.(volatile\.)?(global\.)?f64": "store",
        r"ld\.volatile\.(global\.)?f64": "volatile load",
        r"ld\.(global\.)?(nc\.)?f64": "load",
        r"membar\.gl|fence\.\w+\.gpu": "fence",
        r"atom\.(global\.)?add\.u32": "count",
        r"bar\.sync": "barrier",
    }
    kernels = []
    for entry in re.split(r"\.visible \.entry ", ptx)[1:]:
        order = []
        for line in entry.splitlines():
            found = next((kind for p, kind in kinds.items() if re.search(rf"\s{p}\s", line)), None)
            order += [found] if found else []
        kernels.append(order)
    return kernels


def compiled(source: str, csrc: Path, folder: Path) -> list[list[str]]:
    out = folder / "kernels.ptx"
    flags = ["-arch=compute_90", "-ptx", "-o", str(out), str(csrc / "cuda" / source)]
    kernel_resources.run_nvcc(NVCC, *kernel_resources.FLAGS, *flags)
    return protocol_of(out.read_text())


def problems(order: list[str]) -> list[str]:
    """What is wrong with a kernel's way of handing in sums, read in the order of its text."""
    counts = [i for i, kind in enumerate(order) if kind == "count"]
    found = []
    if len(counts) != 2:
        found.append(f"{len(counts)} counters instead of 2")
    for at in counts:
        if order[at - 1] != "fence":
            found.append(f"{order[at - 1]} before a counter, not a fence")
        if order[at - 2] != "barrier":
            found.append(f"{order[at - 2]} before that, not a barrier of the block")
        if order[at + 1 : at + 3] != ["fence", "barrier"]:
            found.append(f"{order[at + 1 : at + 3]} after a counter, not a fence and a barrier")
    first = counts[0] if counts else len(order)
    if "load" in order[first:]:
        found.append("sums of other blocks may come from a cache")
    if order[first:].count("volatile load") < 2:
        found.append("sums of other blocks are not read")
    return found


@pytest.mark.parametrize("source", ["norms.cu", "adamw_step.cu"])
def test_sums_are_handed_in_behind_fences(source, tmp_path):
    kernels = compiled(source, ROOT / "csrc", tmp_path)
    assert len(kernels) == (2 if source == "norms.cu" else 12)
    for order in kernels:
        assert problems(order) == []


FENCE = "    __threadfence();\n"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (FENCE + "    is_last", "    is_last", "before a counter, not a fence"),
        ("*counter = 0u;\n" + FENCE, "*counter = 0u;\n", "after a counter, not a fence"),
        (
            "const volatile double* sums = scratch.chunk_sums",
            "const double* sums = scratch.chunk_sums",
            "from a cache",
        ),
        (
            "const volatile double* sums = scratch.segment_sums",
            "const double* sums = scratch.segment_sums",
            "from a cache",
        ),
        (
            "  __syncthreads();  // all threads have written",
            "  // all threads have written",
            "not a barrier",
        ),
    ],
    ids=["first fence", "second fence", "chunk sums", "segment sums", "barrier"],
)
def test_what_is_missing_is_found(before, after, message, tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    file = csrc / "cuda" / "block_sum.cuh"
    text = file.read_text()
    assert text.count(before) == 1, before
    file.write_text(text.replace(before, after))
    for order in compiled("norms.cu", csrc, tmp_path):
        assert any(message in problem for problem in problems(order)), problems(order)


def test_predictions_are_of_these_sources(tmp_path):
    results = ROOT / "bench" / "results"
    version = kernel_resources.nvcc_version(NVCC)
    page = (results / "predicted.md").read_text()
    if f"nvcc {version}" not in page:
        pytest.skip(f"the predictions are of another nvcc than {version}")
    files = {"--out": "predicted.md", "--json": "predicted.json"}
    arguments = [part for flag, name in files.items() for part in (flag, str(tmp_path / name))]
    command = [sys.executable, str(ROOT / "bench" / "predict.py"), *arguments]
    subprocess.run(command, check=True, capture_output=True)
    for name in files.values():
        again = "run python bench/predict.py with --out and --json as its docstring says"
        assert (tmp_path / name).read_text() == (results / name).read_text(), f"{name}: {again}"
