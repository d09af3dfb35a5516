"""Every float16 and bfloat16 bit pattern through the core's loads and stores, against torch's."""

import math

import pytest
import torch
from numerics import assert_same_bits, make_slot, misaligned

from gradloc import ops
from gradloc.reference import AdamWGroup

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def one_step(slots, grads, *, lr=0.0, beta1=0.9, beta2=0.99, weight_decay=0.0):
    work = ops.NativeAdamW(slots, 1)
    group = AdamWGroup(lr, beta1, beta2, 1e-8, weight_decay, maximize=False)
    work.step(work.gather(grads), [group], [1.0], 1.0, with_norms=False, rounding_seed=None)


@HALVES
def test_single_elements_square_exactly(simd, dtype):
    """65,536 tensors of one element: the load of a tail."""
    values = all_patterns(dtype)
    work = ops.NativeNorms([1] * len(values), range(len(values)), len(values))
    assert_same_bits(work.norm_sq(values.split(1)), values.double() ** 2, "squares")


@HALVES
@pytest.mark.parametrize("shift", [0, 5])
def test_gradients_load_exactly(simd, dtype, shift):
    """With beta1 = 0 the first moment is the gradient; whole vectors, and 5 elements off."""
    grad = all_patterns(dtype).roll(shift)
    slot = make_slot(torch.zeros(len(grad)))
    one_step([slot], [misaligned(grad)], beta1=0.0)
    # g - (g - 0)·0: an infinity becomes NaN there, as it does in torch.
    expected = torch.zeros(len(grad)).lerp(grad.float(), 1.0)
    finite = grad.isfinite()
    assert torch.equal(expected[finite], grad.float()[finite])
    assert_same_bits(slot.exp_avg, expected + 0.0, "exp_avg")  # the sign of a zero is lost


@HALVES
def test_a_step_of_length_zero_keeps_the_bits(simd, dtype):
    before = all_patterns(dtype)
    slot = make_slot(misaligned(before))
    one_step([slot], [torch.ones(len(before))])
    assert_same_bits(slot.param, before, "param")


# Products of an 11-bit or 8-bit significand with these reach ties in both directions, subnormals,
# zero, the largest finite numbers and infinity.
FACTORS = [0.5, 1.5, 1 + 2.0**-9, 1 - 2.0**-12, 1 + 2.0**-8 + 2.0**-20, 3.0, 1000.0, 2.0**-10]
FACTORS += [3 * 2.0**-12, 2.0**-20, -1.0, 1.0009765625, 0.9999999403953552]


@HALVES
def test_stores_round_as_torch_rounds(simd, dtype):
    """The decay multiplies in float32 and the store rounds: p ← round(p·factor)."""
    before = all_patterns(dtype)
    random = torch.rand(12, dtype=torch.float32).mul(2).tolist()
    for factor in [*FACTORS, *random]:
        slot = make_slot(misaligned(before))
        # decay = 1 - lr·weight_decay; exact in float64 for these factors.
        one_step([slot], [torch.zeros(len(before))], lr=1.0, weight_decay=1.0 - factor)
        expected = (before.float() * torch.tensor(factor)).to(dtype)
        assert_same_bits(slot.param, expected, f"factor {factor!r}")


@HALVES
def test_nan_is_stored_as_nan(simd, dtype):
    """Also NaN whose payload would carry into the sign when rounded up, and become a zero."""
    slot = make_slot(torch.ones(32, dtype=dtype))
    payload = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    slot.exp_avg.copy_(payload.repeat(16))
    one_step([slot], [torch.zeros(32)], lr=1.0, beta1=0.9)
    assert slot.param.isnan().all()
    assert all(math.isnan(x) for x in slot.exp_avg.tolist())
