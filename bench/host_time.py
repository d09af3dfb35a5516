"""Host time of an optimizer step over many small tensors, as a whole and by its parts.

On small tensors the arithmetic takes next to nothing: what is left is what the host does for each
tensor. Runs on the CPU, and says nothing about kernels or their launches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import interleave, report, wall_clock
from torch import nn

from gradloc import LocalizedAdamW, ops
from gradloc.watch import PlainWatch, watch

LAYERS = 100


def optimizer_over(num_tensors: int, *, amsgrad: bool) -> LocalizedAdamW:
    """An optimizer over vectors of ten elements that has done its first step."""
    params = [nn.Parameter(torch.randn(10)) for _ in range(num_tensors)]
    optimizer = LocalizedAdamW(params, lr=1e-3, amsgrad=amsgrad)
    for param in params:
        param.grad = torch.randn(10)
    optimizer.step()
    return optimizer


def watched_parts(optimizer: LocalizedAdamW) -> dict[str, Callable[[], Any]]:
    """What is asked before every step, by each class that answers."""
    groups, states = optimizer.param_groups, optimizer.state
    params = [param for group in groups for param in group["params"]]
    layers = [i % LAYERS for i in range(len(params))]
    versions: dict[str, Callable[[], Any]] = {}
    for make in (watch, PlainWatch):
        watched = make(groups, states, params, layers)
        assert watched.remember([range(len(params))])
        assert watched.unchanged()
        name = type(watched).__name__
        versions[f"{name}.unchanged"] = watched.unchanged
        versions[f"{name}.gradients"] = watched.gradients
    return versions


def step_parts(optimizer: LocalizedAdamW) -> dict[str, Callable[[], Any]]:
    """The step, and what it does when a tensor was exchanged or a gradient is not ordinary."""
    work = optimizer._step_work()
    (part,) = work._parts
    assert isinstance(part.work, ops.NativeAdamW)
    params = [slot.param for slot in part.work.slots]
    return {
        "step": optimizer.step,
        "is_over": partial(work.is_over, optimizer.param_groups, optimizer.state),
        "gather": work.gather,
        "gather: of the backend": lambda: part.work.gather([param.grad for param in params]),
        "layers_with_grad": work.layers_with_grad,
        "increment_version": partial(torch.autograd.graph.increment_version, params),
    }


def after_backward(optimizer: LocalizedAdamW, name: str, run: Callable[[], Any]) -> float:
    """Seconds that `run` takes with new gradients, far from the caches, as in training."""
    optimizer.zero_grad(set_to_none=True)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    torch.stack([(param * 2).sum() for param in params]).sum().backward()
    return wall_clock(name, run)


def rows_of(num_tensors: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each part, without and with amsgrad."""
    rows = []
    for amsgrad in (False, True):
        optimizer = optimizer_over(num_tensors, amsgrad=amsgrad)
        versions = {**watched_parts(optimizer), **step_parts(optimizer)}
        timings = interleave(versions, min_rounds=50, seconds=seconds)
        timings |= interleave(
            {"step after a backward pass": optimizer.step},
            min_rounds=50,
            seconds=seconds,
            clock=partial(after_backward, optimizer),
        )
        for name, timing in timings.items():
            rows.append(
                {
                    "tensors": num_tensors,
                    "state values": 4 if amsgrad else 3,
                    "part": name,
                    "us": round(timing.median * 1e6, 1),
                    "quartiles": "-".join(f"{q * 1e6:.1f}" for q in timing.quartiles),
                }
            )
    return rows


def main() -> None:
    """Print the rows, and write them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each kind of state")
    parser.add_argument("--tensors", type=int, default=300, help="number of tensors")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads would be woken for ten elements
    report(rows_of(args.tensors, args.seconds), args.json, "host time")


if __name__ == "__main__":
    main()
