"""The C functions of kernel_driver.cpp for tests: arrays in, arrays out. Needs numpy, not torch.

Run as a script it does one step and one norm under a sanitizer, see test_emulator_defects.py.
"""

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 2}
# More than a chunk, and a chunk in which some threads have a whole group and others don't.
SIZES = (1500, 33000)


class Tensors(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int),
        ("num_layers", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("sizes", "layers", "grad_dtypes", "grads")),
    )


def addresses(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([array.ctypes.data for array in arrays], dtype=np.uint64)


class KernelLibrary:
    """One compiled copy of the core. Each call raises RuntimeError with the core's message."""

    def __init__(self, path: Path | str) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.error_text.restype = ctypes.c_char_p

    def set_seed(self, seed: int) -> None:
        self._library.set_seed(ctypes.c_uint64(seed))

    def layer_sums(self, grads: Sequence[np.ndarray], layers: Sequence[int]) -> np.ndarray:
        """Sums of squares by layer."""
        out = np.full(max(layers) + 1, np.nan)
        tensors, _kept = self._tensors(grads, layers)
        self._check(
            self._library.layer_sums(ctypes.byref(tensors), ctypes.c_void_p(out.ctypes.data))
        )
        return out

    def adamw(self, state: Sequence[Sequence[np.ndarray]], grads, layers) -> np.ndarray:
        """One step in place; state: parameters, moments, squared moments, step counts."""
        out = np.full(max(layers) + 1, np.nan)
        tensors, _kept = self._tensors(grads, layers)
        table = addresses([array for part in state for array in part])
        self._check(
            self._library.adamw(
                ctypes.byref(tensors),
                ctypes.c_void_p(table.ctypes.data),
                ctypes.c_void_p(out.ctypes.data),
            )
        )
        return out

    def _tensors(self, grads, layers) -> tuple[Tensors, list[np.ndarray]]:
        kept = [
            np.array([grad.size for grad in grads], dtype=np.int64),
            np.array(layers, dtype=np.int32),
            np.array([DTYPES[grad.dtype] for grad in grads], dtype=np.int32),
            addresses(grads),
        ]
        return Tensors(len(grads), max(layers) + 1, *(array.ctypes.data for array in kept)), kept

    def _check(self, failed: int) -> None:
        if failed:
            raise RuntimeError(self._library.error_text().decode())


def make_case(sizes: Sequence[int], offset: int = 0):
    """Reproducible (state, grads, layers); every array begins `offset` elements into its memory."""
    draw = np.random.default_rng(0)

    def array(size: int) -> np.ndarray:
        return draw.standard_normal(size + offset).astype(np.float32)[offset:]

    params, moments, grads = ([array(size) for size in sizes] for _ in range(3))
    squares = [array(size) ** 2 for size in sizes]
    steps = [np.array([2.0], dtype=np.float32) for _ in sizes]
    return [params, moments, squares, steps], grads, [i % 2 for i in range(len(sizes))]


if __name__ == "__main__":
    library = KernelLibrary(sys.argv[1])
    state, grads, layers = make_case(SIZES, offset=int(sys.argv[2]))
    library.layer_sums(grads, layers)
    library.adamw(state, grads, layers)
    print("done")
