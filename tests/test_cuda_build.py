"""What nvcc makes of the kernels, and a module built with CUDA where there is no card.

Compiles for every architecture and reads the PTX; runs no kernel. What needs nvcc is skipped
without it, but fails in CI, where .ci/run provides it.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# At the end: bench/trace.py must not stand before Python's own module of that name.
sys.path.append(str(ROOT / "bench"))

import devices  # noqa: E402
import kernel_resources  # noqa: E402

NVCC = kernel_resources.find_nvcc()
TABLE = ROOT / "bench" / "results" / "kernel-resources.json"
needs_nvcc = pytest.mark.usefixtures("nvcc")


def missing(what):
    """Ends a test: skipped where a tool may be absent, failed in CI."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


@pytest.fixture(scope="module")
def nvcc():
    if NVCC is None:
        places = "CUDACXX, PATH, CUDA_PATH, CUDA_HOME, /usr/local/cuda"
        missing(f"no nvcc, looked for in: {places}; docs/cuda-build.md says how to get one")
    return NVCC


@pytest.fixture(scope="module")
def rows(nvcc):
    """Registers, spills and so on; compiled once for the file. A warning is an error here."""
    return kernel_resources.compile_resources(nvcc)


@pytest.fixture(scope="module")
def ptx(nvcc):
    return kernel_resources.compile_ptx(nvcc, 90)


@pytest.fixture
def changed_sources(tmp_path):
    """Copies the sources and changes each occurrence of some texts in one file."""

    def change(name, *changes):
        csrc = tmp_path / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        path = csrc / "cuda" / name
        text = path.read_text()
        for old, new in changes:
            assert old in text, f"{name} has no {old!r} any more: adapt this test"
            text = text.replace(old, new)
        path.write_text(text)
        return csrc

    return change


@needs_nvcc
def test_every_kernel_compiles_for_every_architecture_without_a_spill(rows, ptx):
    names = {row["kernel"] for row in rows}
    assert len(names) == 14, sorted(names)
    assert {row["architecture"] for row in rows} == set(devices.ARCHITECTURES)
    assert len(rows) == len(names) * len(devices.ARCHITECTURES)
    assert kernel_resources.problems(kernel_resources.with_occupancy(rows, ptx)) == []


@needs_nvcc
@pytest.mark.parametrize("source", [*kernel_resources.SOURCES, "runtime.cu"])
def test_the_host_half_compiles_without_a_warning(source, tmp_path):
    flags = (*kernel_resources.FLAGS, *kernel_resources.HOST_FLAGS)
    out = tmp_path / "object.o"
    kernel_resources.run_nvcc(
        NVCC, *flags, "-arch=sm_90", "-c", "-o", str(out), f"{ROOT}/csrc/cuda/{source}"
    )
    assert out.stat().st_size > 0


@needs_nvcc
def test_all_sources_with_kernels_are_looked_at():
    sources = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert sources == {*kernel_resources.SOURCES, "runtime.cu"}
    built = (ROOT / "CMakeLists.txt").read_text()
    assert all(f"csrc/cuda/{name}" in built for name in sources)


@needs_nvcc
def test_a_planted_spill_is_found(changed_sources, ptx):
    csrc = changed_sources("adamw.cuh", ("kAmsgrad ? 2 : 3", "8"))
    rows = kernel_resources.compile_resources(NVCC, [90], csrc, ["adamw_step.cu"])
    found = kernel_resources.problems(kernel_resources.with_occupancy(rows, ptx))
    assert any(
        "adamw_kernel<true, true, true, 416> on sm_90: uses local memory" in text for text in found
    )


@needs_nvcc
def test_a_planted_warning_is_an_error(changed_sources):
    csrc = changed_sources("norms.cuh", ("double sum = 0.0;", "double sum = 0.0; int planted;"))
    with pytest.raises(RuntimeError, match="planted"):
        kernel_resources.compile_resources(NVCC, [90], csrc, ["norms.cu"])


@needs_nvcc
def test_the_fast_path_moves_16_bytes_at_a_time(ptx):
    """The loop can be gone round with 16-byte accesses alone, as many as there are arrays.

    Eight elements of an array are two accesses in float32 and one in a narrower dtype; norms keep
    four loads under way. Other ways round, for odd addresses and ends, may be narrow.
    """
    for name, kernel in ptx.items():
        loaded, stored = kernel_resources.num_streams(name)
        for dtype, turn in kernel_resources.fast_turns(name, kernel).items():
            accesses = 2 if dtype == "float32" else 1
            expected = (4, 0) if stored == 0 else (accesses * loaded, accesses * stored)
            assert (turn.loads, turn.stores) == expected, (name, dtype)
            # All loads are sent off before the first value is used.
            assert turn.loads_in_flight == turn.loads, (name, dtype)
            narrow = [i for i in turn.body if i.accesses_global and not i.is_wide]
            assert narrow == [], (name, dtype)


# Four words that need not lie on a multiple of 16 bytes: the compiler may not join them.
NARROW = """namespace gradloc::cuda {
struct FourWords {
  uint32_t x, y, z, w;
  __device__ operator uint4() const { return make_uint4(x, y, z, w); }
  __device__ void operator=(uint4 v) { x = v.x, y = v.y, z = v.z, w = v.w; }
};
"""
OPENING = ("namespace gradloc::cuda {\n", NARROW)


@needs_nvcc
@pytest.mark.parametrize(
    ("file", "source", "changes"),
    [
        ("vectors.cuh", "adamw_step.cu", [("const uint4*>", "const FourWords*>"), OPENING]),
        ("vectors.cuh", "adamw_step.cu", [("<uint4*>", "<FourWords*>"), OPENING]),
        ("vectors.cuh", "adamw_step.cu", [("assume_global(base);", "")]),
        ("norms.cuh", "norms.cu", [("const uint4*", "const FourWords*"), OPENING]),
        ("vectors.cuh", "norms.cu", [("assume_global(base);", "")]),
    ],
    ids=["narrow loads", "narrow stores", "of any memory", "norms, narrow", "norms, of any memory"],
)
def test_another_fast_path_is_found(changed_sources, file, source, changes):
    csrc = changed_sources(file, *changes)
    for name, kernel in kernel_resources.compile_ptx(NVCC, 90, csrc, [source]).items():
        with pytest.raises(RuntimeError, match=r"no (way|loop).* of 16 bytes alone"):
            kernel_resources.fast_turns(name, kernel)


@needs_nvcc
def test_the_table_in_the_repository_is_of_these_sources(rows, ptx):
    kept = json.loads(TABLE.read_text())
    version = kernel_resources.nvcc_version(NVCC)
    if kept["nvcc"] != version:
        pytest.skip(f"the table is of nvcc {kept['nvcc']}, here is {version}")
    now = kernel_resources.with_occupancy(rows, ptx)
    again = "run python bench/kernel_resources.py with --out and --json as its docstring says"
    assert kept["rows"] == now, again
    assert TABLE.with_suffix(".md").read_text() == kernel_resources.markdown(now, version), again


@needs_nvcc
def test_an_old_compiler_is_none_at_all_and_the_module_knows_why(tmp_path):
    cmake = Path(sys.executable).with_name("cmake")
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11, which builds bring along")
    if not cmake.exists():
        pytest.skip("needs cmake, which builds bring along")
    old = tmp_path / "nvcc"
    old.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "nvcc: NVIDIA (R) Cuda compiler driver\n'
        f'Cuda compilation tools, release 11.8, V11.8.89" && exit\nexec {NVCC} "$@"\n'
    )
    old.chmod(0o755)
    build = tmp_path / "build"
    arguments = ["-S", ROOT, "-B", build, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    done = subprocess.run(
        [cmake, *arguments, f"-DPython_EXECUTABLE={sys.executable}"],
        env={**os.environ, "CUDACXX": str(old)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    why = "the CUDA compiler was nvcc 11.8, and gradloc needs nvcc 12.1 or newer"
    assert why in done.stdout
    # Ninja's file, or those of make.
    rules = [*build.rglob("build.ninja"), *build.rglob("flags.make"), *build.rglob("build.make")]
    written = "".join(path.read_text() for path in rules)
    assert why in written.replace("\\", "").replace("$ ", " ")
    assert "adamw_step.cu" not in written


def test_a_module_with_cuda_is_of_use_without_a_card():
    code = """
        import json, torch
        from gradloc import ops
        grads = [torch.full((3,), 2.0)]
        norm = ops.NativeNorms([3], [0], 1).norm_sq(grads).tolist()
        print(json.dumps({**ops.build_info(), "norm_sq": norm}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["norm_sq"] == [12.0]
    if info["cuda_compiled"] is None:
        missing(f"gradloc._C was built without CUDA: {info['cuda_status']}")
    assert info["cuda_devices"] == 0
    why = info["cuda_status"]
    assert why.startswith("cudaGetDeviceCount: ") or "NVIDIA driver" in why, why
