"""Runs every kernel once on small tensors, for compute-sanitizer, which slows a program much.

Odd addresses, sizes around chunk and vector boundaries, few and many tensors and param groups. The
results are compared with plain torch on the host, and what surrounds the tensors has to stay as it
was. Data are drawn on the host, so that hardly any kernel but gradloc's runs. The tests marked
`cuda` check more; nothing is timed here.

    python bench/cuda_short_run.py [--device cpu]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from gradloc import LayerMap, LayerPlan, LocalizedAdamW, layer_grad_norms, ops
from gradloc.layers import Layer

CHUNK = ops._C.CHUNK_ELEMENTS
SIZES = (0, 1, 3, 7, 8, 31, 33, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7)
OFFSETS = (0, 1, 3, 8)  # in elements: addresses at and off the 16-byte boundaries
GUARD = 7.0  # what stands before and after every tensor
NUM_LAYERS = 4


@dataclass(frozen=True)
class Case:
    """One configuration of the optimizer."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] = SIZES
    num_groups: int = 2
    infinite: bool = False  # one gradient is: the step must not happen
    frozen: bool = False  # one layer is


def cases() -> list[Case]:
    """All dtypes of parameters and moments, every switch, and every way that addresses travel."""
    half, narrow = torch.float16, {"state_dtype": torch.bfloat16}
    clip: dict[str, Any] = {"max_grad_norm": 0.5}
    found = []
    for dtype in (torch.float32, torch.bfloat16, half):
        found += [
            Case("step", dtype),
            Case("clip", dtype, clip, frozen=True),
            Case("bfloat16 moments", dtype, narrow),
            Case("amsgrad, maximize", dtype, {"amsgrad": True, "maximize": True}),
            Case("non-finite", dtype, clip, infinite=True),
        ]
    everything = {**narrow, **clip, "amsgrad": True}
    rounding: dict[str, Any] = {"stochastic_rounding": True, "seed": 5}
    bfloat16 = torch.bfloat16
    return [
        *found,
        Case("all options", bfloat16, everything, frozen=True),
        Case("stochastic rounding", bfloat16, rounding),
        Case("stochastic rounding, all options", bfloat16, {**everything, **rounding}),
        Case("stochastic rounding, float32 moments, amsgrad", bfloat16, {**rounding, **clip}),
        Case("500 tensors", torch.float32, clip, sizes=(5,) * 500),
        Case("4,100 tensors", torch.float32, clip, sizes=(2, 5) * 2050),
        Case("11 groups", torch.float32, clip, num_groups=11),
    ]


class Guarded(torch.nn.Module):
    """Parameters and gradients that begin at odd addresses between guards, on a device.

    Few tensors have a buffer each, so that compute-sanitizer notices what reads past its end; many
    share one, as a thousand transfers would take its time.

    Args:
        case: sizes and dtype.
        device: where they lie.

    Attributes:
        layers: the parameters dealt out in turn.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__()
        self._case, self._device = case, device
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []  # and where its guards are
        for i, values in enumerate(self._tensors(0.1, 0)):
            self.register_parameter(f"p{i}", torch.nn.Parameter(values))
        sizes = case.sizes
        self.layers = LayerMap(
            Layer(
                name=f"layer {at}",
                kind="other",
                stack=None,
                block=None,
                parameters=tuple(f"p{i}" for i in range(at, len(sizes), NUM_LAYERS)),
                num_elements=sum(sizes[at::NUM_LAYERS]),
            )
            for at in range(NUM_LAYERS)
        )

    def _tensors(self, scale: float, seed: int) -> list[torch.Tensor]:
        """Random values of all sizes in new memory; another seed moves the addresses too."""
        generator = torch.Generator().manual_seed(seed)
        each: list[tuple[int, int]] = []  # where a tensor begins, in its buffer, and its size
        buffers, end = [], 0
        for i, size in enumerate(self._case.sizes):
            begin = end + OFFSETS[(i + seed) % len(OFFSETS)]
            each.append((begin, size))
            end = begin + size + 8
            end -= end % 8  # so that the next offset counts from a 16-byte boundary
            if len(self._case.sizes) <= 100 or i == len(self._case.sizes) - 1:
                buffers.append((self._buffer(end + 8, each, scale, generator), each))
                each, end = [], 0
        return [buffer[at : at + size] for buffer, parts in buffers for at, size in parts]

    def _buffer(
        self, length: int, parts: list[tuple[int, int]], scale: float, generator: torch.Generator
    ) -> torch.Tensor:
        values = scale * torch.randn(length, generator=generator)
        guards = torch.ones(length, dtype=torch.bool)
        for begin, size in parts:
            guards[begin : begin + size] = False
        buffer = values.masked_fill_(guards, GUARD).to(self._case.dtype).to(self._device)
        self._buffers.append((buffer, guards))
        return buffer

    def backward(self, step: int) -> None:
        """New gradients at new addresses; the last but one parameter has none."""
        grads = self._tensors(0.01, 1 + step)
        for i, (parameter, grad) in enumerate(zip(self.parameters(), grads, strict=True)):
            if i != len(grads) - 2:
                parameter.grad = grad
        if self._case.infinite:
            largest = max(grads, key=torch.numel)
            host = largest.cpu()
            host[-1] = torch.inf
            largest.copy_(host)

    def groups(self) -> list[dict[str, Any]]:
        """Param groups with weight decays of their own."""
        named = list(self.named_parameters())
        many = self._case.num_groups
        return [{"params": named[i::many], "weight_decay": 0.1 * i} for i in range(many)]

    def broken_guards(self) -> int:
        """Elements around the tensors that are no longer what they were."""
        return sum(
            int((buffer.cpu().float()[guards] != GUARD).sum()) for buffer, guards in self._buffers
        )


def optimizer_of(model: Guarded, case: Case, *, fused: bool) -> LocalizedAdamW:
    """The optimizer of a case: by the compiled core, or by plain torch."""
    layers = model.layers
    scales = {name: 0.5 + i for i, name in enumerate(layers.names)}
    if case.frozen:
        scales[layers.names[2]] = 0.0
    return LocalizedAdamW(
        model.groups(), lr=0.01, fused=fused, layers=layers, plan=LayerPlan(scales), **case.options
    )


def errors(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Differences of all elements, relative, and for small ones relative to 0.01."""
    got, wanted = got.detach().cpu().double(), wanted.detach().cpu().double()
    relative = (got - wanted).abs() / wanted.abs().clamp(min=1e-2)
    return relative.masked_fill(got == wanted, 0.0).nan_to_num(torch.inf).flatten()


# A fused multiply-add can tip a rounding to the next value of the dtype, in each of three steps. In
# a bfloat16 moment that changes the update itself, of few elements.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3 * 2**-7, torch.float16: 3 * 2**-10}
TIPPED_SHARE, TIPPED_TOLERANCE = 0.02, 0.1


def run(case: Case, device: torch.device) -> list[str]:
    """Three steps of a case on the device and on the host; what is wrong."""
    ours, theirs = Guarded(case, device), Guarded(case, torch.device("cpu"))
    mine = optimizer_of(ours, case, fused=True)
    reference = optimizer_of(theirs, case, fused=False)
    before = [parameter.detach().clone() for parameter in theirs.parameters()]
    wrong = []
    for step in range(3):
        ours.backward(step)
        theirs.backward(step)
        mine.step()
        reference.step()
        norms = layer_grad_norms(ours, ours.layers), layer_grad_norms(theirs, theirs.layers)
        error = float(errors(*norms).max())
        if error > 1e-6:
            wrong.append(f"layer norms of step {step}: relative error {error:.2e}")
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    all_errors = [errors(got, wanted) for got, wanted in pairs]
    tipped = float((torch.cat(all_errors) > TOLERANCES[case.dtype]).double().mean())
    narrow = case.options.get("state_dtype") == torch.bfloat16
    tolerance = TIPPED_TOLERANCE if narrow else TOLERANCES[case.dtype]
    if tipped > TIPPED_SHARE:
        wrong.append(f"{tipped:.1%} of the elements differ by more than {TOLERANCES[case.dtype]}")
    for i, one in enumerate(all_errors):
        if one.numel() and float(one.max()) > tolerance:
            at, error = int(one.argmax()), float(one.max())
            wrong.append(f"parameter {i}, element {at} of {one.numel()}: error {error:.2e}")
    moved = sum(
        not torch.equal(parameter.detach().cpu(), old)
        for parameter, old in zip(ours.parameters(), before, strict=True)
    )
    if case.infinite and (moved or int(mine.num_skipped_steps) != 3):
        wrong.append(f"{moved} tensors moved, {int(mine.num_skipped_steps)} of 3 steps skipped")
    if not case.infinite and not moved:
        wrong.append("nothing moved")
    if broken := ours.broken_guards():
        wrong.append(f"{broken} elements beside the tensors were overwritten")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to rehearse")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: use --device cpu to rehearse")
        return 1
    torch.set_num_threads(1)
    failed = 0
    for case in cases():
        wrong = run(case, device)
        failed += bool(wrong)
        dtype = str(case.dtype).removeprefix("torch.")
        print(f"{dtype}, {case.name}: {'; '.join(wrong[:4]) or 'ok'}", flush=True)
    print(
        f"{len(cases()) - failed} of {len(cases())} cases agree with plain torch on {device.type}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
