"""Interpolation with the old weights after training: θ ← θ* + α (θ − θ*), one α for all layers.

Costs no training tokens: α is chosen by an objective of the caller, on text or facts held out for
that. Trains nothing and evaluates nothing by itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gradloc.sharding import is_sharded
from gradloc.wording import quoted

OldWeights: TypeAlias = Mapping[str, Tensor] | str | os.PathLike[str]


@dataclass(frozen=True)
class AlphaChoice:
    """An interpolation weight and what it was chosen by.

    Attributes:
        alpha: the choice.
        values: the objective at every weight that was tried, in that order.
    """

    alpha: float
    values: dict[float, float]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters, to be taken before training; not its buffers.

    Unlike those of `state_dict()` they stay as they are when the model trains.

    Returns:
        Name -> copy on the parameter's device; a tied parameter once, under its first name.
    """
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def interpolate(model: nn.Module, old_weights: OldWeights, alpha: float) -> None:
    """Move every parameter towards its old value, in place.

    At α = 1 no bit changes; at α = 0 the old weights are there bit for bit. Between, float16 and
    bfloat16 are computed in float32 and rounded once. Quantised (integer) parameters are left out,
    as they do not train; buffers and the optimizer's state stay as they are.

    Args:
        model: the trained model.
        old_weights: θ*, by parameter name: what `weights_of` gave, or a safetensors file, which is
            read tensor by tensor. A tied parameter may have any of its names, and buffers are
            ignored, so that a file of `save_pretrained` will do.
        alpha: in [0, 1].

    Raises:
        ValueError: α out of range; old weights that are missing, unknown, of another shape, not
            floating point, or the model's own memory; a model sharded over processes; a file that
            is not safetensors. Nothing has been changed then.
        FileNotFoundError: no such file.
    """
    _check_alpha(alpha)
    with _opened(old_weights) as (found, read), torch.no_grad():
        pairs = _matched(model, found)
        if alpha == 1:
            return
        for parameter, name in pairs:
            _move(parameter, read(name), alpha)


@contextmanager
def interpolated(model: nn.Module, old_weights: OldWeights, alpha: float) -> Iterator[None]:
    """Interpolate for the length of a `with` block; then the trained weights are back bit for bit.

    They come back after an exception as well, and whatever the block did to the parameters. Takes
    a copy of them for that time.

    Raises:
        ValueError, FileNotFoundError: as `interpolate`.
    """
    trained = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    try:
        interpolate(model, old_weights, alpha)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in trained:
                parameter.copy_(value)


def choose_alpha(
    model: nn.Module,
    old_weights: OldWeights,
    objective: Callable[[], float],
    alphas: Iterable[float],
) -> AlphaChoice:
    """Try interpolation weights and choose that with the lowest objective.

    The model ends as it came; `interpolate` with the choice changes it.

    Args:
        model: the trained model.
        old_weights: as for `interpolate`.
        objective: called with the model interpolated; lower is better. For a fair comparison it
            looks at validation data, not at those on which the result is reported.
        alphas: weights to try, each in [0, 1], in this order.

    Returns:
        The choice. Of equal values the larger α wins, which is nearer to what was trained; NaN
        never does.

    Raises:
        ValueError: no weights, or one that stands twice or is out of range; the objective is NaN at
            all of them; and as `interpolate`.
        FileNotFoundError: as `interpolate`.
    """
    candidates = list(alphas)
    for alpha in candidates:
        _check_alpha(alpha)
    if not candidates or len(set(candidates)) < len(candidates):
        raise ValueError(f"alphas={candidates!r}: give at least one weight, each of them once")
    values: dict[float, float] = {}
    for alpha in candidates:
        with interpolated(model, old_weights, alpha):
            values[float(alpha)] = float(objective())
    known = [alpha for alpha, value in values.items() if not math.isnan(value)]
    if not known:
        raise ValueError(
            f"the objective is NaN at every alpha in {candidates!r}: the run has diverged, or the "
            "objective measures nothing; train with a lower learning rate, or look at its data"
        )
    return AlphaChoice(min(known, key=lambda alpha: (values[alpha], -alpha)), values)


def _check_alpha(alpha: float) -> None:
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not number or not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha={alpha!r}: a number in [0, 1]; 1 keeps the trained weights, 0 the old ones"
        )


def _move(parameter: Tensor, old: Tensor, alpha: float) -> None:
    if alpha == 0:
        parameter.copy_(old)
        return
    # Not below float32; float64 stays.
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    old = old.to(parameter.device, dtype)
    parameter.copy_(torch.lerp(old, parameter.to(dtype), alpha))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What is known of an old weight before it is read; `address` is 0 for one in a file."""

    shape: tuple[int, ...]
    is_floating_point: bool
    address: int = 0


@contextmanager
def _opened(
    old_weights: OldWeights,
) -> Iterator[tuple[dict[str, _Found], Callable[[str], Tensor]]]:
    """What old weights there are, by name, and a function that reads one."""
    if isinstance(old_weights, Mapping):
        yield (
            {
                name: _Found(
                    shape=tuple(tensor.shape),
                    is_floating_point=tensor.is_floating_point(),
                    address=0 if is_sharded(tensor) else tensor.data_ptr(),
                )
                for name, tensor in old_weights.items()
            },
            old_weights.__getitem__,
        )
        return
    from safetensors import SafetensorError, safe_open

    path = Path(old_weights)
    if not path.is_file():
        raise FileNotFoundError(f"old_weights={str(path)!r}: no such file; give a safetensors file")
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"old_weights={str(path)!r} is not a safetensors file ({error}): give one such as "
            "save_pretrained writes"
        ) from error
    with opened as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        yield (
            {
                name: _Found(
                    shape=tuple(one.get_shape()),
                    is_floating_point=one.get_dtype().startswith(("F", "BF")),
                )
                for name, one in slices.items()
            },
            file.get_tensor,
        )


def _matched(model: nn.Module, found: Mapping[str, _Found]) -> list[tuple[nn.Parameter, str]]:
    """Each floating-point parameter once, with the name of its old weight.

    Raises:
        ValueError: something does not fit.
    """
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    known = {name for aliases in names.values() for name in aliases}
    known.update(name for name, _ in model.named_buffers(remove_duplicate=False))
    pairs, wrong = [], []
    missing = []
    for key, parameter in parameters.items():
        if is_sharded(parameter):
            raise ValueError(
                f"parameter {names[key][0]!r} is sharded over processes (FSDP2): interpolate a "
                "model that one process has whole, such as the one that was saved"
            )
        if not parameter.is_floating_point():
            continue
        name = next((name for name in names[key] if name in found), "")
        if not name:
            missing.append(names[key][0])
            continue
        old = found[name]
        if old.shape != tuple(parameter.shape):
            wrong.append(f"{name!r} has shape {old.shape}, the model's {tuple(parameter.shape)}")
        elif not old.is_floating_point:
            wrong.append(f"{name!r} is not floating point: load the model without quantisation")
        elif old.address and old.address == parameter.data_ptr():
            wrong.append(
                f"{name!r} is the model's own memory, which trained with it: take "
                "weights_of(model) before training"
            )
        pairs.append((parameter, name))
    unknown = [name for name in found if name not in known]
    wrong += [f"there is no {quoted(missing)}"] if missing else []
    wrong += [f"the model has no {quoted(unknown)}"] if unknown else []
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(
            f"old_weights do not fit model={type(model).__name__}: {'; '.join(wrong[:3])}{more}. "
            "Give the weights that this very model had before training"
        )
    return pairs
