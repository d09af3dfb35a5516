"""The norms kernel, and the norms that AdamW takes on its way, against sums in float64.

Sums of many tensors and of long layers are in test_kernels_many.py.
"""

import itertools
import math

import pytest
import torch
from kernel_devices import embedded, guards_intact
from numerics import CHUNK, DTYPE_IDS, DTYPES, assert_same_bits, make_slot

from gradloc import ops
from gradloc.reference import AdamWGroup

GROUP = AdamWGroup(lr=0.0, beta1=0.9, beta2=0.99, eps=1.0, weight_decay=0.0, maximize=False)
SIZES = (
    *(0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 255, 256, 257),
    *(1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193),
    *(CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7),
)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)


def by_norms(grads, layers, num_layers, device):
    sizes = [0 if grad is None else grad.numel() for grad in grads]
    return ops.NativeNorms(sizes, layers, num_layers, device.torch_device).norm_sq(grads)


def by_adamw(grads, layers, num_layers, device):
    """The sums that a step takes; with a learning rate of 0."""
    slots = [
        device.slot(make_slot(torch.zeros(0 if grad is None else grad.numel()), layer=layer))
        for grad, layer in zip(grads, layers, strict=True)
    ]
    work = ops.NativeAdamW(slots, num_layers)
    scales = [1.0] * num_layers
    return work.step(work.gather(grads), [GROUP], scales, 1.0, with_norms=True, rounding_seed=None)


BOTH = pytest.mark.parametrize("sums_of", [by_norms, by_adamw], ids=["norms", "adamw"])


def check_sums(sums, grads, layers, num_layers, what=""):
    """Relative error at most 1e-6; exact infinities, NaN and zeros."""
    assert sums.dtype == torch.float64
    assert sums.shape == (num_layers,)
    for layer in range(num_layers):
        exact = math.fsum(
            float(grad.double().square().sum())
            for grad, of in zip(grads, layers, strict=True)
            if grad is not None and of == layer
        )
        ours = float(sums[layer])
        if math.isfinite(exact):
            assert abs(ours - exact) <= 1e-6 * exact, f"{what} layer {layer}: {ours}, {exact}"
        else:
            assert str(ours) == str(exact), f"{what} layer {layer}: {ours}, expected {exact}"


@BOTH
@pytest.mark.parametrize("before", [32, 33, 34, 67])
@EVERY_DTYPE
def test_sizes_and_alignments(device, dtype, before, sums_of):
    """Each tensor a layer of its own; what surrounds it is NaN and must not be read."""
    grads = [torch.randn(size).to(dtype) for size in SIZES]
    ours = [embedded(device.to(grad), before) for grad in grads]
    layers = list(range(len(SIZES)))
    check_sums(sums_of(ours, layers, len(SIZES), device), grads, layers, len(SIZES))
    assert all(guards_intact(grad) for grad in ours)


@BOTH
def test_every_start_of_a_vector(device, sums_of):
    """All offsets within 16 bytes, sizes on both sides of the first and second boundary."""
    cases = [(d, b, s) for d in DTYPES for b in range(32, 40) for s in range(1, 26)]
    grads = [torch.randn(size).to(dtype) for dtype, _, size in cases]
    moved = [embedded(device.to(g), before) for g, (_, before, _) in zip(grads, cases, strict=True)]
    layers = list(range(len(cases)))
    check_sums(sums_of(moved, layers, len(cases), device), grads, layers, len(cases))


# What float32 squares would overflow, lose bits of or round to zero, where the dtype has it.
SCALES = {
    torch.float32: (1.0, 1e30, 3e38, 1e19, 1e-18, 1e-20, 1e-22, 1e-25, 1e-40, 1.4e-45),
    torch.bfloat16: (1.0, 1e30, 3e38, 1e19, 1e-18, 1e-20, 1e-22, 1e-25, 1e-39),
    torch.float16: (1.0, 60000.0, 1e-3, 6e-5, 6e-8),
}
CASES = [(dtype, scale) for dtype in DTYPES for scale in SCALES[dtype]]


@BOTH
@pytest.mark.parametrize(("dtype", "scale"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_the_whole_range_of_the_dtype(device, dtype, scale, sums_of):
    grads = [
        (torch.rand(3000, dtype=torch.float64) * scale).to(dtype),  # nothing but that size
        torch.full((8,), scale).to(dtype),
        torch.cat([torch.full((1,), scale), torch.zeros(999)]).to(dtype),
        torch.cat([torch.full((5,), scale), torch.ones(995)]).to(dtype)[torch.randperm(1000)],
    ]
    assert all(grad.double().abs().sum() > 0 for grad in grads)
    layers = list(range(len(grads)))
    sums = sums_of([device.to(grad) for grad in grads], layers, len(grads), device)
    check_sums(sums, grads, layers, len(grads))


@BOTH
@EVERY_DTYPE
def test_not_finite_and_zero(device, dtype, sums_of):
    """A NaN or an infinity shows in its layer and in no other; zeros are exactly 0."""
    infinite, both, zeros = (torch.randn(CHUNK + 300).to(dtype) for _ in range(3))
    infinite[CHUNK + 7] = -torch.inf
    both[3], both[CHUNK] = torch.inf, torch.nan
    zeros.fill_(-0.0)
    ordinary = torch.randn(77).to(dtype)
    grads = [infinite, ordinary, both, zeros, ordinary]
    layers = [0, 1, 2, 3, 4]
    sums = sums_of([device.to(grad) for grad in grads], layers, 5, device)
    check_sums(sums, grads, layers, 5)
    assert sums.tolist()[3] == 0.0
    assert math.isnan(sums[2])
    assert float(sums[0]) == math.inf


@BOTH
def test_layers_without_gradients(device, sums_of):
    """Empty layers, layers whose tensors have none, tensors in no order of layers."""
    grads = [torch.randn(n) if n is not None else None for n in (500, None, 0, 40000, None, 9, 1)]
    layers = [5, 0, 2, 1, 5, 1, 7]
    ours = [None if grad is None else device.to(grad) for grad in grads]
    sums = sums_of(ours, layers, 9, device)
    check_sums(sums, grads, layers, 9)
    assert [layer for layer in range(9) if float(sums[layer])] == [1, 5, 7]


def test_mixed_dtypes_in_one_launch(device):
    kinds = list(itertools.product(DTYPES, (1, 2047, CHUNK + 9)))
    grads = [torch.randn(size).to(dtype) for dtype, size in kinds]
    layers = [i % 4 for i in range(len(grads))]
    ours = [device.to(grad) for grad in grads]
    work = ops.NativeNorms([g.numel() for g in grads], layers, 4, device.torch_device)
    sums = []
    assert device.launches(lambda: sums.append(work.norm_sq(ours))) == ["norms_kernel"]
    check_sums(sums[0], grads, layers, 4)
    # The dtypes may change from call to call: tables are written anew.
    others = [grad.to(DTYPES[i % 3]) for i, grad in enumerate(grads)]
    check_sums(work.norm_sq([device.to(grad) for grad in others]), others, layers, 4)
    assert_same_bits(work.norm_sq(ours), sums[0])


def test_nothing(device):
    work = ops.NativeNorms([], [], 3, device.torch_device)
    assert work.norm_sq([]).tolist() == [0.0, 0.0, 0.0]
