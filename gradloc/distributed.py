"""Loading an optimizer from torch.distributed.checkpoint, whatever the plan was that saved it.

torch loads the moments that the optimizer has already, and a fresh LocalizedAdamW would have those
of its active layers only: moments of layers that are frozen now and trained before would stay on
disk. Here the optimizer is given room for exactly what was saved. Saving needs nothing of this, and
parameters are not touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradloc.optim import LocalizedAdamW
from gradloc.optim_anchor import ANCHOR, anchor_of, exact_dtype
from gradloc.optim_state import LIKE_PARAMETER, MOMENTS, ensure_state, moment_dtype
from gradloc.wording import listed

if TYPE_CHECKING:
    from torch.distributed.checkpoint.storage import StorageReader

_STATE = "state."
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile, activation checkpointing


def prepare_to_load(
    model: nn.Module,
    optimizer: LocalizedAdamW,
    source: str | os.PathLike[str] | StorageReader | Mapping[str, Any],
) -> str:
    """Give the optimizer zero moments for exactly the parameters that have some in a checkpoint.

    Likewise for RecAdam's anchors, for which the parameters' values serve until they are loaded.
    Call it before torch's `get_state_dict` or `get_optimizer_state_dict`, or with a full state dict
    before `set_optimizer_state_dict`. What the optimizer had before is replaced.

    Args:
        model: the model, sharded (FSDP2) or wrapped (DDP) or neither.
        optimizer: the optimizer of its parameters; Accelerate's wrapper of it will do.
        source: a folder that `torch.distributed.checkpoint.save` wrote, or a reader of it. Or an
            optimizer state dict that is keyed by parameter names, as `get_optimizer_state_dict`
            gives it: then every rank has to call, and what rank 0 holds counts.

    Returns:
        Where the optimizer's state stands in the checkpoint, such as "optim"; "" at the top.

    Raises:
        ValueError: no moments in the source, moments of a parameter that the optimizer does not
            have, or two optimizers in one checkpoint; nothing has been changed then.
    """
    optimizer = _unwrapped(optimizer)
    params = _params_by_name(model, optimizer)
    prefix, saved = _saved_moments(_state_keys(source), params)
    for param in params.values():
        optimizer.state.pop(param, None)
    for name, keys in saved.items():
        param = params[name]
        dtype = moment_dtype(param, optimizer._state_dtype)
        with torch.no_grad():
            state = optimizer.state[param]
            if keys != {ANCHOR}:
                ensure_state(
                    state,
                    param,
                    dtype,
                    amsgrad=MOMENTS[2] in keys,
                    step_device=torch.device("cpu"),
                )
            if ANCHOR in keys:  # loading rounds it as the settings say, and these are not known yet
                state[ANCHOR] = anchor_of(param, exact_dtype(param))
    return prefix


def load_optimizer(
    model: nn.Module,
    optimizer: LocalizedAdamW,
    checkpoint: str | os.PathLike[str] | StorageReader,
) -> None:
    """Load the optimizer from a folder that `torch.distributed.checkpoint.save` wrote.

    Any number of ranks may have saved it; every rank has to call. Moments, steps, hyperparameters,
    plan, seed and counts come back as they were saved. The model's weights are not loaded here.

    Args:
        model: the model, sharded (FSDP2) or wrapped (DDP) or neither.
        optimizer: the optimizer of its parameters; Accelerate's wrapper of it will do.
        checkpoint: the folder, or a reader of it.

    Raises:
        ValueError: as for `prepare_to_load`.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    inner = _unwrapped(optimizer)
    prefix = prepare_to_load(model, inner, checkpoint)
    ours: dict[str, Any] = get_optimizer_state_dict(model, inner)
    order = [list(group["params"]) for group in ours["param_groups"]]
    nested = ours
    for part in reversed(prefix.split(".") if prefix else []):
        nested = {part: nested}
    load(nested, storage_reader=_reader(checkpoint))
    # By position, and not through torch's set_optimizer_state_dict: that asks for moments of every
    # parameter that requires a gradient, and leaves out those of parameters that do not.
    positions = {name: i for i, name in enumerate(name for names in order for name in names)}
    groups = [
        {**group, "params": [positions[name] for name in names]}
        for group, names in zip(ours["param_groups"], order, strict=True)
    ]
    state = {positions[name]: saved for name, saved in ours["state"].items()}
    inner.load_state_dict({"state": state, "param_groups": groups})


def _unwrapped(optimizer: Any) -> LocalizedAdamW:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate.optimizer.AcceleratedOptimizer
    if not isinstance(inner, LocalizedAdamW):
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: this is for LocalizedAdamW; other optimizers "
            "load through torch.distributed.checkpoint.state_dict"
        )
    return inner


def _params_by_name(model: nn.Module, optimizer: LocalizedAdamW) -> dict[str, Tensor]:
    """The optimizer's parameters by the names that a checkpoint knows them by."""
    ours = {param for group in optimizer.param_groups for param in group["params"]}
    found: dict[str, Tensor] = {
        _checkpoint_name(model, name): param
        for name, param in model.named_parameters()
        if param in ours
    }
    if len(found) < len(ours):
        raise ValueError(
            f"{len(ours) - len(found)} of the optimizer's {len(ours)} parameters are not in this "
            "model: pass the model that the optimizer was made for"
        )
    return found


def _checkpoint_name(model: nn.Module, name: str) -> str:
    """The name without the wrappers' parts, as torch.distributed.checkpoint saves it."""
    parts = []
    module: Any = model
    for part in name.split("."):
        wrapped = isinstance(module, (DataParallel, DistributedDataParallel)) and part == "module"
        if not wrapped and part not in _WRAPPERS:
            parts.append(part)
        module = getattr(module, part)
    return ".".join(parts)


def _reader(checkpoint: Any) -> StorageReader:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if isinstance(checkpoint, (str, os.PathLike)):
        return FileSystemReader(checkpoint)
    reader: StorageReader = checkpoint
    return reader


def _state_keys(source: Any) -> list[str]:
    """The flat keys of a checkpoint, or those that an optimizer state dict would have in one."""
    if not isinstance(source, Mapping):
        return list(_reader(source).read_metadata().state_dict_metadata)
    if "state" in source:
        states = source["state"].items()
        keys = [f"{_STATE}{name}.{moment}" for name, state in states for moment in state]
    else:  # flattened already, or on another rank
        keys = list(source)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shared = [keys]
        torch.distributed.broadcast_object_list(shared)
        keys = shared[0]
    return keys


def _saved_moments(
    keys: Iterable[str], params: Mapping[str, Tensor]
) -> tuple[str, dict[str, set[str]]]:
    """The common prefix of the optimizer's keys, and the moments saved for each parameter.

    A key is "<prefix>.state.<parameter name>.<moment>", and names have dots too.
    """
    found: dict[str, dict[str, set[str]]] = {}
    unknown: dict[str, set[str]] = {}
    for key in keys:
        path, _, moment = key.rpartition(".")
        if moment not in LIKE_PARAMETER:
            continue
        starts = [0] if path.startswith(_STATE) else []
        starts += [i + 1 for i in range(len(path)) if path.startswith(f".{_STATE}", i)]
        names = [(path[: max(i - 1, 0)], path[i + len(_STATE) :]) for i in starts]
        known = [(prefix, name) for prefix, name in names if name in params]
        for prefix, name in known[:1]:
            found.setdefault(prefix, {}).setdefault(name, set()).add(moment)
        if not known and names:
            unknown.setdefault(names[0][0], set()).add(names[0][1])
    if len(found) != 1:
        what = "no moments of this model's parameters"
        if found:
            what = f"the states of several optimizers ({', '.join(map(repr, sorted(found)))})"
        raise ValueError(
            f"the checkpoint has {what}: save {{'model': ..., 'optim': ...}} as "
            "torch.distributed.checkpoint.state_dict.get_state_dict gives them, and load into the "
            "same model"
        )
    prefix, saved = found.popitem()
    if unknown.get(prefix):
        strange = sorted(unknown[prefix])
        raise ValueError(
            f"the checkpoint has moments of {listed(strange)}, and the optimizer does "
            "not have these parameters: give it all that trained (model.named_parameters())"
        )
    return prefix, saved
