"""The anchor stream of the AdamW pass of the compiled core, against `gradloc.reference` in float64.

What the optimizer makes of it is in test_recadam.py.
"""

import dataclasses
import itertools

import pytest
import torch
from numerics import (
    CHUNK,
    DTYPES,
    SIZES,
    THREADS,
    assert_same_bits,
    assert_within,
    guards_intact,
    make_slot,
    misaligned,
    tensors_of,
)

from gradloc import RecAdam, ops, reference
from gradloc.reference import AdamWGroup

GROUPS = (
    AdamWGroup(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, maximize=False),
    AdamWGroup(lr=0.05, beta1=0.5, beta2=0.999, eps=1e-8, weight_decay=0.0, maximize=True),
)
# λ between 0 and 1 at the steps taken here, and a pull that moves a parameter visibly.
PULLS = (
    RecAdam(gamma=20.0, k=0.7, t0=3.0),
    RecAdam(gamma=30.0, t0=9.0, anneal="linear"),
    RecAdam(gamma=25.0, k=0.25, anneal="constant"),
)
ANCHORS = (torch.float32, torch.bfloat16)
KINDS = list(itertools.product(DTYPES, ANCHORS))
EVERY_KIND = pytest.mark.parametrize(("param_dtype", "anchor_dtype"), KINDS)


def step_of(slots, grads, recadam, *, scales=None, with_norms=False, seed=None):
    num_layers = 1 + max(slot.layer for slot in slots)
    work = ops.NativeAdamW(slots, num_layers)
    return work.step(
        work.gather(grads),
        GROUPS,
        [1.0] * num_layers if scales is None else scales,
        0.5,
        with_norms=with_norms,
        rounding_seed=seed,
        recadam=recadam,
    )


def random_slot(size, param_dtype, anchor_dtype, **options):
    """As after some steps: moments, and an anchor apart from the parameter."""
    slot = make_slot(torch.randn(size).to(param_dtype), step=2.0, **options)
    slot.exp_avg.normal_()
    slot.exp_avg_sq.uniform_(0.1, 1.0)
    return dataclasses.replace(slot, anchor=torch.randn(size).to(anchor_dtype))


@pytest.mark.parametrize("recadam", PULLS, ids=lambda pull: pull.anneal)
@EVERY_KIND
def test_as_float64(simd, param_dtype, anchor_dtype, recadam):
    slot = random_slot(CHUNK + 77, param_dtype, anchor_dtype, amsgrad=True)
    anchor = slot.anchor.clone()
    grad = torch.randn(CHUNK + 77)
    exact = {n: t.double() if n != "step" else t.clone() for n, t in tensors_of(slot).items()}
    without = {n: t.clone() for n, t in exact.items()}
    step_of([slot], [grad], recadam, scales=[0.5])
    options = {"group": GROUPS[0], "lr_scale": 0.5, "clip_coef": 0.5}
    for tensors, pull in ((exact, {"anchor": anchor.double(), "recadam": recadam}), (without, {})):
        names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
        first, *rest = (tensors[name] for name in names)
        reference.adamw_step(first, grad.double(), *rest, **options, **pull)
    for name, ours in tensors_of(slot).items():
        wanted = exact[name]
        bound = torch.finfo(ours.dtype).eps / 2 * wanted.abs() + 4 * 2.0**-23 * (wanted.abs() + 1)
        assert_within(ours, wanted, bound, name)
    # What is asked for is a step apart from AdamW's, in the parameter and in nothing else.
    assert float((exact["param"] - without["param"]).abs().mean()) > 0.01
    assert_same_bits(exact["exp_avg"], without["exp_avg"])
    assert_same_bits(slot.anchor, anchor, "the anchor")


@EVERY_KIND
def test_every_size_gives_the_bits_of_one_large_tensor(simd, param_dtype, anchor_dtype):
    """Where an element stands must not show; what lies on either side is NaN."""
    whole = random_slot(sum(SIZES), param_dtype, anchor_dtype)
    grad = torch.randn(sum(SIZES))
    arrays = {**{n: t for n, t in tensors_of(whole).items() if n != "step"}, "anchor": whole.anchor}
    pieces = {name: [misaligned(p) for p in t.split(SIZES)] for name, t in arrays.items()}
    parts = [
        dataclasses.replace(whole, **{n: p[i] for n, p in pieces.items()}, step=whole.step.clone())
        for i in range(len(SIZES))
    ]
    for _ in range(2):
        step_of([whole], [grad], PULLS[0])
        step_of(parts, list(grad.split(SIZES)), PULLS[0])
    for name, expected in arrays.items():
        assert_same_bits(torch.cat(pieces[name]), expected, name)
        assert all(map(guards_intact, pieces[name])), name


@pytest.mark.parametrize("seed", [None, 5], ids=["nearest", "stochastic"])
def test_same_bits_for_any_threads_and_instruction_set(num_threads, seed):
    results, sizes = [], (3, CHUNK + 5, 0, 64, 100, 1)
    try:
        for name, threads in itertools.product(ops.build_info()["simd_available"], THREADS[:3]):
            ops.select_simd(name)
            num_threads(threads)
            torch.manual_seed(3)
            slots = [
                random_slot(
                    size,
                    *kind,
                    amsgrad=i % 2 == 0,
                    group=i % 2,
                    layer=i % 2,
                    tensor=i,
                    moment_dtype=ANCHORS[i % 2],
                )
                for i, (size, kind) in enumerate(zip(sizes, KINDS, strict=True))
            ]
            grads = [torch.randn(slot.param.numel()) for slot in slots]
            grads[4] = None
            sums = step_of(slots, grads, PULLS[0], scales=[0.5, 1.0], with_norms=True, seed=seed)
            found = {f"{i} {k}": t for i, s in enumerate(slots) for k, t in tensors_of(s).items()}
            results.append((f"{name}, {threads} threads", {**found, "sums": sums}))
    finally:
        ops.select_simd("auto")
    for label, found in results[1:]:
        for key, tensor in found.items():
            assert_same_bits(tensor, results[0][1][key], f"{label}: {key}")


def test_stochastic_rounding_keeps_a_pull_that_rounding_to_nearest_loses(simd):
    """A hundredth of the distance a step, which is less than half a place of bfloat16."""
    found = {}
    for seed in (None, 0):
        slot = make_slot(torch.full((20000,), 1.004).to(torch.bfloat16))
        slot = dataclasses.replace(slot, anchor=torch.ones(20000))
        pull = RecAdam(gamma=10.0, k=0.0, anneal="constant")
        group = dataclasses.replace(GROUPS[0], lr=1e-3, weight_decay=0.0)
        work = ops.NativeAdamW([slot], 1)
        before = slot.param.float().mean()
        for _ in range(5):
            grads = work.gather([torch.zeros(20000)])
            work.step(
                grads, [group], [1.0], 1.0, with_norms=False, rounding_seed=seed, recadam=pull
            )
        found[seed] = float((slot.param.float().mean() - 1) / (before - 1))
    assert found[None] == 1.0
    assert found[0] == pytest.approx(0.99**5, abs=0.01)
