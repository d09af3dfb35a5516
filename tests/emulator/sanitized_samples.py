"""Runs one of the small kernels in a process where a sanitizer watches: PATH_OF_LIBRARY CASE.

Not a test by itself; test_emulator_defects.py says what must come out.
"""

import ctypes
import sys

import numpy as np

LAUNCH_FAILURE = 719


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def run_small_kernels(path: str, case: str) -> None:
    """Everything right, or one wrong access."""
    samples = ctypes.CDLL(path)
    values = np.arange(256, dtype=np.float32)
    out = np.zeros(4, np.float32)
    if case == "clean":
        for seed in range(8):
            samples.set_seed(ctypes.c_uint64(seed))
            assert samples.tree_sum(True, 1, pointer(values), pointer(out)) == 0
            assert out[0] == values.sum()
            # Threads left in the middle leave nothing behind that a sanitizer would stumble over.
            assert samples.meeting(1 + seed % 7, 64) == LAUNCH_FAILURE
        assert samples.read(pointer(values), 255, pointer(out)) == 0
        assert samples.shared_read(255, pointer(out)) == 0
        assert samples.vector_read(pointer(values), 16, pointer(out)) == 0
        print("done")
    elif case == "read":
        samples.read(pointer(values), 256, pointer(out))
    elif case == "shared_read":
        samples.shared_read(256, pointer(out))
    elif case == "vector_read":
        samples.vector_read(pointer(values), 4, pointer(out))


if __name__ == "__main__":
    run_small_kernels(*sys.argv[1:])
