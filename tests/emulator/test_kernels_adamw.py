"""The AdamW kernel: every dtype, size and alignment, against the CPU core and float64.

The CPU core is held to gradloc.reference and to torch in test_ops_adamw.py; without fused
multiply-add the kernel gives its bits. Stochastic rounding is in test_kernels_rounding.py.
"""

import dataclasses
import itertools

import pytest
import torch
from kernel_devices import embedded, guards_intact
from numerics import (
    CHUNK,
    DTYPE_IDS,
    DTYPES,
    assert_same_bits,
    assert_within,
    copy_of,
    make_slot,
    tensors_of,
)

from gradloc import ops, reference
from gradloc.reference import AdamWGroup

# Both sides of every boundary: 8 elements of a thread, 16 bytes, a warp, a block's threads, its
# 4 and 8 elements a thread, the chunk.
SIZES = (
    *(0, 1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 255, 256, 257),
    *(1023, 1024, 1025, 2047, 2048, 2049),
    *(CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7),
)
MOMENTS = (torch.float32, torch.bfloat16)
KINDS = list(itertools.product(DTYPES, DTYPES, MOMENTS))
KIND_IDS = [f"{p}-{g}-{m}" for p, g, m in itertools.product(DTYPE_IDS, DTYPE_IDS, DTYPE_IDS[:2])]
EVERY_KIND = pytest.mark.parametrize(
    ("param_dtype", "grad_dtype", "moment_dtype"), KINDS, ids=KIND_IDS
)
GROUPS = (
    AdamWGroup(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, maximize=False),
    AdamWGroup(lr=0.05, beta1=0.4, beta2=0.999, eps=1e-8, weight_decay=0.0, maximize=True),
)


def take_step(slots, grads, *, groups=GROUPS, scales=None, coef=1.0, with_norms=False, seed=None):
    """One step; the number of layers follows from the slots."""
    num_layers = 1 + max(slot.layer for slot in slots)
    work = ops.NativeAdamW(slots, num_layers)
    scales = [1.0] * num_layers if scales is None else scales
    return work.step(
        work.gather(grads), groups, scales, coef, with_norms=with_norms, rounding_seed=seed
    )


def random_slot(size, param_dtype, moment_dtype, **options):
    """On the CPU, with moments as after many steps."""
    slot = make_slot(torch.randn(size).to(param_dtype), moment_dtype=moment_dtype, **options)
    slot.exp_avg.normal_()
    slot.exp_avg_sq.uniform_(0.1, 1.0)
    if slot.max_exp_avg_sq is not None:
        slot.max_exp_avg_sq.uniform_(0.1, 1.0)
    return slot


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@EVERY_KIND
def test_as_the_cpu_core_and_float64(device, param_dtype, grad_dtype, moment_dtype, amsgrad):
    size = CHUNK + 1234
    host = random_slot(size, param_dtype, moment_dtype, amsgrad=amsgrad, step=3.0)
    slot = device.slot(host)
    exact = dataclasses.replace(
        host,
        **{n: t.double() if n != "step" else t.clone() for n, t in tensors_of(host).items()},
    )
    grad = torch.randn(size).to(grad_dtype)
    take_step([slot], [device.to(grad)], scales=[0.5], coef=0.3)
    with device.host():
        take_step([host], [grad], scales=[0.5], coef=0.3)
    device.check_slot(slot, host)
    wide = (exact.param, grad.double(), exact.exp_avg, exact.exp_avg_sq, exact.max_exp_avg_sq)
    reference.adamw_step(*wide, exact.step, group=GROUPS[0], lr_scale=0.5, clip_coef=0.3)
    for name, ours in tensors_of(slot).items():
        wanted = tensors_of(exact)[name]
        # Half a place of the stored dtype, and a few roundings of float32 on the way.
        bound = torch.finfo(ours.dtype).eps / 2 * wanted.abs() + 4 * 2.0**-23 * (wanted.abs() + 1)
        assert_within(ours.cpu(), wanted, bound, name)
    assert float(slot.step) == 4.0


@pytest.mark.parametrize("before", [32, 33, 67], ids=lambda before: f"offset{before}")
@EVERY_KIND
def test_every_size_gives_the_bits_of_one_large_tensor(
    device, param_dtype, grad_dtype, moment_dtype, before
):
    """Where an element stands (tail, thread, chunk, alignment) must not show.

    What lies on either side of a slice is neither read (it is NaN) nor written. At 32 elements
    slices begin at multiples of 16 bytes in every dtype, at 33 and 67 in none.
    """
    total = sum(SIZES)
    start = random_slot(total, param_dtype, moment_dtype, amsgrad=True)
    grad = torch.randn(total).to(grad_dtype)
    pieces = {name: t.split(SIZES) for name, t in tensors_of(start).items() if name != "step"}
    parts = [
        dataclasses.replace(
            start,
            **{n: embedded(device.to(p[i]), before) for n, p in pieces.items()},
            step=device.to(start.step),
        )
        for i in range(len(SIZES))
    ]
    grads = [embedded(device.to(part), before) for part in grad.split(SIZES)]
    whole = device.slot(start)
    for _ in range(2):
        take_step([whole], [device.to(grad)])
        sums = take_step(parts, grads, with_norms=True)
    for name, expected in tensors_of(whole).items():
        if name != "step":
            joined = torch.cat([tensors_of(part)[name] for part in parts])
            assert_same_bits(joined, expected, name)
            assert all(guards_intact(tensors_of(part)[name]) for part in parts), name
    exact = float(grad.double().square().sum())
    assert abs(float(sums) - exact) <= 1e-6 * exact
    assert all(guards_intact(grad) for grad in grads)
    assert {float(part.step) for part in parts} == {2.0}
    assert not torch.equal(whole.param.cpu(), start.param)


STREAMS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SUBSETS = [{name} for name in STREAMS] + [set(STREAMS) - {name} for name in STREAMS]


@pytest.mark.parametrize("odd", SUBSETS, ids=lambda odd: "+".join(sorted(odd)))
@pytest.mark.parametrize(
    "kind",
    [(torch.float32,) * 3, (torch.bfloat16, torch.float16, torch.float32)],
    ids=["f32", "mixed"],
)
def test_some_streams_misaligned(device, kind, odd):
    """Each array has its own alignment; the others keep their vectors."""
    size = CHUNK + 4099
    host = random_slot(size, kind[0], kind[2], amsgrad=True)
    grad = torch.randn(size).to(kind[1])
    shift = dict(zip(STREAMS, (1, 3, 5, 7, 2), strict=True))
    arrays = {name: t for name, t in tensors_of(host).items() if name != "step"}
    moved = {n: embedded(device.to(t), 32 + shift[n] * (n in odd)) for n, t in arrays.items()}
    slot = dataclasses.replace(host, **moved, step=device.to(host.step))
    ours_grad = embedded(device.to(grad), 32 + shift["grad"] * ("grad" in odd))
    for name, tensor in {**moved, "grad": ours_grad}.items():
        assert (tensor.data_ptr() % 16 != 0) == (name in odd), name
    take_step([slot], [ours_grad])
    with device.host():
        take_step([host], [grad])
    device.check_slot(slot, host)
    assert all(guards_intact(tensor) for tensor in (*moved.values(), ours_grad))


def mixed_case():
    """Tensors of all dtypes, two groups, four layers with other scales, steps and no gradients."""
    sizes = [3, CHUNK + 5, 0, 129, 64, 1, 2 * CHUNK, 40, 2048]
    slots, grads = [], []
    for i, size in enumerate(sizes):
        slots.append(
            random_slot(
                size,
                DTYPES[i % 3],
                MOMENTS[i // 2 % 2],
                amsgrad=i % 2 == 0,
                step=[0.0, 5.0, 1000.0][i % 3],
                layer=i % 4,
                group=i % 2,
            )
        )
        grads.append(None if i in (4, 7) else torch.randn(size).to(DTYPES[i // 3]))
    return slots, grads, [1.0, 0.25, 3.0, 1e-3]


@pytest.mark.parametrize("with_norms", [False, True])
def test_one_launch_of_everything_mixed(device, with_norms):
    """With amsgrad in some tensors only, two groups, one that maximizes, steps and scales apart."""
    hosts, grads, scales = mixed_case()
    slots = [device.slot(slot) for slot in hosts]
    before = [copy_of(slot) for slot in slots]
    ours = [None if grad is None else device.to(grad) for grad in grads]
    for _ in range(3):
        sums = take_step(slots, ours, scales=scales, coef=0.7, with_norms=with_norms)
        with device.host():
            take_step(hosts, grads, scales=scales, coef=0.7)
        for i, (slot, host) in enumerate(zip(slots, hosts, strict=True)):
            device.check_slot(slot, host, f"tensor {i}")
            if not device.exact:  # start the next step from the same values
                for name, tensor in tensors_of(slot).items():
                    tensor.copy_(tensors_of(host)[name])
    for i in (4, 7):
        for name, tensor in tensors_of(slots[i]).items():
            assert_same_bits(tensor, tensors_of(before[i])[name], f"no gradient: {name}")
    assert [float(s.step) - float(b.step) for s, b in zip(slots, before, strict=True)] == [
        *(3.0, 3.0, 3.0, 3.0, 0.0, 3.0, 3.0, 0.0, 3.0)
    ]
    if with_norms:
        for layer in range(4):
            exact = sum(
                float(g.double().square().sum())
                for g, slot in zip(grads, hosts, strict=True)
                if g is not None and slot.layer == layer
            )
            assert abs(float(sums[layer]) - exact) <= 1e-6 * exact, f"layer {layer}"
    else:
        assert sums is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-40, 1e30])
def test_special_gradients_stay_where_they_are(device, value):
    """As the CPU core has it, and only in the elements that had it."""
    size = 2100
    host = random_slot(size, torch.float32, torch.float32, amsgrad=True)
    before = host.param.clone()
    grad = torch.randn(size)
    grad[[0, 5, 1023, size - 1]] = value
    slot = device.slot(host)
    take_step([slot], [device.to(grad)])
    with device.host():
        take_step([host], [grad])
    for name, expected in tensors_of(host).items():
        ours = tensors_of(slot)[name].cpu()
        assert torch.equal(ours.isfinite(), expected.isfinite()), name
        finite = expected.isfinite()
        small = expected.abs() < 1e6
        device.check(ours[finite & small], expected[finite & small], name, step=name == "step")
        large = finite & ~small
        assert_within(ours[large], expected[large], expected[large].abs() * 1e-6, name)
    assert int(host.param.isnan().sum()) == (4 if not abs(value) < float("inf") else 0)
    assert not torch.equal(slot.param.cpu(), before)


def test_learning_rates_on_the_device(device):
    """Read when the kernel runs: a tensor changed after the group was made counts."""
    hosts = [random_slot(300, torch.float32, torch.float32, group=i) for i in range(2)]
    grads = [torch.randn(300) for _ in hosts]
    slots = [device.slot(slot) for slot in hosts]
    lr = device.to(torch.tensor(0.0))
    on_device = dataclasses.replace(GROUPS[0], lr=float("nan"), lr_tensor=lr)
    lr.fill_(0.02)
    take_step(slots, [device.to(grad) for grad in grads], groups=[on_device, GROUPS[1]])
    with device.host():
        group = dataclasses.replace(GROUPS[0], lr=float(torch.tensor(0.02)))
        take_step(hosts, grads, groups=[group, GROUPS[1]])
    for slot, host in zip(slots, hosts, strict=True):
        device.check_slot(slot, host)


def test_nothing_to_do(device):
    """Empty tensors have no chunks; their steps count all the same if they have a gradient."""
    slots = [device.slot(make_slot(torch.zeros(0), layer=i)) for i in range(2)]
    sums = take_step(slots, [device.to(torch.zeros(0)), None], with_norms=True)
    assert [float(slot.step) for slot in slots] == [1.0, 0.0]
    assert sums.tolist() == [0.0, 0.0]
