"""Types of the compiled module; tests/test_stub.py compares them with the module itself."""

from collections.abc import Sequence
from typing import Any

CHUNK_ELEMENTS: int

# In builds with CUDA only, as are the two Cuda classes and the three functions that follow.
MAX_INLINE_TENSORS: int
MAX_INLINE_GROUPS: int
GROUP_BYTES: int

def build_info() -> dict[str, Any]: ...
def select_simd(name: str) -> None: ...
def kernel_problem(device: int) -> str: ...
def write_groups(
    out: int, groups: Sequence[tuple[float, float, float, float, float, bool, int]]
) -> None: ...
def write_gradients(out: int, grads: Gradients) -> None: ...

class Gradients:
    def __init__(
        self, addresses: Sequence[int], codes: Sequence[int], kept: Sequence[object]
    ) -> None: ...
    @property
    def addresses(self) -> list[int]: ...
    @property
    def all_present(self) -> bool: ...
    @property
    def codes(self) -> list[int]: ...
    @property
    def present(self) -> list[bool]: ...
    @property
    def kept(self) -> list[Any]: ...

class TorchInterface:
    def __init__(
        self,
        functions: object,
        codes: object,
        tensor: object,
        handle: object,
        parameter_class: object,
    ) -> None: ...
    def describe(self, tensor: object) -> Any: ...
    def describe_grad(self, param: object) -> Any: ...

class TensorWatch:
    def __init__(
        self,
        interface: object,
        groups: object,
        states: object,
        active: object,
        layers: Sequence[int],
    ) -> None: ...
    @property
    def layers_with_grad(self) -> frozenset[int]: ...
    def remember(self, parts: Sequence[Sequence[int]]) -> bool: ...
    def unchanged(self) -> bool: ...
    def gradients(self) -> list[Gradients] | None: ...

class NormWork:
    def __init__(self, sizes: Sequence[int], layers: Sequence[int], num_layers: int) -> None: ...
    def norm_sq(self, grads: Gradients, out: int, num_threads: int) -> None: ...

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
        anchors: Sequence[int],
        anchor_dtypes: Sequence[int],
    ) -> None: ...
    def norm_sq(self, grads: Gradients, out: int, num_threads: int) -> None: ...
    def step(
        self,
        grads: Gradients,
        groups: Sequence[tuple[float, float, float, float, float, bool]],
        scales: Sequence[float],
        clip_coef: float,
        norm_sq_out: int,
        rounding_seed: int | None,
        recadam: tuple[float, float, float, int] | None,
        num_threads: int,
    ) -> None: ...

class CudaNormWork:
    def __init__(self, sizes: Sequence[int], layers: Sequence[int], num_layers: int) -> None: ...
    @property
    def table_bytes(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...
    def written_for(self, grads: Gradients) -> bool: ...
    def write_tables(self, out: int, grads: Gradients) -> None: ...
    def norm_sq(
        self,
        tables: int,
        scratch: int,
        grads: Gradients,
        grad_table: int,
        out: int,
        device: int,
        stream: int,
    ) -> None: ...

class CudaAdamWWork:
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
        anchors: Sequence[int],
        anchor_dtypes: Sequence[int],
    ) -> None: ...
    @property
    def table_bytes(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...
    def written_for(self, grads: Gradients) -> bool: ...
    def write_tables(self, out: int, grads: Gradients, scales: Sequence[float]) -> None: ...
    def norm_sq(
        self,
        tables: int,
        scratch: int,
        grads: Gradients,
        grad_table: int,
        out: int,
        control: int,
        max_norm: float,
        skip_nonfinite: bool,
        found_inf: int,
        grad_scale: int,
        device: int,
        stream: int,
    ) -> None: ...
    def step(
        self,
        tables: int,
        scratch: int,
        grads: Gradients,
        grad_table: int,
        groups: Sequence[tuple[float, float, float, float, float, bool, int]],
        group_table: int,
        control: int,
        grad_coef: float,
        norm_sq_out: int,
        rounding_seed: int | None,
        recadam: tuple[float, float, float, int] | None,
        device: int,
        stream: int,
    ) -> None: ...
