"""Stochastic rounding as gradloc.reference specifies it: its bits, its mean, what it saves.

That the compiled core gives the same bits is in test_ops_rounding.py. All draws are fixed by their
keys, so that a bound of 4 or 5 standard deviations never fails by chance.
"""

import functools
import itertools
import math

import pytest
import torch
from numerics import assert_same_bits, assert_within, make_slot

from gradloc import ops, reference
from gradloc.backends import ReferenceAdamW
from gradloc.reference import AdamWGroup, Rounding

MASK = 2**32 - 1
BACKENDS = pytest.mark.parametrize("backend", [ReferenceAdamW, ops.NativeAdamW])


STREAMS = list(reference.RANDOM_STREAMS.values())


def words(seed=3, step=1, tensor=0, elements=range(2**14), word=0):
    return reference.random_words(
        seed, step, tensor, torch.tensor(list(elements), dtype=torch.int64), word=word
    )


def in_plain_integers(seed, step, tensor, element):
    """Both words of an element, written a second time with Python's integers."""

    def wide(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    def narrow(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    key = wide((seed + 0x9E3779B97F4A7C15) % 2**64)
    key = wide(((key ^ step) + 0x9E3779B97F4A7C15) % 2**64)
    key = wide(((key ^ tensor) + 0x9E3779B97F4A7C15) % 2**64)
    low = narrow((element & MASK) ^ (key & MASK))
    first = narrow((low + narrow((element >> 32) ^ (key >> 32))) % 2**32)
    return [first, narrow((first + 0x9E3779B9) % 2**32)]


def test_words_are_the_specified_ones():
    elements = [0, 1, 31, 2**16, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 12345]
    keys = [(0, 0, 0), (1, 2, 3), (2**64 - 1, 2**24, 10**6), (17, 1, 0)]
    for key in keys:
        expected = [in_plain_integers(*key, element) for element in elements]
        found = [words(*key, elements, word).tolist() for word in (0, 1)]
        assert [list(pair) for pair in zip(*found, strict=True)] == expected, key
    assert torch.equal(words(seed=-1), words(seed=2**64 - 1))


def test_words_never_change():
    """A resumed run continues with the bits of its first half, also after an update of gradloc."""
    assert words(1, 2, 3, [0, 1, 2**32 + 5]).tolist() == [4164629371, 2502913791, 3215858763]
    second = words(1, 2, 3, [0, 1, 2**32 + 5], word=1).tolist()
    assert second == [2236417278, 892062176, 281503178]


# The ways in which two draws of the same element can differ, or two elements of the same draw.
COUNT = 2**14
ALONG = {
    "elements": lambda word: words(word=word),
    "elements from 2^32 - 2^13": lambda word: words(
        elements=range(2**32 - 2**13, 2**32 + 2**13), word=word
    ),
    "every 4,096th element": lambda word: words(elements=range(0, COUNT * 4096, 4096), word=word),
    "steps": lambda word: torch.cat([words(3, t, 0, [7], word) for t in range(1, COUNT + 1)]),
    "tensors": lambda word: torch.cat([words(3, 1, t, [7], word) for t in range(COUNT)]),
    "seeds": lambda word: torch.cat([words(s, 1, 0, [7], word) for s in range(COUNT)]),
}


@functools.cache
def drawn_along(along, word):
    return ALONG[along](word)


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("word", [0, 1])
def test_words_are_uniform_and_independent_along(along, word):
    drawn = drawn_along(along, word)
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((drawn >> shift) & 0xFF, minlength=256).double()
        expected = COUNT / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        # 255 degrees of freedom: mean 255, standard deviation 22.6.
        assert 255 - 4.5 * 22.6 < chi_square < 255 + 4.5 * 22.6, f"byte {shift // 8}"
    for lag in (1, 2, 16):
        assert_uncorrelated(drawn[:-lag], drawn[lag:], f"{along}, lag {lag}")


def signs(drawn, num_bits):
    """Bits as -1 and 1, [num_bits, count]."""
    return torch.stack([(drawn >> i) & 1 for i in range(num_bits)]).double() * 2 - 1


def assert_uncorrelated(a, b, what, num_bits=32):
    """No bit of a tells of a bit of b: their correlations deviate by 1/sqrt(count) from 0."""
    correlation = signs(a, num_bits) @ signs(b, num_bits).t() / math.sqrt(len(a))
    worst = float(correlation.abs().max())
    assert worst < 5.5, f"{what}: {worst:.1f} standard deviations"


OTHERS = {
    "step": {"step": 2},
    "distant step": {"step": 1 + 2**16},
    "tensor": {"tensor": 1},
    "seed": {"seed": 2},
    "step and tensor": {"step": 0, "tensor": 1},
    "half": {"elements": range(2**32, 2**32 + COUNT)},
    "word": {"word": 1},
}


@pytest.mark.parametrize("other", OTHERS)
def test_words_are_independent_of_those_with_another(other):
    first, second = words(), words(**OTHERS[other])
    assert_uncorrelated(first, second, other)
    equal = int(((first ^ second) & 0xFF == 0).sum())
    assert abs(equal - COUNT / 256) < 4.5 * math.sqrt(COUNT / 256), other


def test_the_four_streams_are_independent():
    halves = [words(word=word) >> shift & 0xFFFF for word, shift in STREAMS]
    assert len(set(STREAMS)) == 4
    for a, b in itertools.combinations(halves, 2):
        assert_uncorrelated(a, b, "streams", num_bits=16)
        joint = torch.bincount((a & 0xF) << 4 | (b & 0xF), minlength=256).double()
        assert 255 - 102 < float(((joint - COUNT / 256) ** 2 / (COUNT / 256)).sum()) < 255 + 102


VALUES = (1.001, -1.001, 1 + 2.0**-9, -3.14159, 2.0**-126 * 1.01, 1e-39, -1e-41, 3.3e38, -7e33)


@pytest.mark.parametrize("value", VALUES)
def test_the_mean_over_all_random_numbers_is_the_value(value):
    """Exactly: of the 65,536 numbers as many round up as the value lies above its neighbour."""
    x = torch.full((2**16,), value)
    rounded = reference.round_to_bfloat16(x, torch.arange(2**16))
    assert len(rounded.unique()) == 2
    assert float(rounded.double().sum()) == float(x.double().sum())


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("shift", [0, 16])
def test_the_mean_over_draws_is_the_value(along, shift):
    drawn = drawn_along(along, 0) >> shift & 0xFFFF
    for value in VALUES:
        x = torch.full((COUNT,), value)
        rounded = reference.round_to_bfloat16(x, drawn).double()
        low, high = float(rounded.min()), float(rounded.max())
        exact = float(x[0].double())
        assert low <= exact <= high
        deviation = math.sqrt((high - exact) * (exact - low) / COUNT)
        assert abs(float(rounded.mean()) - exact) < 4.5 * deviation, value


def test_what_bfloat16_holds_never_moves():
    """All 65,536 patterns, infinities and both zeros among them; NaN stays NaN."""
    held = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    for number in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        drawn = torch.full(held.shape, number)
        assert_same_bits(reference.round_to_bfloat16(held.float(), drawn), held, f"{number:#x}")


def test_nan_with_a_payload_that_would_carry():
    payload = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    rounded = reference.round_to_bfloat16(payload, torch.full((3,), 0xFFFF))
    assert rounded.isnan().all()


def test_above_the_largest_bfloat16_the_neighbour_is_infinity():
    largest = torch.finfo(torch.float32).max  # 0x7F7FFFFF, bfloat16's 0x7F7F0000
    assert float(reference.round_to_bfloat16(torch.tensor([largest]), torch.tensor([0]))) < largest
    assert reference.round_to_bfloat16(torch.tensor([-largest]), torch.tensor([1])).isneginf()


def steps(backend, slot, grad, num_steps, rounding_seed, **changes):
    fields = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    group = AdamWGroup(**{**fields, **changes}, maximize=False)
    work = backend([slot], 1)
    for _ in range(num_steps):
        work.step(
            work.gather([grad]), [group], [1.0], 1.0, with_norms=False, rounding_seed=rounding_seed
        )


@BACKENDS
@pytest.mark.parametrize("start", [1.0, -3.0])
def test_a_thousand_updates_too_small_for_bfloat16(backend, start):
    """Each is 1e-5, bfloat16's spacing just below 1 is 3.9e-3: to nearest none of them is seen."""
    grad = torch.ones(4096)
    param = torch.full((4096,), start, dtype=torch.bfloat16)
    nearest, random = make_slot(param.clone()), make_slot(param.clone())
    steps(backend, nearest, grad, 1000, None)
    steps(backend, random, grad, 1000, 11)
    assert_same_bits(nearest.param, param, "to nearest")
    spacing = 2.0**-8 if start == 1.0 else 2.0**-6
    # 1,000 draws of `spacing` with probability 1e-5 / spacing each, averaged over 4,096 elements.
    deviation = math.sqrt(1000 * 1e-5 * spacing / 4096)
    assert abs(float(random.param.double().mean()) - (start - 0.01)) < 4 * deviation


@BACKENDS
def test_a_second_moment_in_bfloat16_decays(backend):
    """With beta2 = 0.999 each step takes less than half a bfloat16 ulp: to nearest it is stuck."""
    slots = [make_slot(torch.zeros(4096), moment_dtype=torch.bfloat16) for _ in range(2)]
    for slot, seed in zip(slots, (None, 5), strict=True):
        slot.exp_avg_sq.fill_(1.0)
        steps(backend, slot, torch.zeros(4096), 1000, seed)
    assert slots[0].exp_avg_sq.unique().tolist() == [1.0]
    # Exactly 0.999^1000 = 0.3677 on average; the scatter of one element measures below 0.1.
    scatter = float(slots[1].exp_avg_sq.double().std())
    assert 0.01 < scatter < 0.1
    error = float(slots[1].exp_avg_sq.double().mean()) - 0.999**1000
    assert abs(error) < 4 * scatter / math.sqrt(4096)


def test_element_positions():
    assert reference.element_positions(torch.zeros(2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert reference.element_positions(torch.zeros(3, 2).t()).tolist() == [[0, 2, 4], [1, 3, 5]]
    gaps = torch.zeros(2, 6)[:, ::2]
    assert reference.element_positions(gaps).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert reference.element_positions(torch.zeros(())).tolist() == 0
    assert reference.element_positions(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_rounded_is_what_is_stored_in_bfloat16(param_dtype):
    """Each stored moment is a bfloat16 neighbour of the float32 one; wider storage is untouched."""
    param, grad = torch.randn(500).to(param_dtype), torch.randn(500)
    group = AdamWGroup(1e-2, 0.9, 0.99, 1e-8, 0.1, maximize=False)

    def run(moment_dtype, rounding):
        slot = make_slot(param.clone(), amsgrad=True, moment_dtype=moment_dtype)
        moments = (slot.exp_avg, slot.exp_avg_sq, slot.max_exp_avg_sq, slot.step)
        reference.adamw_step(slot.param, grad, *moments, group=group, rounding=rounding)
        return slot

    wide, narrow = run(None, None), run(torch.bfloat16, Rounding(4, 2))
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        ours, exact = getattr(narrow, name), getattr(wide, name)
        assert ours.dtype == torch.bfloat16
        assert_within(ours, exact, exact.abs() * 2.0**-7, name)
        nearest = int((ours == exact.to(torch.bfloat16)).sum())
        assert 300 < nearest < 450, name  # a draw goes to the nearer neighbour 3 times of 4
    if param_dtype != torch.bfloat16:
        # The update is computed before the moments are rounded.
        assert_same_bits(narrow.param, wide.param, "param")
        assert_same_bits(run(None, Rounding(4, 2)).exp_avg, wide.exp_avg, "exp_avg")
