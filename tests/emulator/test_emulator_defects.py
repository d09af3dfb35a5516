"""Defects planted in small kernels and in copies of gradloc's own: each is caught, and named.

None of them may hang or bring down the tests; what a sanitizer must see has a process of its own.
"""

import ctypes
import re
import shutil
from pathlib import Path

import emulator_build
import kernel_library
import numpy as np
import pytest

EMULATOR = Path(__file__).parent
LAUNCH_FAILURE = 719
SEEDS = range(8)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.fixture(scope="module")
def samples() -> ctypes.CDLL:
    library = ctypes.CDLL(str(emulator_build.build_samples()))
    library.error_text.restype = ctypes.c_char_p
    library.error_string.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize(
    ("defect", "threads", "texts"),
    [
        pytest.param(
            1, 64, ["threads 0-2 ended; threads 3-63 wait at __syncthreads at"], id="ended"
        ),
        pytest.param(
            2,
            64,
            ["threads 0-39 wait at __syncthreads at", "threads 40-63 wait at __syncthreads at"],
            id="two barriers",
        ),
        pytest.param(
            3,
            64,
            [
                "threads 0-29, 32-61 wait at __shfl_sync(mask 0xffffffff) at",
                "threads 30-31, 62-63 wait at __syncthreads at",
            ],
            id="absent lanes",
        ),
        pytest.param(
            4,
            64,
            ["thread 5 waits at __syncthreads at", "threads 0-4, 6-31 wait at __shfl_down_sync("],
            id="barrier and shuffle",
        ),
        pytest.param(
            5,
            64,
            ["calls __shfl_sync(mask 0x00000001) at", "without naming itself"],
            id="not named",
        ),
        pytest.param(
            6, 64, ["calls __shfl_sync at", "with width=12, which is no power"], id="width"
        ),
        pytest.param(7, 64, ["threads 16-31 wait at __syncwarp(mask 0xffffffff) at"], id="masks"),
        pytest.param(3, 31, ["threads 0-29 wait at __shfl_sync(mask"], id="lanes that don't exist"),
    ],
)
def test_threads_that_do_not_meet(samples, defect, threads, texts):
    for seed in SEEDS:
        samples.set_seed(ctypes.c_uint64(seed))
        assert samples.meeting(defect, threads) == LAUNCH_FAILURE
        text = samples.error_text().decode()
        assert text.startswith("samples::meeting_kernel: block (")
        for expected in texts:
            assert expected in text
        assert "sample_kernels.cu:" in text
        string = samples.error_string(LAUNCH_FAILURE).decode()
        assert string == f"unspecified launch failure ({text})"
        # The threads left behind are forgotten: the next launch finds nothing of them.
        assert samples.meeting(0, threads) == 0


def test_a_missing_barrier_gives_a_wrong_sum_in_some_order(samples):
    values = np.random.default_rng(0).integers(1, 1000, (3, 256)).astype(np.float32)

    def right(barriers: bool) -> list[bool]:
        sums = np.zeros(3, np.float32)
        results = []
        for seed in SEEDS:
            samples.set_seed(ctypes.c_uint64(seed))
            assert samples.tree_sum(barriers, 3, pointer(values), pointer(sums)) == 0
            results.append(bool((sums == values.sum(1)).all()))
        return results

    assert all(right(True))
    assert not any(right(False))


def test_parameters_that_a_kernel_overwrites(samples):
    # Where calls are made in assembly, all blocks of a launch are given the same parameters.
    total = np.zeros(1, np.uint32)
    error = samples.overwriting(pointer(total))
    if error:
        assert (
            "wrote to the kernel's parameters, which are constant" in samples.error_text().decode()
        )
    else:
        assert total[0] == 16  # each thread with a copy of its own


SANITIZED = [
    pytest.param("clean", None, id="clean"),
    pytest.param("read", "heap-buffer-overflow", id="global memory"),
    pytest.param("shared_read", "insufficient space|global-buffer-overflow", id="shared memory"),
    pytest.param("vector_read", "misaligned address", id="misaligned vector"),
]


@pytest.mark.parametrize(("case", "complaint"), SANITIZED)
def test_sanitizers_see_what_small_kernels_do(case, complaint):
    done = emulator_build.run_sanitized(
        EMULATOR / "sanitized_samples.py", emulator_build.build_samples(sanitize=True), case
    )
    if complaint is None:
        assert done.returncode == 0, done.stderr
        assert done.stdout == "done\n"
    else:
        assert done.returncode != 0
        assert re.search(complaint, done.stderr), done.stderr
        assert f"samples::{case}_kernel" in done.stderr
        assert "sample_kernels.cu" in done.stderr


@pytest.fixture
def mutated(tmp_path):
    """A function: copy csrc/, replace one text in one file of cuda/, return the copy."""

    def mutate(file: str, old: str, new: str) -> Path:
        copy = tmp_path / "csrc"
        shutil.copytree(emulator_build.CSRC, copy, ignore=shutil.ignore_patterns("cpu"))
        path = copy / "cuda" / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{text.count(old)} times in {file}: {old!r}"
        path.write_text(text.replace(old, new), encoding="utf-8")
        return copy

    return mutate


STORE_WARP_SUM = "if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;\n"
STORE_SCALARS = "if constexpr (kAnchored) targets = streams;\n      }\n"


def outcome(path: Path, seed: int) -> list[np.ndarray]:
    """All that a norm and a step give, on new arrays."""
    library = kernel_library.KernelLibrary(path)
    state, grads, layers = kernel_library.make_case(kernel_library.SIZES)
    library.set_seed(seed)
    sums = library.layer_sums(grads, layers)
    norm_sq = library.adamw(state, grads, layers)
    return [sums, norm_sq, *(array for part in state for array in part)]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_gradlocs_kernels_do_not_depend_on_the_order():
    path = emulator_build.build_kernels()
    first = outcome(path, 0)
    state, grads, _ = kernel_library.make_case(kernel_library.SIZES)
    expected = [np.sum(g.astype(np.float64) ** 2) for g in grads]
    np.testing.assert_allclose(first[0], expected, rtol=1e-6)
    assert not same(first[2:4], [state[0][0], state[0][1]])
    for seed in SEEDS:
        assert same(outcome(path, seed), first), f"seed={seed}"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        pytest.param(
            "block_sum.cuh",
            f"{STORE_WARP_SUM}  __syncthreads();\n",
            STORE_WARP_SUM,
            id="sum of a block",
        ),
        pytest.param(
            "adamw.cuh",
            f"{STORE_SCALARS}      __syncthreads();\n",
            STORE_SCALARS,
            id="scalars of a chunk",
        ),
    ],
)
def test_a_barrier_taken_out_of_gradlocs_kernels(mutated, file, old, new):
    right = outcome(emulator_build.build_kernels(), 0)
    broken = emulator_build.build_kernels(csrc=mutated(file, old, new))
    wrong = [seed for seed in SEEDS if not same(outcome(broken, seed), right)]
    assert wrong, "no order showed the missing barrier"


def test_a_barrier_that_only_some_threads_of_gradlocs_kernel_reach(mutated):
    broken = emulator_build.build_kernels(
        csrc=mutated("adamw.cuh", "if (base == 0) {", "if (base == 0 && whole) {")
    )
    with pytest.raises(RuntimeError, match="unspecified launch failure") as raised:
        outcome(broken, 0)
    text = str(raised.value)
    assert "gradloc::cuda::adamw_kernel<false, false, false, 416>: block (" in text
    assert "wait at __syncthreads at adamw.cuh:" in text


@pytest.mark.parametrize(
    ("old", "new", "offset", "complaint"),
    [
        pytest.param("", "", 0, None, id="clean"),
        pytest.param("", "", 1, None, id="clean, odd addresses"),
        pytest.param(
            "raw.words[i] = at.index(i) < size ? base[at.index(i)] : 0u;",
            "raw.words[i] = base[at.index(i)];",
            0,
            "AddressSanitizer: heap-",
            id="out of bounds",
        ),
        pytest.param(
            "return (reinterpret_cast<uintptr_t>(address) & 15u) == 0;",
            "return address != nullptr;",
            1,
            "misaligned address",
            id="misaligned",
        ),
    ],
)
def test_sanitizers_see_what_gradlocs_kernels_do(mutated, old, new, offset, complaint):
    csrc = mutated("vectors.cuh", old, new) if old else emulator_build.CSRC
    path = emulator_build.build_kernels(sanitize=True, csrc=csrc)
    done = emulator_build.run_sanitized(EMULATOR / "kernel_library.py", path, offset)
    if complaint is None:
        assert done.returncode == 0, done.stderr
        assert done.stdout == "done\n"
    else:
        assert done.returncode != 0
        assert re.search(complaint, done.stderr), done.stderr
        assert "adamw_kernel" in done.stderr
