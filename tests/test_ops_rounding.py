"""Moments in bfloat16 and stochastic rounding in the compiled core, against gradloc.reference.

The generator itself is judged in test_stochastic_rounding.py; float32 moments rounded to nearest
are in test_ops_adamw.py.
"""

import dataclasses
import itertools
import math

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
    copy_of,
    guards_intact,
    make_slot,
    misaligned,
    tensors_of,
)

from gradloc import ops, reference
from gradloc.backends import ReferenceAdamW
from gradloc.reference import AdamWGroup

GROUP = AdamWGroup(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, maximize=False)
BFLOAT16 = torch.bfloat16
# What is stored in bfloat16 and how, where the core has kernels of their own.
VARIANTS = [
    (torch.float32, BFLOAT16, None),
    (torch.float32, BFLOAT16, 7),
    (BFLOAT16, torch.float32, 7),
    (BFLOAT16, BFLOAT16, None),
    (BFLOAT16, BFLOAT16, 7),
    (torch.float16, BFLOAT16, 7),
]
IDS = [
    f"{str(p)[6:]}-{str(m)[6:]}-{'nearest' if seed is None else 'stochastic'}"
    for p, m, seed in VARIANTS
]
EVERY_VARIANT = pytest.mark.parametrize(("param_dtype", "moment_dtype", "seed"), VARIANTS, ids=IDS)


def step(slots, grads, seed, *, group=GROUP, backend=ops.NativeAdamW, with_norms=False):
    work = backend(slots, 1 + max(slot.layer for slot in slots))
    scales = [1.0] * (1 + max(slot.layer for slot in slots))
    return work.step(
        work.gather(grads), [group], scales, 1.0, with_norms=with_norms, rounding_seed=seed
    )


# With these a step multiplies the parameter by 63/64 and each moment by 15/16, exactly in float32
# and to more bits than bfloat16 has; with eps infinite and the gradient zero nothing is added.
EXACT = AdamWGroup(2.0**-6, 15 / 16, 15 / 16, math.inf, 1.0, maximize=False)
FIRSTS = [0, 5, 2**32 - 1000, 2**32 - CHUNK - 3, 2**40 + 2**32 - 8]


@pytest.mark.parametrize("first_element", FIRSTS)
@pytest.mark.parametrize(("seed", "t", "tensor"), [(0, 0, 0), (-5, 1233, 7), (2**63 + 9, 5, 10**6)])
def test_the_bits_are_the_specified_ones(simd, seed, t, tensor, first_element):
    """Bit for bit, in all four streams, also where the position's high word changes."""
    size = 2 * CHUNK + 77
    slot = make_slot(
        torch.randn(size, dtype=BFLOAT16),
        amsgrad=True,
        step=t,
        tensor=tensor,
        first_element=first_element,
        moment_dtype=BFLOAT16,
    )
    slot.exp_avg.normal_()
    slot.exp_avg_sq.uniform_(1e-3, 2)
    exact = {
        "param": slot.param.float() * (63 / 64),
        "exp_avg": slot.exp_avg.float() * (15 / 16),
        "exp_avg_sq": slot.exp_avg_sq.float() * (15 / 16),
        "max_exp_avg_sq": slot.exp_avg_sq.float() * (15 / 16),  # the maximum so far is 0
    }
    step([slot], [torch.zeros(size)], seed, group=EXACT)
    elements = torch.arange(first_element, first_element + size)
    for name, values in exact.items():
        word, shift = reference.RANDOM_STREAMS[name]
        drawn = reference.random_words(seed, t + 1, tensor, elements, word=word)
        expected = reference.round_to_bfloat16(values, (drawn >> shift) & 0xFFFF)
        assert_same_bits(tensors_of(slot)[name], expected, name)
        assert int((expected != values.to(BFLOAT16)).sum()) > size // 8  # nearest would fail


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=DTYPE_IDS)
@EVERY_VARIANT
def test_as_the_reference(simd, param_dtype, moment_dtype, seed, grad_dtype, amsgrad):
    """The float32 values differ by an ulp at times, and then a rounding may go the other way."""
    size = CHUNK + 77
    slot = make_slot(
        torch.randn(size).to(param_dtype),
        amsgrad=amsgrad,
        tensor=3,
        first_element=2**32 - 500,
        moment_dtype=moment_dtype,
    )
    for i in range(3):
        wanted = copy_of(slot)
        grad = (torch.randn(size) * 10.0**-i).to(grad_dtype)
        step([slot], [grad], seed)
        step([wanted], [grad], seed, backend=ReferenceAdamW)
        for name, ours in tensors_of(slot).items():
            expected = tensors_of(wanted)[name]
            ulp = torch.finfo(ours.dtype).eps
            if ours.dtype == torch.float32:
                assert_within(ours, expected, 2 * ulp * (expected.abs() + 0.1), name)
                continue
            # One place in the stored dtype, for hardly any element; smallest is a subnormal's.
            smallest = torch.finfo(ours.dtype).smallest_normal * ulp
            assert_within(ours, expected, (expected.double().abs() * ulp).clamp(min=smallest), name)
            same = float((ours == expected).double().mean())
            assert same > 0.999, f"{name}: {same:.5f} equal"


@EVERY_VARIANT
def test_every_size_is_a_shard_of_one_large_tensor(simd, param_dtype, moment_dtype, seed):
    """Where an element stands (tail, lane, chunk, alignment, shard) must not show.

    What lies on either side of a slice is neither read (it is NaN) nor written.
    """
    total = sum(SIZES)
    start, grad = torch.randn(total).to(param_dtype), torch.randn(total).to(param_dtype)
    first = 2**32 - total // 2 - 1
    whole = make_slot(
        start.clone(), amsgrad=True, tensor=9, first_element=first, moment_dtype=moment_dtype
    )
    offsets = itertools.accumulate(SIZES, initial=first)
    parts = [
        make_slot(
            misaligned(part),
            amsgrad=True,
            tensor=9,
            first_element=offset,
            moment_dtype=moment_dtype,
            place=misaligned,
        )
        for part, offset in zip(start.split(SIZES), offsets, strict=False)
    ]
    for _ in range(3):
        step([whole], [grad], seed)
        step(parts, [misaligned(part) for part in grad.split(SIZES)], seed)
    for name, expected in tensors_of(whole).items():
        if name != "step":
            joined = torch.cat([tensors_of(part)[name] for part in parts])
            assert_same_bits(joined, expected, name)
            assert all(guards_intact(tensors_of(part)[name]) for part in parts), name
    assert not torch.equal(whole.param, start)


def mixed_case():
    """Every variant's dtypes beside another, several chunks and tails, NaN and infinity."""
    slots, grads = [], []
    sizes = [CHUNK + 5, 129, 3 * CHUNK + 7, 64, 1, 2 * CHUNK, 40, 0]
    for i, size in enumerate(sizes):
        slot = make_slot(
            torch.randn(size).to(DTYPES[i % 3]),
            amsgrad=i % 2 == 0,
            step=float(i),
            layer=i % 4,
            tensor=100 + i,
            first_element=i * (2**31 - 77),
            moment_dtype=(torch.float32, BFLOAT16)[i // 2 % 2],
        )
        slot.exp_avg.normal_()
        slot.exp_avg_sq.uniform_()
        slots.append(slot)
        grads.append(torch.randn(size).to(DTYPES[i // 3]))
    grads[2][[0, 77, CHUNK]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=grads[2].dtype)
    slots[2].exp_avg_sq[[5, CHUNK + 1]] = torch.tensor([math.nan, math.inf], dtype=BFLOAT16)
    slots[2].exp_avg[9] = -math.inf
    slots[2].param[70] = -math.inf
    return slots, grads


@pytest.mark.parametrize("seed", [None, 12], ids=["nearest", "stochastic"])
def test_same_bits_for_any_threads_and_instruction_set(num_threads, seed):
    results = []
    try:
        for name, threads in itertools.product(ops.build_info()["simd_available"], THREADS):
            ops.select_simd(name)
            num_threads(threads)
            torch.manual_seed(3)
            slots, grads = mixed_case()
            for _ in range(2):
                norms = step(slots, grads, seed, with_norms=True)
            found = {f"{i} {k}": t for i, s in enumerate(slots) for k, t in tensors_of(s).items()}
            results.append((f"{name}, {threads} threads", {**found, "norms": norms}))
    finally:
        ops.select_simd("auto")
    assert len(results) > 1
    for label, found in results[1:]:
        for key, tensor in found.items():
            assert_same_bits(tensor, results[0][1][key], f"{label}: {key}")


@pytest.mark.parametrize("seed", [None, 12], ids=["nearest", "stochastic"])
def test_norms_do_not_change_the_update(simd, seed):
    slots, grads = mixed_case()
    others = [copy_of(slot) for slot in slots]
    norms = step(slots, grads, seed, with_norms=True)
    assert step(others, grads, seed) is None
    for slot, other in zip(slots, others, strict=True):
        for name, tensor in tensors_of(slot).items():
            assert_same_bits(tensor, tensors_of(other)[name], name)
    exact = sum(float(g.double().square().sum()) for g in grads[1::4])
    assert float(norms[1]) == pytest.approx(exact, rel=1e-6)


def test_the_order_of_the_tensors_does_not_show(simd):
    """Frozen layers leave the list: a tensor keeps its identity, not its place."""
    slots, grads = mixed_case()
    others = [copy_of(slot) for slot in reversed(slots)]
    step(slots, grads, 5)
    for other, grad in zip(others, reversed(grads), strict=True):
        step([other], [grad], 5)
    for slot, other in zip(slots, reversed(others), strict=True):
        for name, tensor in tensors_of(slot).items():
            assert_same_bits(tensor, tensors_of(other)[name], name)


def test_another_seed_step_or_tensor_gives_other_bits(simd):
    size = 4096
    slot = make_slot(torch.randn(size, dtype=BFLOAT16), moment_dtype=BFLOAT16)
    slot.exp_avg.normal_()
    slot.exp_avg_sq.uniform_()
    results = []
    for seed, t, tensor in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]:
        other = dataclasses.replace(copy_of(slot), tensor=tensor)
        other.step.fill_(float(t))
        step([other], [torch.zeros(size)], seed, group=EXACT)
        results.append(other)
    for a, b in itertools.combinations(results, 2):
        for name in ("param", "exp_avg", "exp_avg_sq"):
            differ = float((getattr(a, name) != getattr(b, name)).double().mean())
            assert 0.2 < differ < 0.5, name


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float16], ids=str)
def test_a_seed_changes_nothing_where_nothing_is_bfloat16(simd, param_dtype):
    slot = make_slot(torch.randn(CHUNK + 9).to(param_dtype), amsgrad=True)
    other, grad = copy_of(slot), torch.randn(CHUNK + 9)
    step([slot], [grad], None)
    step([other], [grad], 3)
    for name, tensor in tensors_of(slot).items():
        assert_same_bits(tensor, tensors_of(other)[name], name)


@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "stochastic"])
def test_every_pattern_of_a_moment_loads_and_stays(simd, seed):
    """With lr = 0 and beta = 1 all is written back as it was, NaN as NaN."""
    held = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BFLOAT16)
    slot = make_slot(misaligned(held), moment_dtype=BFLOAT16, place=misaligned)
    slot.exp_avg.copy_(held)
    slot.exp_avg_sq.copy_(held)
    group = AdamWGroup(0.0, 1.0, 1.0, 1.0, 0.0, maximize=False)
    step([slot], [torch.zeros(len(held))], seed, group=group)
    finite = held.isfinite()
    # (0 - inf)·0 is NaN in the interpolation, as it is in torch.lerp.
    assert slot.exp_avg[~finite].isnan().all()
    assert_same_bits(slot.exp_avg[finite] + 0.0, held[finite] + 0.0, "exp_avg")
    assert_same_bits(slot.exp_avg_sq + 0.0, held + 0.0, "exp_avg_sq")


def test_nan_and_infinity_are_stored_as_such(simd):
    """Also NaN whose payload would carry into the sign, and become a zero."""
    slot = make_slot(torch.ones(64, dtype=BFLOAT16))
    payload = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    slot.exp_avg.copy_(payload.repeat(32))
    infinite = make_slot(torch.tensor([math.inf, -math.inf] * 32, dtype=BFLOAT16))
    step([slot, infinite], [torch.zeros(64), torch.zeros(64)], 1)
    assert slot.param.isnan().all()
    assert infinite.param.tolist() == [math.inf, -math.inf] * 32


@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "stochastic"])
def test_other_memory_orders(simd, seed):
    """Elements count in memory order: a transposed parameter is rounded as its memory is."""
    start, grad = torch.randn(31, 40).bfloat16(), torch.randn(31, 40)
    plain = make_slot(start.clone(), tensor=4, moment_dtype=BFLOAT16)
    turned = make_slot(start.clone().t(), tensor=4, moment_dtype=BFLOAT16)
    referenced = copy_of(dataclasses.replace(turned, param=turned.param.detach()))
    assert turned.exp_avg.stride() == turned.param.stride() == (1, 40)
    assert referenced.param.stride() == (1, 40)
    step([plain], [grad], seed)
    step([turned], [grad.t()], seed)
    step([referenced], [grad.t()], seed, backend=ReferenceAdamW)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        ours = getattr(turned, name)
        assert_same_bits(ours.t(), getattr(plain, name), name)
        assert float((ours == getattr(referenced, name)).double().mean()) > 0.999, name


def test_moments_are_of_one_dtype():
    slot = make_slot(torch.ones(3))
    with pytest.raises(AssertionError):
        ops.NativeAdamW([dataclasses.replace(slot, exp_avg_sq=slot.exp_avg_sq.bfloat16())], 1)
    with pytest.raises(AssertionError):
        ops.NativeAdamW([make_slot(torch.ones(3), moment_dtype=torch.float16)], 1)
