"""Types of the compiled module; tests/test_stub.py compares them with the module itself."""

from collections.abc import Sequence
from typing import Any

CHUNK_ELEMENTS: int

def build_info() -> dict[str, Any]: ...
def select_simd(name: str) -> None: ...

class NormWork:
    def __init__(self, sizes: Sequence[int], layers: Sequence[int], num_layers: int) -> None: ...
    def norm_sq(
        self, grads: Sequence[int], grad_dtypes: Sequence[int], out: int, num_threads: int
    ) -> None: ...

class AdamWWork:
    def __init__(
        self,
        sizes: Sequence[int],
        layers: Sequence[int],
        num_layers: int,
        params: Sequence[int],
        param_dtypes: Sequence[int],
        moment_dtypes: Sequence[int],
        exp_avgs: Sequence[int],
        exp_avg_sqs: Sequence[int],
        max_exp_avg_sqs: Sequence[int],
        steps: Sequence[int],
        groups: Sequence[int],
        tensor_ids: Sequence[int],
        first_elements: Sequence[int],
    ) -> None: ...
    def norm_sq(
        self, grads: Sequence[int], grad_dtypes: Sequence[int], out: int, num_threads: int
    ) -> None: ...
    def step(
        self,
        grads: Sequence[int],
        grad_dtypes: Sequence[int],
        groups: Sequence[tuple[float, float, float, float, float, bool]],
        scales: Sequence[float],
        clip_coef: float,
        norm_sq_out: int,
        rounding_seed: int | None,
        num_threads: int,
    ) -> None: ...
