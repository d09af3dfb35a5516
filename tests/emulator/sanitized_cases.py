"""Runs every kernel variant in a process where sanitizers watch: PATH_OF_MODULE CASE.

Every array ends where its allocation ends, so that one element too many is an error. Not a test by
itself, see test_kernels_sanitized.py; values are checked in the other tests.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import emulator_build
import torch
from numerics import CHUNK, DTYPES, make_slot

from gradloc import RecAdam, ops
from gradloc.ops_cuda import Decision
from gradloc.reference import AdamWGroup

SMALL = (0, 1, 3, 4, 7, 8, 9, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049)
PULL = RecAdam(gamma=20.0, k=1.0, t0=1.0)
LARGE = (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7)
KINDS = list(itertools.product(DTYPES, DTYPES, (torch.float32, torch.bfloat16)))


def at_the_end(values, before):
    """A copy that begins `before` elements into its allocation and ends with it."""
    buffer = torch.empty(before + values.numel(), dtype=values.dtype)
    return buffer[before:].copy_(values)


def groups(count):
    return [AdamWGroup(0.01, 0.9, 0.99, 1e-6, 0.1, maximize=i == 1) for i in range(count)]


def tensors(kinds_and_sizes, before, amsgrad, num_groups=2, recadam=None):
    slots, grads = [], []
    for i, ((param_dtype, grad_dtype, moment_dtype), size) in enumerate(kinds_and_sizes):
        slots.append(
            make_slot(
                at_the_end(torch.randn(size).to(param_dtype), before),
                moment_dtype=moment_dtype,
                amsgrad=amsgrad and i % 3 > 0,
                layer=i % 5,
                group=i % num_groups,
                first_element=2**32 - 100,
                place=lambda moment: at_the_end(moment, before),
            )
        )
        if recadam is not None:
            anchor = torch.randn(size).to((torch.float32, torch.bfloat16)[i % 2])
            slots[-1] = dataclasses.replace(slots[-1], anchor=at_the_end(anchor, before))
        grads.append(None if i % 11 == 5 else at_the_end(torch.randn(size).to(grad_dtype), before))
    return slots, grads


def clip_and_step(slots, grads, seed, num_groups=2, recadam=None):
    """Both kernels, all that they can be asked for; then with a skipped step."""
    work = ops.NativeAdamW(slots, 5)
    ours, scales = work.gather(grads), [0.5] * 5
    flags = torch.zeros(1), torch.full((1,), 8.0)
    for max_norm, found_inf in ((1.0, 0.0), (None, 1.0)):
        control = torch.zeros(3)
        flags[0].fill_(found_inf)
        sums = work.norm_sq(ours, scales, Decision(control, max_norm, True, *flags))
        taken = work.step(
            ours,
            groups(num_groups),
            scales,
            control,
            with_norms=True,
            rounding_seed=seed,
            recadam=recadam,
        )
        assert control.tolist()[1:] == [found_inf, found_inf]
        assert torch.allclose(sums, taken, rtol=1e-6) != bool(found_inf)


def run(case):
    if case == "steps":
        every = list(itertools.product(KINDS, SMALL))
        every += list(itertools.product(KINDS[::5], LARGE))
        for amsgrad, seed in itertools.product((False, True), (None, 7)):
            for before in (0, 1, 6):
                clip_and_step(*tensors(every, before, amsgrad), seed)
    elif case == "anchors":
        every = list(itertools.product(KINDS, SMALL))
        every += list(itertools.product(KINDS[::5], LARGE))
        for seed, before in itertools.product((None, 7), (0, 1, 6)):
            clip_and_step(*tensors(every, before, True, recadam=PULL), seed, recadam=PULL)
        sizes = [1 + i % 3 for i in range(4001)]
        many = tensors([(KINDS[1], size) for size in sizes], 0, False, 12, PULL)
        clip_and_step(*many, 7, 12, PULL)
    elif case == "many":
        kind = KINDS[1]
        for count in (300, 4001):  # addresses in the parameters, and in a table
            for amsgrad, seed in ((False, None), (True, 7)):
                sizes = [1 + i % 3 for i in range(count)]
                slots, grads = tensors([(kind, size) for size in sizes], 0, amsgrad, 12)
                clip_and_step(slots, grads, seed, 12)
    elif case == "norms":
        for dtype, before in itertools.product(DTYPES, range(9)):
            sizes = (*SMALL, *LARGE, 4096, 8191)
            grads = [at_the_end(torch.randn(size).to(dtype), before) for size in sizes]
            layers = [i % 4 for i in range(len(sizes))]
            sums = ops.NativeNorms(sizes, layers, 4).norm_sq(grads)
            assert sums.isfinite().all()
    elif case == "short gradient":
        slots, grads = tensors([(KINDS[0], 1000)], 0, False)
        short = ops.gradients_of([grads[0][:990].clone()])
        work = ops.NativeAdamW(slots, 5)
        work.step(short, groups(1), [1.0] * 5, 1.0, with_norms=False, rounding_seed=None)
    print("done")


if __name__ == "__main__":
    path, case = sys.argv[1:]
    ops.DEVICE_CORES["cpu"] = emulator_build.load(Path(path))
    torch.manual_seed(0)
    run(case)
