"""One launch for any number of tensors, layers and param groups, with the same bits every time.

Past certain numbers (csrc/cuda/params.h) addresses and groups lie in tables in device memory; the
counts here are on both sides of them.
"""

import dataclasses
import math

import pytest
import torch
from numerics import CHUNK, assert_same_bits, make_slot, tensors_of

from gradloc import ops
from gradloc.reference import AdamWGroup

GROUPS = [
    AdamWGroup(
        lr=0.01 + 0.01 * i, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, maximize=i == 1
    )
    for i in range(3)
]
SCALES = [1.0, 0.5, 2.0]
# One thousand and twenty-four chunks of a layer are added by one block, the next by another.
SEGMENT = 1024


def tiny_and_large(count, num_layers=50):
    """Tensors of 1 to 5 elements beside one of two chunks; every seventh without a gradient."""
    flat = torch.randn(2 * count + 5)
    slots, grads = [], []
    for i in range(count):
        size = 1 + i % 5 if i != count // 2 else CHUNK + 3
        param = torch.randn(size) if size > 5 else flat[2 * i : 2 * i + size].clone()
        slots.append(make_slot(param, layer=i % num_layers, group=i % 3, step=float(i % 4)))
        grads.append(None if i % 7 == 3 else param.flip(0) + 0.5)
    return slots, grads


def joined(slots, name):
    return torch.cat([tensors_of(slot)[name].reshape(-1) for slot in slots])


@pytest.mark.parametrize("count", [1, 416, 417, 4000, 4001, 10_000])
def test_one_launch_for_any_number_of_tensors(device, count):
    num_layers = min(count, 50)
    scales = [0.5 + layer / num_layers for layer in range(num_layers)]
    hosts, grads = tiny_and_large(count, num_layers)
    slots = [device.slot(slot) for slot in hosts]
    work = ops.NativeAdamW(slots, num_layers)
    ours = work.gather([None if grad is None else device.to(grad) for grad in grads])
    found = []
    assert device.launches(lambda: found.append(work.norm_sq(ours, scales))) == ["norms_kernel"]

    def step():
        found.append(work.step(ours, GROUPS, scales, 0.9, with_norms=True, rounding_seed=None))

    assert device.launches(step) == ["adamw_kernel"]
    with device.host():
        host_work = ops.NativeAdamW(hosts, num_layers)
        host_grads = host_work.gather(grads)
        host_work.step(host_grads, GROUPS, scales, 0.9, with_norms=False, rounding_seed=None)
        wanted = host_work.norm_sq(host_grads, scales)
    for name in ("param", "exp_avg", "exp_avg_sq", "step"):
        device.check(joined(slots, name), joined(hosts, name), name, step=name == "step")
    for sums in found:
        error = (sums.cpu() - wanted).abs() / wanted
        assert float(error.max()) <= 1e-6, f"layer {int(error.argmax())}"


@pytest.mark.parametrize("count", [430, 4001], ids=["in parameters", "in a table"])
def test_new_gradients_in_every_step(device, count):
    """Their addresses and whether they are there change; the tables do not have to."""
    hosts, _ = tiny_and_large(count, 3)
    slots = [device.slot(slot) for slot in hosts]
    work = ops.NativeAdamW(slots, 3)
    for turn in range(3):
        grads = [
            None if (i + turn) % 3 == 0 else torch.randn_like(s.param) for i, s in enumerate(hosts)
        ]
        ours = work.gather([None if g is None else device.to(g) for g in grads])
        found = [work.norm_sq(ours, SCALES)]
        found.append(work.step(ours, GROUPS, SCALES, 1.0, with_norms=True, rounding_seed=None))
        with device.host():
            wanted = step_of(ops.NativeAdamW(hosts, 3), grads)
        for name, sums in zip(("norms", "step"), found, strict=True):
            error = (sums.cpu() - wanted).abs()
            assert bool((error <= 1e-6 * wanted).all()), f"turn {turn}, {name}: {error.tolist()}"
        device.check(joined(slots, "step"), joined(hosts, "step"), "steps", step=True)
        for name in ("param", "exp_avg", "exp_avg_sq"):
            device.check(joined(slots, name), joined(hosts, name), f"turn {turn} {name}")
            if not device.exact:  # start the next step from the same values
                for slot, host in zip(slots, hosts, strict=True):
                    tensors_of(slot)[name].copy_(tensors_of(host)[name])


def step_of(work, grads, groups=GROUPS, seed=None):
    return work.step(work.gather(grads), groups, SCALES, 1.0, with_norms=True, rounding_seed=seed)


@pytest.mark.parametrize("count", [8, 9, 20])
def test_many_param_groups(device, count):
    """Past eight they come through a table; all hyperparameters differ, one rate is a tensor.

    The second step has other hyperparameters of every kind: none may be left of the first.
    """
    groups = [
        AdamWGroup(
            lr=0.1 / (1 + i),
            beta1=0.05 * i if i < 10 else 0.9,
            beta2=0.99 - 0.01 * i,
            eps=10.0 ** -(3 + i % 5),
            weight_decay=0.01 * i,
            maximize=i % 3 == 0,
        )
        for i in range(count)
    ]
    hosts = [make_slot(torch.randn(40), group=i, layer=i % 3) for i in range(count)]
    grads = [torch.randn(40) for _ in hosts]
    slots = [device.slot(slot) for slot in hosts]
    work = ops.NativeAdamW(slots, 3)
    ours = work.gather([device.to(grad) for grad in grads])
    for turn in range(2):
        lr = torch.tensor(groups[-1].lr)
        last = dataclasses.replace(groups[-1], lr=math.nan, lr_tensor=device.to(lr))
        now = [*groups[:-1], last]

        def step(now=now):
            work.step(ours, now, SCALES, 1.0, with_norms=False, rounding_seed=None)

        assert device.launches(step) == ["adamw_kernel"]
        with device.host():
            here = dataclasses.replace(last, lr=float(lr))
            step_of(ops.NativeAdamW(hosts, 3), grads, [*groups[:-1], here])
        for i, (slot, host) in enumerate(zip(slots, hosts, strict=True)):
            device.check_slot(slot, host, f"step {turn} group {i}")
            if not device.exact:
                for name, tensor in tensors_of(slot).items():
                    tensor.copy_(tensors_of(host)[name])
        groups = [*groups[1:], groups[0]]


# Chunks of each layer: on both sides of what a block has threads, and of a segment.
LAYERS = [
    [1, 2, 1],
    [SEGMENT - 1, SEGMENT, SEGMENT + 1, 1],
    [0, 2 * SEGMENT + 300, 0, 255, 256, 257, 0],
]


@pytest.mark.parametrize("chunks_of", LAYERS, ids=["three", "segments", "several"])
def test_layers_of_many_chunks(device, chunks_of):
    """Gradients are whole numbers, so that the sums are exact and a lost chunk shows."""
    layers = [layer for layer, count in enumerate(chunks_of) for _ in range(count)]
    order = torch.randperm(len(layers)).tolist()
    layers = [layers[i] for i in order]
    values = torch.randint(1, 1000, (len(layers),)).float()
    grads = list(device.to(values).split(1))
    work = ops.NativeNorms([1] * len(layers), layers, len(chunks_of), device.torch_device)
    exact = torch.zeros(len(chunks_of), dtype=torch.float64)
    exact.index_add_(0, torch.tensor(layers), values.double().square())
    for turn in range(2):  # the counters are back at 0
        assert work.norm_sq(grads).tolist() == exact.tolist(), f"turn {turn}"


@pytest.mark.parametrize("num_layers", [1, 3, 256, 257, 1500])
def test_many_layers(device, num_layers):
    values = torch.randint(1, 1000, (num_layers + num_layers // 3, 2)).float()
    layers = [i % num_layers for i in range(len(values))]
    work = ops.NativeNorms([2] * len(values), layers, num_layers, device.torch_device)
    exact = torch.zeros(num_layers, dtype=torch.float64)
    exact.index_add_(0, torch.tensor(layers), values.double().square().sum(dim=1))
    assert work.norm_sq(list(device.to(values))).tolist() == exact.tolist()


@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "stochastic"])
def test_the_same_bits_in_any_order(device, seed):
    """Other orders of blocks and threads; on a GPU they differ from run to run by themselves."""
    sizes = [5 * CHUNK + 1, 1, 700, 2 * CHUNK, 3, *([9] * 300)]
    start = [
        make_slot(torch.randn(n), layer=i % 3, moment_dtype=torch.bfloat16)
        for i, n in enumerate(sizes)
    ]
    grads = [device.to(torch.randn(n) * 10.0 ** (i % 5)) for i, n in enumerate(sizes)]
    found = []
    for order in range(6):
        device.set_seed(order)
        slots = [device.slot(slot) for slot in start]
        work = ops.NativeAdamW(slots, 3)
        norms = work.norm_sq(work.gather(grads), SCALES)
        taken = step_of(work, grads, GROUPS[:1], seed)
        found.append({"norms": norms, "taken": taken})
        found[-1] |= {name: joined(slots, name) for name in ("param", "exp_avg", "exp_avg_sq")}
    for other in found[1:]:
        for name, expected in found[0].items():
            assert_same_bits(other[name], expected, name)
