"""Stochastic rounding in the AdamW kernel: the bits of the specified generator, in every stream.

The generator is judged in test_stochastic_rounding.py, rounding to nearest with the other kernels.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from kernel_devices import embedded
from numerics import CHUNK, assert_same_bits, copy_of, make_slot, tensors_of

from gradloc import ops, reference
from gradloc.reference import AdamWGroup

BFLOAT16 = torch.bfloat16
GROUP = AdamWGroup(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, maximize=False)
# With these a step multiplies the parameter by 63/64 and each moment by 15/16, exactly in float32
# and to more bits than bfloat16 has; with eps infinite and the gradient zero nothing is added.
EXACT = AdamWGroup(2.0**-6, 15 / 16, 15 / 16, math.inf, 1.0, maximize=False)
# The high word of the position changes at 2^32: at a chunk's border, inside one, inside the groups
# of eight that a thread holds, and nowhere.
FIRSTS = [0, 5, 2**32 - CHUNK, 2**32 - CHUNK - 3, 2**32 - 1001, 2**40 + 2**32 - 8]


def take_step(slots, grads, seed, group=GROUP):
    work = ops.NativeAdamW(slots, 1)
    work.step(work.gather(grads), [group], [1.0], 1.0, with_norms=False, rounding_seed=seed)


def random_slot(size, param_dtype, moment_dtype, **options):
    slot = make_slot(torch.randn(size).to(param_dtype), moment_dtype=moment_dtype, **options)
    slot.exp_avg.normal_()
    slot.exp_avg_sq.uniform_(0.1, 1.0)
    return slot


@pytest.mark.parametrize("first_element", FIRSTS)
@pytest.mark.parametrize(("seed", "t", "tensor"), [(0, 0, 0), (-5, 1233, 7), (2**63 + 9, 5, 10**6)])
def test_the_bits_are_the_specified_ones(device, seed, t, tensor, first_element):
    """Bit for bit in all four streams, on a GPU too: the values before rounding are exact."""
    size = 2 * CHUNK + 77
    host = random_slot(
        size,
        BFLOAT16,
        BFLOAT16,
        amsgrad=True,
        step=t,
        tensor=tensor,
        first_element=first_element,
    )
    exact = {
        "param": host.param.float() * (63 / 64),
        "exp_avg": host.exp_avg.float() * (15 / 16),
        "exp_avg_sq": host.exp_avg_sq.float() * (15 / 16),
        "max_exp_avg_sq": host.exp_avg_sq.float() * (15 / 16),  # the maximum so far is 0
    }
    slot = device.slot(host)
    take_step([slot], [device.to(torch.zeros(size))], seed, EXACT)
    elements = torch.arange(first_element, first_element + size)
    for name, values in exact.items():
        word, shift = reference.RANDOM_STREAMS[name]
        drawn = reference.random_words(seed, t + 1, tensor, elements, word=word)
        expected = reference.round_to_bfloat16(values, (drawn >> shift) & 0xFFFF)
        assert_same_bits(tensors_of(slot)[name].cpu(), expected, name)
        assert int((expected != values.to(BFLOAT16)).sum()) > size // 8  # nearest would fail


KINDS = [
    (param, grad, moment)
    for param, grad, moment in itertools.product(
        (torch.float32, BFLOAT16, torch.float16),
        (torch.float32, BFLOAT16, torch.float16),
        (torch.float32, BFLOAT16),
    )
    if BFLOAT16 in (param, moment)
]


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(d)[6:] for d in kind))
def test_as_the_cpu_core(device, kind, amsgrad):
    size = CHUNK + 1234
    param_dtype, grad_dtype, moment_dtype = kind
    host = random_slot(
        size,
        param_dtype,
        moment_dtype,
        amsgrad=amsgrad,
        step=2,
        tensor=3,
        first_element=2**32 - 500,
    )
    slot = device.slot(host)
    nearest = copy_of(host)
    grad = torch.randn(size).to(grad_dtype)
    take_step([slot], [device.to(grad)], 7)
    with device.host():
        take_step([host], [grad], 7)
        take_step([nearest], [grad], None)
    device.check_slot(slot, host)
    for name, tensor in tensors_of(host).items():
        if tensor.dtype == BFLOAT16:
            assert int((tensor != tensors_of(nearest)[name]).sum()) > size // 8, name


@pytest.mark.parametrize("before", [32, 33])
def test_a_tensor_in_shards_gets_the_bits_of_the_whole(device, before):
    """Positions count in the full tensor, and neither chunks nor alignment show."""
    sizes = (1, 2047, CHUNK, 5, 3000)
    start = random_slot(sum(sizes), BFLOAT16, BFLOAT16, amsgrad=True, tensor=11)
    grad = torch.randn(sum(sizes)).to(BFLOAT16)
    first, parts, grads = 0, [], []
    for size in sizes:
        arrays = {n: t[first : first + size] for n, t in tensors_of(start).items() if n != "step"}
        parts.append(
            dataclasses.replace(
                start,
                **{n: embedded(device.to(t), before) for n, t in arrays.items()},
                step=device.to(start.step),
                first_element=first,
            )
        )
        grads.append(device.to(grad[first : first + size]))
        first += size
    whole = device.slot(start)
    take_step([whole], [device.to(grad)], 5)
    take_step(parts, grads, 5)
    for name, expected in tensors_of(whole).items():
        if name != "step":
            assert_same_bits(torch.cat([tensors_of(p)[name] for p in parts]), expected, name)


def test_seed_step_and_tensor_each_change_the_bits(device):
    host = random_slot(4000, BFLOAT16, BFLOAT16)
    found = []
    for seed, t, tensor in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (2**64, 1, 0)]:
        slot = device.slot(dataclasses.replace(host, step=torch.tensor(float(t)), tensor=tensor))
        take_step([slot], [device.to(torch.zeros(4000))], seed, EXACT)
        found.append(slot.param.cpu())
    assert [torch.equal(found[0], other) for other in found] == [True, False, False, False, True]
