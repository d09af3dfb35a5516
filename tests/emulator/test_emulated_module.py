"""gradloc's bindings on the emulator, and their build: devices, streams, failures, the record.

What the kernels compute is the subject of test_kernels_*.py.
"""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import emulator_build
import pytest
import torch

from gradloc import _C

TENSORS = 3
SIZE = 40_000  # two chunks


@pytest.fixture(scope="module")
def module():
    return emulator_build.load(emulator_build.build())


@pytest.fixture(autouse=True)
def _reset(module):
    module.reset()
    yield
    module.reset()


def norm_sq(module, device: int = 0, stream: int = 0) -> torch.Tensor:
    """Sums of squares of two layers; -1 where nothing was written."""
    work = module.CudaNormWork([SIZE] * TENSORS, [0, 1, 0], 2)
    grads = [torch.full((SIZE,), float(i + 1)) for i in range(TENSORS)]
    gradients = _C.Gradients([grad.data_ptr() for grad in grads], [0] * TENSORS, grads)
    tables = torch.empty(work.table_bytes, dtype=torch.uint8)
    scratch = torch.zeros(work.scratch_bytes, dtype=torch.uint8)
    out = torch.full((2,), -1.0, dtype=torch.float64)
    work.write_tables(tables.data_ptr(), gradients)
    try:
        work.norm_sq(
            tables.data_ptr(), scratch.data_ptr(), gradients, 0, out.data_ptr(), device, stream
        )
    except RuntimeError as error:
        assert out.tolist() == [-1.0, -1.0], "a launch that failed wrote"
        assert not scratch.any()
        raise error
    return out


EXPECTED = [SIZE * 10.0, SIZE * 4.0]


def test_a_launch_is_recorded(module):
    stream = module.new_stream(1)
    assert norm_sq(module).tolist() == EXPECTED
    assert norm_sq(module, 1, stream).tolist() == EXPECTED
    first, second = module.launches()
    assert first.kernel == "gradloc::cuda::norms_kernel<416>"
    assert (first.grid, first.block) == ((6, 1, 1), (256, 1, 1))
    assert 8 * 416 < first.param_bytes <= 4096
    assert (first.stream, first.device) == (0, 0)
    assert (second.stream, second.device) == (stream, 1)
    assert module.current_device() == 0, "the caller's device was not set again"
    module.clear_launches()
    assert module.launches() == []


@pytest.mark.parametrize(
    ("device", "stream_device", "pattern"),
    [
        (0, 1, r"invalid resource handle \(.*norms_kernel<416>: stream 16 belongs to device 1"),
        (1, 0, r"stream 16 belongs to device 0, the current device is 1"),
        (0, None, r"there is no stream 77\).*cudaErrorInvalidResourceHandle"),
        (2, 0, r"cudaSetDevice\(2\) failed: invalid device ordinal"),
        (-1, 0, r"cudaSetDevice\(-1\) failed: invalid device ordinal"),
    ],
)
def test_streams_and_devices_that_do_not_fit(module, device, stream_device, pattern):
    stream = 77 if stream_device is None else module.new_stream(stream_device)
    with pytest.raises(RuntimeError, match=pattern):
        norm_sq(module, device, stream)
    assert module.launches() == []
    assert module.current_device() == 0
    assert norm_sq(module).tolist() == EXPECTED


def test_no_device(module):
    module.set_device_count(0)
    with pytest.raises(RuntimeError, match="no CUDA-capable device is detected"):
        norm_sq(module)
    module.set_device_count(1)
    assert norm_sq(module).tolist() == EXPECTED
    with pytest.raises(ValueError, match="device=1: there are 1"):
        module.new_stream(1)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (2, "out of memory"),
        (209, "no kernel image is available for execution on the device"),
        (701, "too many resources requested for launch"),
        (719, "unspecified launch failure"),
        (12345, "unrecognized error code"),
    ],
)
def test_a_launch_that_shall_fail_fails_once(module, error, name):
    module.fail_next_launch(error)
    with pytest.raises(RuntimeError, match=rf"cudaLaunchKernelEx\(norms_kernel\) failed: {name}"):
        norm_sq(module)
    assert module.launches() == []
    assert "because a test wants it to" in module.last_error_text()
    assert norm_sq(module).tolist() == EXPECTED


def test_what_did_not_change_is_not_compiled_again(monkeypatch):
    path = emulator_build.build()

    def fail(*_args):
        raise AssertionError("a compiler was run")

    monkeypatch.setattr(emulator_build, "_run", fail)
    assert emulator_build.build() == path
    with pytest.raises(AssertionError, match="a compiler was run"):
        emulator_build.build_samples(defines=["NEVER_SEEN_BEFORE"])


def test_what_the_compiler_says_is_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(emulator_build, "FOLDER", tmp_path)
    monkeypatch.setattr(emulator_build, "RUNTIME", ())
    with pytest.raises(RuntimeError, match=r"cuda_runtime\.h:\d+:\d+: note: in expansion of"):
        emulator_build.build_samples(defines=["make_uint4=7"])
    assert [path for path in tmp_path.rglob("*") if path.suffix in {".o", ".so"}] == []


def test_two_processes_may_build_at_once(tmp_path):
    code = f"""
        import ctypes, sys
        from pathlib import Path
        sys.path.insert(0, {str(emulator_build.TESTS)!r})
        import emulator_build
        emulator_build.FOLDER = Path({str(tmp_path)!r})
        path = emulator_build.build_samples()
        assert ctypes.CDLL(str(path)).meeting(0, 32) == 0
        print(path)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with ThreadPoolExecutor(2) as pool:
        done = list(
            pool.map(
                lambda _: subprocess.run(command, capture_output=True, text=True, timeout=120),
                range(2),
            )
        )
    assert [process.returncode for process in done] == [0, 0], done
    assert done[0].stdout == done[1].stdout
    assert [path.suffix for path in tmp_path.rglob("samples*")] == [".so"]
