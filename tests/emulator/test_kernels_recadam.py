"""The anchors of RecAdam in the AdamW kernel: the CPU core's bits, whatever else a step has in it.

The CPU core is held to gradloc.reference in test_ops_recadam.py; optimizers with anchors on a
device are in test_device_recadam.py.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from kernel_devices import embedded, guards_intact
from numerics import CHUNK, DTYPES, assert_same_bits, make_slot, tensors_of

from gradloc import RecAdam, ops
from gradloc.ops_cuda import Decision
from gradloc.reference import AdamWGroup

FLOAT32, BFLOAT16, FLOAT16 = DTYPES
GROUPS = (
    AdamWGroup(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, maximize=False),
    AdamWGroup(lr=0.05, beta1=0.4, beta2=0.999, eps=1e-8, weight_decay=0.0, maximize=True),
)
# λ between 0 and 1 at the steps taken here, and a pull that moves a parameter visibly.
PULLS = (
    RecAdam(gamma=20.0, k=0.7, t0=3.0),
    RecAdam(gamma=30.0, t0=9.0, anneal="linear"),
    RecAdam(gamma=25.0, k=0.25, anneal="constant"),
)
EVERY_PULL = pytest.mark.parametrize("recadam", PULLS, ids=lambda pull: pull.anneal)
KINDS = list(itertools.product(DTYPES, (FLOAT32, BFLOAT16), (FLOAT32, BFLOAT16)))
KIND_IDS = ["-".join(str(dtype)[6:] for dtype in kind) for kind in KINDS]
SIZES = (
    *(0, 1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 257, 1025, 2047, 2048, 2049),
    *(CHUNK - 1, CHUNK, CHUNK + 1),
)


def take_step(slots, grads, recadam, *, groups=GROUPS, scales=None, coef=1.0, seed=None):
    """One step; the number of layers follows from the slots."""
    num_layers = 1 + max(slot.layer for slot in slots)
    work = ops.NativeAdamW(slots, num_layers)
    return work.step(
        work.gather(grads),
        groups,
        [1.0] * num_layers if scales is None else scales,
        coef,
        with_norms=True,
        rounding_seed=seed,
        recadam=recadam,
    )


def random_slot(size, kind, **options):
    """On the CPU, as after many steps; kind: dtypes of the parameter, the moments, the anchor."""
    param_dtype, moment_dtype, anchor_dtype = kind
    slot = make_slot(torch.randn(size).to(param_dtype), moment_dtype=moment_dtype, **options)
    slot.exp_avg.normal_()
    slot.exp_avg_sq.uniform_(0.1, 1.0)
    if slot.max_exp_avg_sq is not None:
        slot.max_exp_avg_sq.uniform_(0.1, 1.0)
    return dataclasses.replace(slot, anchor=torch.randn(size).to(anchor_dtype))


def arrays_of(slot):
    """All that has the parameter's shape."""
    found = {name: t for name, t in tensors_of(slot).items() if name != "step"}
    return {**found, "anchor": slot.anchor}


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("seed", [None, 7], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_as_the_cpu_core(device, kind, seed, amsgrad):
    size = CHUNK + 1234
    recadam = PULLS[KINDS.index(kind) % 3]
    host = random_slot(size, kind, amsgrad=amsgrad, step=2.0, tensor=3, first_element=2**32 - 500)
    slot, plain = device.slot(host), device.slot(dataclasses.replace(host, anchor=None))
    before = host.anchor.clone()
    grad = torch.randn(size).to(DTYPES[KINDS.index(kind) % 3])
    options = {"scales": [0.5], "coef": 0.3, "seed": seed}
    take_step([slot], [device.to(grad)], recadam, **options)
    take_step([plain], [device.to(grad)], None, **options)
    with device.host():
        take_step([host], [grad], recadam, **options)
    device.check_slot(slot, host)
    assert_same_bits(slot.anchor.cpu(), before, "the anchor")
    # The anchor has a say in the parameter and in nothing else.
    for name, tensor in tensors_of(plain).items():
        if name == "param":
            assert float((tensor.float() - slot.param.float()).abs().mean()) > 0.01
        else:
            assert_same_bits(tensors_of(slot)[name], tensor, name)


@EVERY_PULL
def test_everything_mixed_in_one_launch(device, recadam):
    """Steps apart, so a λ each; amsgrad in some, two groups, scales, no gradient in two."""
    sizes = [3, CHUNK + 5, 0, 129, 64, 1, 40, 2048]
    hosts = [
        random_slot(
            size,
            KINDS[(5 * i) % len(KINDS)],
            amsgrad=i % 2 == 0,
            step=[0.0, 4.0, 1000.0][i % 3],
            layer=i % 4,
            group=i % 2,
        )
        for i, size in enumerate(sizes)
    ]
    grads = [None if i in (4, 6) else torch.randn(size) for i, size in enumerate(sizes)]
    slots, before = [device.slot(slot) for slot in hosts], [device.slot(slot) for slot in hosts]
    ours = [None if grad is None else device.to(grad) for grad in grads]
    options = {"scales": [1.0, 0.25, 2.0, 1e-3], "coef": 0.7}
    for number in range(3):

        def step():
            take_step(slots, ours, recadam, **options)

        assert device.launches(step) == ["adamw_kernel"]
        with device.host():
            take_step(hosts, grads, recadam, **options)
        for i, (slot, host) in enumerate(zip(slots, hosts, strict=True)):
            device.check_slot(slot, host, f"step {number} tensor {i}")
            if not device.exact:  # start the next step from the same values
                for name, tensor in tensors_of(slot).items():
                    tensor.copy_(tensors_of(host)[name])
    for i in (4, 6):
        for name, tensor in tensors_of(slots[i]).items():
            assert_same_bits(tensor, tensors_of(before[i])[name], f"no gradient: {name}")


@pytest.mark.parametrize("before", [32, 33, 67], ids=lambda before: f"offset{before}")
@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_every_size_gives_the_bits_of_one_large_tensor(device, kind, before):
    """Where an element stands must not show, and what lies on either side (NaN) is not read."""
    start = random_slot(sum(SIZES), kind, amsgrad=True)
    grad = torch.randn(sum(SIZES))
    pieces = {name: t.split(SIZES) for name, t in arrays_of(start).items()}
    parts = [
        dataclasses.replace(
            start,
            **{name: embedded(device.to(p[i]), before) for name, p in pieces.items()},
            step=device.to(start.step),
        )
        for i in range(len(SIZES))
    ]
    whole = device.slot(start)
    take_step([whole], [device.to(grad)], PULLS[0])
    take_step(parts, [device.to(part) for part in grad.split(SIZES)], PULLS[0])
    for name, expected in arrays_of(whole).items():
        assert_same_bits(torch.cat([arrays_of(part)[name] for part in parts]), expected, name)
        assert all(guards_intact(arrays_of(part)[name]) for part in parts), name
    assert not torch.equal(whole.param.cpu(), start.param)


@pytest.mark.parametrize("only_anchor", [True, False], ids=["anchor odd", "anchor even"])
@pytest.mark.parametrize(
    "kind",
    [(FLOAT32,) * 3, (BFLOAT16,) * 3, (FLOAT16, FLOAT32, BFLOAT16), (FLOAT32, FLOAT32, BFLOAT16)],
    ids=["f32", "bf16", "mixed", "small-anchor"],
)
def test_some_streams_misaligned(device, kind, only_anchor):
    """The anchor has its own alignment; the others keep their vectors."""
    size = CHUNK + 4099
    host = random_slot(size, kind, amsgrad=True)
    grad = torch.randn(size)
    moved = {
        name: embedded(device.to(t), 32 + 3 * ((name == "anchor") == only_anchor))
        for name, t in arrays_of(host).items()
    }
    for name, tensor in moved.items():
        assert (tensor.data_ptr() % 16 != 0) == ((name == "anchor") == only_anchor), name
    slot = dataclasses.replace(host, **moved, step=device.to(host.step))
    take_step([slot], [device.to(grad)], PULLS[1])
    with device.host():
        take_step([host], [grad], PULLS[1])
    device.check_slot(slot, host)
    assert all(map(guards_intact, moved.values()))


@pytest.mark.parametrize("count", [416, 417, 4001])
@pytest.mark.parametrize(
    ("amsgrad", "seed"), [(False, None), (True, 7)], ids=["plain", "amsgrad-stochastic"]
)
def test_one_launch_for_any_number_of_tensors(device, count, amsgrad, seed):
    """Addresses of gradients in the small parameters, in the large ones, and in a table."""
    param, anchor = torch.randn(2, count, 3)
    hosts = [
        dataclasses.replace(
            make_slot(param[i].to(DTYPES[i % 3]), amsgrad=amsgrad, layer=i % 5, step=float(i % 4)),
            anchor=anchor[i],
        )
        for i in range(count)
    ]
    grads = [None if i % 7 == 3 else torch.randn(3) for i in range(count)]
    slots = [device.slot(slot) for slot in hosts]
    ours = [None if grad is None else device.to(grad) for grad in grads]
    found = take_step(slots, ours, PULLS[0], seed=seed)
    with device.host():
        wanted = take_step(hosts, grads, PULLS[0], seed=seed)
    for first in range(3):  # by dtype
        for name in tensors_of(hosts[0]):
            mine, theirs = (
                torch.stack([tensors_of(slot)[name] for slot in all_of[first::3]])
                for all_of in (slots, hosts)
            )
            device.check(mine, theirs, name, step=name == "step")
    assert float(((found.cpu() - wanted).abs() / wanted).max()) <= 1e-6


@pytest.mark.parametrize("value", [None, math.inf], ids=["clipped", "skipped"])
def test_a_step_that_the_device_decides_about(device, value):
    """Only Adam's step is clipped, and the pull is not; a skipped step pulls nothing."""
    hosts = [random_slot(n, KINDS[0], layer=i) for i, n in enumerate((CHUNK + 9, 300))]
    grads = [torch.randn_like(slot.param) for slot in hosts]
    if value is not None:
        grads[0][CHUNK + 1] = value
    slots = [device.slot(slot) for slot in hosts]
    work, scales = ops.NativeAdamW(slots, 2), [1.0, 0.3]
    gathered = work.gather([device.to(grad) for grad in grads])
    control = device.to(torch.zeros(3))
    work.norm_sq(gathered, scales, Decision(control, 0.5, True, None, None))
    coef, skipped, _ = control.tolist()
    work.step(
        gathered, GROUPS, scales, control, with_norms=False, rounding_seed=None, recadam=PULLS[0]
    )
    assert skipped == float(value is not None)
    if value is None:
        assert 0 < coef < 0.1
        with device.host():
            take_step(hosts, grads, PULLS[0], scales=scales, coef=coef)
    for i, (slot, host) in enumerate(zip(slots, hosts, strict=True)):
        device.check_slot(slot, host, f"tensor {i}")


def test_learning_rates_on_the_device(device):
    """The pull takes the rate that is there when the kernel runs."""
    hosts = [random_slot(300, KINDS[0], group=i) for i in range(2)]
    grads = [torch.randn(300) for _ in hosts]
    slots = [device.slot(slot) for slot in hosts]
    lr = device.to(torch.tensor(0.0))
    on_device = dataclasses.replace(GROUPS[0], lr=math.nan, lr_tensor=lr)
    lr.fill_(0.02)
    ours = [device.to(grad) for grad in grads]
    take_step(slots, ours, PULLS[0], groups=[on_device, GROUPS[1]])
    with device.host():
        group = dataclasses.replace(GROUPS[0], lr=float(torch.tensor(0.02)))
        take_step(hosts, grads, PULLS[0], groups=[group, GROUPS[1]])
    for slot, host in zip(slots, hosts, strict=True):
        device.check_slot(slot, host)


def test_calls_that_do_not_fit(device):
    slot = device.slot(random_slot(8, KINDS[0]))
    grads = [device.to(torch.ones(8))]
    with pytest.raises(ValueError, match="recadam and anchors: both or neither"):
        take_step([slot], grads, None)
    with pytest.raises(ValueError, match="recadam and anchors: both or neither"):
        take_step([dataclasses.replace(slot, anchor=None)], grads, PULLS[0])
    assert float(slot.step) == 0.0
