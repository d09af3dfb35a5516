"""What the tests of the numeric core share: sizes, misaligned tensors, and comparisons.

Comparisons say what the worst element is. Nothing here knows LocalizedAdamW.
"""

import copy
import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gradloc import _C, ops, reference

CHUNK = _C.CHUNK_ELEMENTS
# Both sides of every boundary: 16 lanes of a vector, 64 elements of the unrolled walk, the chunk.
SIZES = (
    *(0, 1, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65),
    *(CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_IDS = ("float32", "bfloat16", "float16")
THREADS = (1, 2, 3, 8)
SHAPES = ((5,), (17, 3), (), (0, 4), (40, 33))
ULP = 2.0**-23
_GUARD = 67  # elements before the slice: odd, and more than a step of the walk


def misaligned(values: Tensor) -> Tensor:
    """A copy that is a slice of a larger buffer at an odd offset, NaN on both sides of it.

    What is read beyond the slice shows as NaN in the result; `guards_intact` says whether something
    was written there.
    """
    buffer = torch.full((values.numel() + 2 * _GUARD,), torch.nan, dtype=values.dtype)
    part = buffer[_GUARD : _GUARD + values.numel()]
    part.copy_(values.flatten())
    return part


def guards_intact(part: Tensor) -> bool:
    """Whether the NaN around a `misaligned` slice are all there."""
    num_elements = part.untyped_storage().nbytes() // part.element_size()
    buffer = part.as_strided((num_elements,), (1,), 0)
    outside = torch.cat([buffer[:_GUARD], buffer[_GUARD + part.numel() :]])
    return bool(outside.isnan().all())


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns as integers."""
    return (
        tensor.detach()
        .contiguous()
        .view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])
    )


def assert_same_bits(ours: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal bit for bit; all NaN count as the same."""
    assert ours.dtype == expected.dtype, f"{what}: {ours.dtype} and {expected.dtype}"
    assert ours.shape == expected.shape, f"{what}: {ours.shape} and {expected.shape}"
    differ = bits(ours).ne(bits(expected)) & ~(ours.isnan() & expected.isnan())
    if differ.any():
        at = int(differ.flatten().nonzero()[0])
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} elements differ, the first at {at}: "
            f"{ours.flatten()[at].item()!r}, expected {expected.flatten()[at].item()!r}"
        )


def assert_within(ours: Tensor, expected: Tensor, bound: float | Tensor, what: str = "") -> None:
    """|ours - expected| <= bound, element by element in float64; a NaN is never within."""
    assert ours.shape == expected.shape, f"{what}: {ours.shape} and {expected.shape}"
    error = (ours.detach().double() - expected.detach().double()).abs().flatten()
    excess = error - torch.as_tensor(bound, dtype=torch.float64).expand(ours.shape).flatten()
    bad = ~(excess <= 0)
    if bad.any():
        at = int(torch.where(bad, excess.nan_to_num(nan=torch.inf), -torch.inf).argmax())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements are outside, the worst at {at}: "
            f"{ours.flatten()[at].item()!r}, expected {expected.flatten()[at].item()!r}, "
            f"error {error[at].item():.3g}, bound {(error - excess)[at].item():.3g}"
        )


def max_error(ours: Tensor, expected: Tensor) -> float:
    """The largest |ours - expected| in float64."""
    return float((ours.detach().double() - expected.detach().double()).abs().max())


def exact_norm_sq(*tensors: Tensor | None) -> float:
    """Sum of squares in float64, pairwise within each tensor."""
    return sum(float(t.double().square().sum()) for t in tensors if t is not None)


def make_slot(
    param: Tensor,
    *,
    amsgrad: bool = False,
    step: float = 0.0,
    layer: int = 0,
    group: int = 0,
    tensor: int = 0,
    first_element: int = 0,
    moment_dtype: torch.dtype | None = None,
    place=lambda moment: moment,
) -> ops.AdamWSlot:
    """A parameter with zero moments; `place` decides where each moment lies."""
    wide = moment_dtype or reference.compute_dtype(param.dtype)

    def zeros() -> Tensor:
        return place(torch.zeros_like(param, dtype=wide))

    return ops.AdamWSlot(
        param,
        zeros(),
        zeros(),
        zeros() if amsgrad else None,
        torch.tensor(step, dtype=torch.float32),
        layer,
        group,
        tensor,
        first_element,
    )


def copy_of(slot: ops.AdamWSlot) -> ops.AdamWSlot:
    """The same values and strides in other memory."""
    return dataclasses.replace(slot, **{k: t.clone() for k, t in tensors_of(slot).items()})


def tensors_of(slot: ops.AdamWSlot) -> dict[str, Tensor]:
    """Everything that a step may change."""
    found = {
        "param": slot.param,
        "exp_avg": slot.exp_avg,
        "exp_avg_sq": slot.exp_avg_sq,
        "max_exp_avg_sq": slot.max_exp_avg_sq,
        "step": slot.step,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def within_ulps(
    ours: Iterable[Tensor], theirs: Iterable[Tensor], ulps: float, what: str = ""
) -> None:
    """Float32 parameters agree; those of size 1 or below in ulps of 1, as updates do not shrink."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_within(a, b, ulps * ULP * b.detach().double().abs().clamp(min=1), f"{what} {i}")


def make_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Random parameters."""
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def twins(params: Iterable[Tensor]) -> list[Tensor]:
    """Another list with the same values and memory order."""
    return [copy.deepcopy(p) for p in params]


def give_gradients(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], skip: Sequence[int] = ()
) -> None:
    """The same random gradients to both; none to those at the positions in `skip`."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        grad = None if i in skip else torch.randn_like(a) * 10.0 ** -(i % 3)
        a.grad = grad
        b.grad = None if grad is None else grad.clone(memory_format=torch.preserve_format)
