"""Layer norms of the compiled core against float64, and what the core takes at all.

AdamW is in test_ops_adamw.py, conversions between dtypes in test_ops_conversion.py.
"""

import itertools
import math
from pathlib import Path

import pytest
import torch
from numerics import (
    CHUNK,
    DTYPE_IDS,
    DTYPES,
    SIZES,
    THREADS,
    assert_same_bits,
    assert_within,
    exact_norm_sq,
    misaligned,
)

from gradloc import _C, ops


def norm_sq(grads, layers=None, num_layers=None):
    layers = list(range(len(grads))) if layers is None else layers
    num_layers = len(grads) if num_layers is None else num_layers
    sizes = [0 if grad is None else grad.numel() for grad in grads]
    return ops.NativeNorms(sizes, layers, num_layers).norm_sq(grads)


# Relative error of a sum of squares. Of float32 gradients: products are exact in float64, and n
# additions there lose at most n·2^-53. Of half-width ones: runs of 16 exact squares are added in
# float32, which loses at most 15·2^-24 = 8.9e-7, still under the promised 1e-6.
SUM_BOUND = {torch.float32: 1e-12, torch.bfloat16: 9e-7, torch.float16: 9e-7}


def relative_error(ours: torch.Tensor, exact: list[float]) -> float:
    expected = torch.tensor(exact, dtype=torch.float64)
    return float(((ours - expected).abs() / expected.clamp(min=1e-300)).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_norms_of_every_size_misaligned(simd, dtype):
    grads = [misaligned(torch.randn(size).to(dtype)) for size in SIZES]
    ours = norm_sq(grads)
    assert ours.dtype == torch.float64
    assert ours[SIZES.index(0)] == 0
    assert relative_error(ours, [exact_norm_sq(grad) for grad in grads]) < SUM_BOUND[dtype]


def test_norms_of_mixed_dtypes_by_layer_with_missing_gradients(simd):
    sizes = [5, CHUNK + 1, 70, 0, 33, 1]
    dtypes = [*DTYPES, *DTYPES]
    grads = [torch.randn(n).to(dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
    grads[4] = None
    layers = [3, 0, 3, 1, 0, 2]
    ours = norm_sq(grads, layers, num_layers=6)
    exact = [
        exact_norm_sq(*(g for g, at in zip(grads, layers, strict=True) if at == layer))
        for layer in range(6)
    ]
    assert relative_error(ours, exact) < 9e-7
    assert ours[[1, 4, 5]].tolist() == [0, 0, 0]


def test_many_tiny_tensors_beside_one_huge(simd):
    sizes = [1 + i % 7 for i in range(400)]
    sizes.insert(200, 20 * CHUNK + 3)
    grads = [torch.randn(size) for size in sizes]
    layers = [i % 13 for i in range(len(sizes))]
    exact = [exact_norm_sq(*grads[layer::13]) for layer in range(13)]
    assert relative_error(norm_sq(grads, layers, 13), exact) < 1e-12


def test_a_second_call_forgets_the_first():
    """The scratch of the chunks is reused: a gradient that is missing now must count as 0."""
    first = [torch.ones(CHUNK + 2), torch.ones(3)]
    work = ops.NativeNorms([CHUNK + 2, 3], [0, 1], 2)
    assert work.norm_sq(first).tolist() == [CHUNK + 2, 3]
    assert work.norm_sq([None, 2 * first[1]]).tolist() == [0, 12]
    assert work.norm_sq(first).tolist() == [CHUNK + 2, 3]


@pytest.mark.parametrize("at", [0, 17, 64, CHUNK - 1, CHUNK, CHUNK + 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_nan_and_infinity_stay_in_their_layer(simd, dtype, at):
    grads = [torch.ones(CHUNK + 5, dtype=dtype) for _ in range(3)]
    grads[0][at] = math.nan
    grads[1][at] = -math.inf
    ours = norm_sq(grads)
    assert math.isnan(ours[0])
    assert ours[1] == math.inf
    assert ours[2] == CHUNK + 5


def test_float16_norm_beyond_its_own_range(simd):
    """torch._foreach_norm gives inf here (DESIGN §8)."""
    grad = torch.full((1000,), 2510.0, dtype=torch.float16)
    assert torch._foreach_norm([grad])[0].isinf()
    assert float(norm_sq([grad]).sqrt()) == pytest.approx(2510 * math.sqrt(1000), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_same_bits_for_any_threads_and_instruction_set(dtype, num_threads):
    grads = [torch.randn(size).mul(3.7).to(dtype) for size in SIZES]
    layers = [i % 3 for i in range(len(grads))]
    first = norm_sq(grads, layers, 3)
    try:
        for name, threads in itertools.product(ops.build_info()["simd_available"], THREADS):
            ops.select_simd(name)
            num_threads(threads)
            for _ in range(3):  # a race would not show every time
                ours = norm_sq(grads, layers, 3)
                assert_same_bits(ours, first, f"{name}, {threads} threads")
    finally:
        ops.select_simd("auto")


# 1e-20 to 1e18, the small ones first: a float32 sum would lose them, or overflow.
MAGNITUDES = torch.logspace(-20, 18, 2**20, dtype=torch.float64).float()


@pytest.mark.parametrize("values", [torch.full((2**20,), 0.1), MAGNITUDES], ids=["0.1", "mixed"])
def test_large_sums(values):
    grad = values.repeat_interleave(64)
    exact = 64 * math.fsum((values.double() ** 2).tolist())
    assert relative_error(norm_sq([grad]), [exact]) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        # Each small square is half an ulp of the run's sum and is rounded away: the worst case.
        (torch.float16, [1.0] + [2.0**-12] * 15),
        (torch.bfloat16, [1.0] + [2.0**-12] * 15),
        # Squares that float32 cannot hold, or holds with few bits, or not with the others.
        (torch.bfloat16, [1e-25]),
        (torch.bfloat16, [1.1e-19, 1e-22]),
        (torch.bfloat16, [3e38]),
        (torch.bfloat16, [1e19, 1e-19]),
        (torch.bfloat16, [1e-13, 1e-20]),
        (torch.float16, [65504.0, 6e-8]),
        (torch.float16, [6e-8]),
    ],
)
def test_half_width_sums_at_the_edges_of_float32(simd, dtype, values):
    """Value i stands in all of the 64 lanes of run i, as the walk reads them."""
    grad = torch.tensor(values, dtype=dtype).repeat_interleave(64).repeat(40)[: CHUNK - 3]
    exact = math.fsum((grad.double() ** 2).tolist())
    assert relative_error(norm_sq([grad]), [exact]) < 9e-7


def free_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.skipif(free_bytes() < 2 * 2**30, reason="needs 2 GB of free memory")
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-12), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
    ids=["float32", "bfloat16", "float16"],
)
def test_a_billion_elements(dtype, bound):
    """The promise is a relative error under 1e-6 at 1e9 elements; float64 sums give far less.

    One tensor of 100 million elements stands in the list ten times, in one layer.
    """
    part = torch.randn(1_000_000).exp().to(dtype)
    grad = part.repeat(100)
    ours = ops.NativeNorms([grad.numel()] * 10, [0] * 10, 1).norm_sq([grad] * 10)
    exact = 1000 * math.fsum((part.double() ** 2).tolist())
    assert relative_error(ours, [exact]) < bound


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.ones(3, 4), True),
        (torch.ones(3, 4).t(), True),
        (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.ones(()), True),
        (torch.ones(0, 3), True),
        (torch.ones(10)[3:7], True),
        (torch.ones(10)[::2], False),
        (torch.ones(4, 4)[:, :2], False),
        (torch.ones(1).expand(5), False),
        (torch.ones(3, 4, dtype=torch.float64), False),
        (torch.ones(3, dtype=torch.int32), False),
        (torch.ones(3, device="meta"), False),
        (torch.ones(3, 3).to_sparse(), False),
        (torch._neg_view(torch.ones(3)), False),
        (torch.nn.Parameter(torch.ones(3).bfloat16()), True),
    ],
)
def test_runs_natively(tensor, expected):
    assert ops.runs_natively(tensor) is expected


def test_is_dense_against_the_set_of_addresses():
    for shape in [(2, 3), (1, 4), (3, 1, 2), (2, 2, 2)]:
        for strides in itertools.product(range(7), repeat=len(shape)):
            tensor = torch.zeros(64).as_strided(shape, strides)
            places = [
                sum(i * s for i, s in zip(index, strides, strict=True))
                for index in itertools.product(*map(range, shape))
            ]
            dense = sorted(places) == list(range(len(places)))
            assert ops.is_dense(tensor) is dense, (shape, strides)


def adamw_work(**changes):
    """A work of one tensor of four elements, with other arguments in place of some."""
    names = ["params", "param_dtypes", "moment_dtypes", "exp_avgs", "exp_avg_sqs"]
    names += ["max_exp_avg_sqs", "steps", "groups", "tensor_ids", "first_elements"]
    arguments = {"sizes": [4], "layers": [0], "num_layers": 1, "anchors": [], "anchor_dtypes": []}
    return _C.AdamWWork(**{**arguments, **{name: [0] for name in names}, **changes})


def step_of(work, recadam=None):
    """A step of one tensor, had it a gradient."""
    group = (1.0, 0.9, 0.9, 1.0, 0.0, False)
    work.step(_C.Gradients([0], [0], []), [group], [1.0], 1.0, 0, None, recadam, 1)


def norm_sq_of(gradients):
    """Norms of one tensor of four elements."""
    _C.NormWork([4], [0], 1).norm_sq(gradients, 0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.select_simd("sse9"), "simd='sse9' is not available here: choose one of auto"),
        (lambda: _C.NormWork([4], [0, 1], 2), "sizes and layers differ in length"),
        (lambda: _C.NormWork([4], [2], 2), "tensor 0 has a negative size or a layer out of range"),
        (lambda: _C.NormWork([-4], [0], 1), "tensor 0 has a negative size"),
        (lambda: norm_sq_of(_C.Gradients([], [], [])), "grads has 0 entries, expected 1"),
        (lambda: _C.Gradients([0], [7], []), "dtype code 7 is unknown"),
        (lambda: _C.Gradients([0], [], []), "codes has 0 entries, expected 1"),
        (
            lambda: adamw_work(steps=[]),
            "steps has 0 entries, expected 1",
        ),
        (lambda: adamw_work(tensor_ids=[]), "tensor_ids has 0 entries, expected 1"),
        (lambda: adamw_work(first_elements=[1, 2]), "first_elements has 2 entries, expected 1"),
        (lambda: adamw_work(moment_dtypes=[]), "moment_dtypes has 0 entries, expected 1"),
        (
            lambda: adamw_work(moment_dtypes=[2]),
            "moments of tensor 0 are float16: float32 or bfloat16",
        ),
        (lambda: adamw_work(anchors=[1, 1]), "anchors has 2 entries, expected 1"),
        (lambda: adamw_work(anchors=[1]), "anchor_dtypes has 0 entries, expected 1"),
        (
            lambda: adamw_work(anchors=[1], anchor_dtypes=[2]),
            "anchors of tensor 0 are float16: float32 or bfloat16",
        ),
        (lambda: step_of(adamw_work(groups=[3])), "group 3 has no hyperparameters"),
        (lambda: step_of(adamw_work(), (1.0, 0.5, 2.0, 0)), "recadam and anchors: both or neither"),
        (
            lambda: step_of(adamw_work(anchors=[1], anchor_dtypes=[0])),
            "recadam and anchors: both or neither",
        ),
        (
            lambda: step_of(adamw_work(anchors=[1], anchor_dtypes=[0]), (1.0, 0.5, 2.0, 3)),
            "anneal code 3 is unknown",
        ),
    ],
)
def test_the_core_refuses_lists_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_build_info():
    info = ops.build_info()
    assert info["simd"] == info["simd_available"][0]
    assert "plain" in info["simd_available"]
    assert isinstance(info["openmp"], bool)
    assert isinstance(info["cuda_status"], str)
    assert_within(torch.tensor(float(CHUNK)), torch.tensor(32768.0), 0.0, "the documented chunk")
