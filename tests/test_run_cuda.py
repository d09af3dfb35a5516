"""A GPU visit is one command that was rehearsed: run_cuda.sh goes through, and says so if not.

What it measures is not checked here: there is nothing to measure on a machine without a GPU.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
FILES = {
    *("status.json", "machine.txt", "all.log", "results.json"),
    *("report.md", "tests.log", "sanitizer.log", "build.log"),
}
PARTS = ["machine", "build", "tests", "sanitizer", "benchmarks", "report"]
NO_MEASUREMENT = "rehearsal, no GPU: these are no measurements"

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
needs_bash = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs bash and timeout")
pytestmark = needs_bash


def visit(out: Path, *options: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(BENCH / "run_cuda.sh"), str(out), *options],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def statuses(out: Path) -> dict[str, str]:
    return {p["name"]: p["status"] for p in json.loads((out / "status.json").read_text())["parts"]}


def files_of_clone() -> set[str]:
    folders = ("bench", "csrc", "gradloc", "tests")
    found = {p for folder in folders for p in (ROOT / folder).rglob("*")}
    return {str(p) for p in found if "__pycache__" not in p.parts}


def test_the_rehearsal_goes_through(tmp_path):
    before = files_of_clone()
    ran = visit(tmp_path / "out", "--rehearse", "--installed-core")
    out = tmp_path / "out"
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr
    assert {path.name for path in out.iterdir()} == FILES
    assert list(statuses(out)) == PARTS
    assert set(statuses(out).values()) == {"passed"}
    assert files_of_clone() == before, "the clone was changed"

    results = json.loads((out / "results.json").read_text())
    assert results["rehearsal"] == NO_MEASUREMENT
    assert results["failed"] == []
    work = {(row["op"], row["by"], row["share"]) for row in results["rows"]}
    for share in (1.0, 0.5, 0.25, 0.1, 0.02):
        assert ("clip+step", "gradloc", share) in work
        assert ("clip+step", "clip_grad_norm_ + torch fused", share) in work
    for row in results["rows"]:
        assert math.isfinite(row["ms"])
        assert row["ms"] > 0, row
        assert row["moved_bytes"] > 0, row
        assert row["of_copy"] > 0, row
    assert {row["tensors"] for row in results["host"]} == {300}
    assert results["bounds"]
    assert all(line.endswith(": not judged") for line in results["bounds"])

    report = (out / "report.md").read_text()
    assert f"**{NO_MEASUREMENT}**" in report
    assert "KEPT" not in report
    assert "cases agree with plain torch on cpu" in (out / "sanitizer.log").read_text()
    check_collected((out / "tests.log").read_text())


def check_collected(log: str) -> None:
    """Every test marked `cuda` in the whole of tests/ is among those of the visit.

    The script chooses files by what stands in them; that once missed all tests that have the mark
    from the fixture `device`.
    """
    files = [line.removeprefix("file: ") for line in log.splitlines() if line.startswith("file: ")]
    assert files[:2] == ["test_cuda_device.py", "test_cuda_graphs.py"]
    collected = node_ids(log)
    assert len(collected) >= 400
    of_files = {Path(node.split("::")[0]).name for node in collected}
    expected = {"test_cuda_device.py", "test_cuda_graphs.py", "test_kernels_adamw.py"}
    assert expected | {"test_device_steps.py"} <= of_files
    assert not re.search(r"\berrors?\b", log.splitlines()[-1]), log[-2000:]

    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "cuda"]
    everything = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(ROOT / "tests")],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert everything.returncode == 0, everything.stdout[-2000:]
    missed = node_ids(everything.stdout) - collected
    assert not missed, f"{len(missed)} tests missed, among them {min(missed)}"
    # torch makes its classes for CUDA only where there is a device: here the files have to do.
    suite = {path.name for path in (ROOT / "tests").glob("test_torch_optimizer_suite*.py")}
    assert len(suite) == 4
    assert suite <= set(files)


def node_ids(output: str) -> set[str]:
    return {line for line in output.splitlines() if re.match(r"tests/\S+\.py::", line)}


@without_gpu
def test_a_visit_without_a_gpu_fails_and_still_reports(tmp_path):
    ran = visit(tmp_path / "out", "--installed-core")
    assert ran.returncode == 1
    out = tmp_path / "out"
    assert statuses(out) == {
        "machine": "failed",
        "build": "failed",
        "tests": "left out",
        "sanitizer": "left out",
        "benchmarks": "left out",
        "report": "passed",
    }
    assert "no CUDA device: use --rehearse" in (out / "machine.txt").read_text()
    report = (out / "report.md").read_text()
    assert "| build | failed |" in report
    assert "There are no results" in report
    assert NO_MEASUREMENT not in report


def test_a_build_that_fails_is_reported_with_the_end_of_its_log(tmp_path):
    ran = visit(tmp_path / "out", "--rehearse", CXX="/bin/false", CUDACXX="/bin/false")
    assert ran.returncode == 1
    assert statuses(tmp_path / "out")["build"] == "failed"
    assert statuses(tmp_path / "out")["benchmarks"] == "left out"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "The end of build.log:" in report
    assert "/bin/false" in report


def test_a_part_that_takes_too_long_is_ended_and_the_others_go_on(tmp_path):
    limits = ["--limit", "sanitizer=0.3", "--limit", "benchmarks=0.5"]
    ran = visit(tmp_path / "out", "--rehearse", "--installed-core", *limits)
    assert ran.returncode == 1
    ended = statuses(tmp_path / "out")
    assert ended["sanitizer"] == ended["benchmarks"] == "timed out"
    assert ended["tests"] == ended["report"] == "passed"


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "usage:"),
        (["--limit", "lunch=3"], {}, "PART one of"),
        (["--limit"], {}, "give PART=SECONDS"),
        ([], {"PYTHON": "no-such-python"}, "no-such-python"),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_made(tmp_path, arguments, variables, message):
    out = tmp_path / "out"
    where = [str(out)] if arguments or variables else []
    ran = subprocess.run(
        ["bash", str(BENCH / "run_cuda.sh"), *where, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert message in ran.stderr
    assert not out.exists()


def test_time_limits_fit_into_nine_minutes():
    text = (BENCH / "run_cuda.sh").read_text()
    line = next(line for line in text.splitlines() if line.startswith("declare -A limit="))
    seconds = [int(word.rstrip(")").split("=")[-1]) for word in line.split("(")[1].split()]
    kill_after = 5 * len(PARTS)
    assert len(seconds) == len(PARTS)
    assert sum(seconds) + kill_after <= 540


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_pybind11_of_torch_builds_a_module(tmp_path):
    """Where pybind11 is not installed, torch's copy of its headers has to do."""
    (tmp_path / "one.cpp").write_text(
        "#include <pybind11/pybind11.h>\n"
        'PYBIND11_MODULE(one, m) { m.def("twice", [](int x) { return 2 * x; }); }\n'
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(one LANGUAGES CXX)\n"
        "find_package(pybind11 CONFIG REQUIRED)\npybind11_add_module(one NO_EXTRAS one.cpp)\n"
        "target_compile_features(one PRIVATE cxx_std_17)\n"
    )
    configure = [
        *("cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build")),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={BENCH / 'pybind11_from_torch'}",
    ]
    refused = subprocess.run(configure, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "has no pybind11/pybind11.h" in refused.stderr
    include = Path(torch.__file__).parent / "include"
    for command in (
        [*configure, f"-DGRADLOC_PYBIND11_INCLUDE={include}"],
        ["cmake", "--build", str(tmp_path / "build")],
        [sys.executable, "-c", "import one; assert one.twice(21) == 42"],
    ):
        ran = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "build")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
