"""LocalizedAdamW as PyTorch's optimizer tests see it: its OptimizerInfo, and what files share.

Holds no tests. The tests of `test_torch_optimizer_suite*.py` cover what TestOptimRenewed in
PyTorch's test/test_optim.py covers, on the same harness; the judge of values is
`torch.optim.AdamW(foreach=False)`. The harness is internal to torch and moves: where it cannot be
imported these files are skipped with the reason, but not in CI.
"""

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from numerics import assert_within
from torch import Tensor, nn

from gradloc import LocalizedAdamW

# Importing the harness forbids the whole process to set torch.backends' flags, which the Trainer's
# full_determinism does in other tests of the same run. What torch.backends shows is a wrapper.
_backends = torch.backends.disable_global_flags.__globals__
_FLAG = "__allow_nonbracketed_mutation_flag"
_allowed = _backends.get(_FLAG)
try:
    from torch.testing._internal.common_device_type import instantiate_device_type_tests
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        optim_db,
        optim_error_inputs_func_adamw,
        optim_inputs_func_adamw,
        optims,
    )
    from torch.testing._internal.common_utils import TestCase, parametrize
except ImportError as error:
    if os.environ.get("CI"):
        raise
    pytest.skip(f"torch's optimizer test harness: {error}", allow_module_level=True)
finally:
    if _allowed is not None:
        _backends[_FLAG] = _allowed

__all__ = [
    "COUNT",
    "INFO",
    "ON_EVERY",
    "TORCH_INFO",
    "OptimizerErrorEnum",
    "OptimizerInput",
    "TestCase",
    "assert_close",
    "cases",
    "give",
    "instantiate",
    "judge_of",
    "named",
    "optims",
    "parametrize",
    "params_on",
    "train",
    "twins_of",
]

COUNT = {"cases": 0}  # sets of options that the tests have gone through; the summary prints it
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def optim_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """The inputs that torch has for AdamW, and options that those leave at their defaults.

    Without capturable: it is refused on the CPU, see `test_refused_options`.
    """
    theirs = [
        i for i in optim_inputs_func_adamw(device, dtype) if not i.kwargs.get("capturable", False)
    ]
    ours = {
        "betas": {"betas": (0.7, 0.95), "eps": 1e-4, "weight_decay": 0.3},
        "no momentum": {"betas": (0.0, 0.0), "eps": 1e-2, "weight_decay": 0.0},
        "Tensor lr": {"lr": torch.tensor(0.01)},
        "Tensor lr of one dimension, amsgrad": {"lr": torch.tensor([0.003]), "amsgrad": True},
        "Tensor betas": {"betas": (torch.tensor(0.8), torch.tensor(0.9))},
        "amsgrad and maximize": {"amsgrad": True, "maximize": True, "lr": 0.02},
    }
    return theirs + [OptimizerInput(params=None, kwargs=k, desc=d) for d, k in ours.items()]


def error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """The error inputs that torch has for AdamW.

    Without those with foreach=True: they are about torch's foreach implementation, and here foreach
    has no effect, see `test_foreach_has_no_effect`. What torch refuses with a RuntimeError because
    of `differentiable` is a ValueError here, as every bad option.
    """
    chosen = []
    for error in optim_error_inputs_func_adamw(device, dtype):
        kwargs = error.optimizer_error_input.kwargs
        if kwargs.get("foreach"):
            continue
        if kwargs.get("differentiable"):
            error.error_type, error.error_regex = ValueError, "differentiable=True"
        chosen.append(error)
    return chosen


TORCH_INFO = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
_ADAM = next(info for info in optim_db if info.optim_cls is torch.optim.Adam)

INFO = OptimizerInfo(
    LocalizedAdamW,
    optim_inputs_func=optim_inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=_ADAM.scheduler_inputs,  # AdamW's own are two of these
    supported_impls=("foreach", "fused"),
    not_og_supported_flags=("foreach", "differentiable", "fused", "maximize", "capturable"),
    has_capturable_arg=False,
    supports_complex=False,
    supports_fused_on=("cpu", "cuda"),
)
ON_EVERY = optims([INFO], dtypes=[torch.float32])


def cases(
    info: OptimizerInfo,
    device: str,
    dtype: torch.dtype = torch.float32,
    fused: tuple[bool | None, ...] = (False, None, True),
) -> Iterator[dict[str, Any]]:
    """Keyword arguments: every input with every backend that can run it; each is counted."""
    for given in info.optim_inputs_func(device, dtype):
        for choice in fused:
            native = device.split(":")[0] in info.supports_fused_on and dtype in _FLOATS
            if choice and not native:
                continue
            COUNT["cases"] += 1
            yield {**copy.deepcopy(given.kwargs), "fused": choice}


def judge_of(params: Any, kwargs: dict[str, Any]) -> torch.optim.AdamW:
    """The AdamW of torch, tensor by tensor, with the same options."""
    kwargs = copy.deepcopy({k: v for k, v in kwargs.items() if k not in ("fused", "foreach")})
    if "betas" in kwargs:  # as numbers: older torch knows no others
        kwargs["betas"] = tuple(float(beta) for beta in kwargs["betas"])
    if "lr" in kwargs:  # torch computes with a float32 Tensor in float32, float64 parameters too
        kwargs["lr"] = float(kwargs["lr"])
    return torch.optim.AdamW(params, **kwargs, foreach=False)


def twins_of(params: list[Tensor], dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    """Parameters of the same values and memory order, in another dtype if one is given."""
    return [nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def give(*lists: list[Tensor], scale: float = 1.0, without: tuple[int, ...] = ()) -> None:
    """The same random gradients to all lists, drawn in the dtype of the first one."""
    for i, params in enumerate(zip(*lists, strict=True)):
        grad = torch.randn_like(params[0]).mul_(scale)
        for p in params:
            p.grad = None if i in without else grad.to(p.device, p.dtype, copy=True)


def params_on(device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix, a vector and a scalar."""
    return [
        nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in ((2, 3), (2,), ())
    ]


def named(params: list[Tensor], is_named: bool) -> list[Any]:
    """The parameters, as (name, parameter) if so wanted."""
    return [(f"name{i}", p) for i, p in enumerate(params)] if is_named else params


def train(opt: torch.optim.Optimizer, params: list[Tensor], num_steps: int, seed: int) -> None:
    """Steps on random gradients, the same for the same seed."""
    torch.manual_seed(seed)
    for _ in range(num_steps):
        give(params)
        opt.step()


def assert_close(ours: list[Tensor], theirs: list[Tensor], what: str, ulps: float = 8) -> None:
    """Within so many units in the last place of the dtype; those of 1 for values below 1.

    Half-width values may round to the other side of a tie and go on from there: two units.
    """
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        wide = a.dtype in (torch.float32, torch.float64)
        size = b.detach().double().abs().clamp(min=1 if wide else 2**-6)
        bound = (ulps if wide else 2.01) * torch.finfo(a.dtype).eps * size
        assert_within(a.cpu(), b.cpu(), bound.cpu(), f"{what}, tensor {i}")


def instantiate(
    generic: type, scope: dict[str, Any], only_for: tuple[str, ...] = ("cpu", "cuda")
) -> None:
    """The test class for each device here, as torch makes them; those for CUDA get the mark."""
    name = generic.__name__
    instantiate_device_type_tests(generic, scope, only_for=only_for)
    made = scope.get(f"{name}CUDA")
    if made is not None:
        made.pytestmark = [pytest.mark.cuda]
