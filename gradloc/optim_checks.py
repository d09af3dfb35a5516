"""What LocalizedAdamW refuses, and the words in which it says so. Changes nothing.

The first words of the messages about hyperparameters are those of `torch.optim.AdamW`, so that code
that looks for them finds them.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from gradloc import sharding
from gradloc.layers import LayerMap
from gradloc.ops import is_dense
from gradloc.optim_freeze import ON_FREEZE
from gradloc.optim_state import check_saved
from gradloc.plan import LayerPlan
from gradloc.recadam import RecAdam
from gradloc.wording import listed

_TRAINED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def parameter_name(group: dict[str, Any], group_index: int, index: int) -> str:
    """The parameter's name, or where it stands."""
    names = group.get("param_names")
    if names:
        return repr(names[index])
    return f"{index} of param group {group_index} (shape {tuple(group['params'][index].shape)})"


def check_options(
    layers: LayerMap | None,
    plan: LayerPlan | None,
    *,
    max_grad_norm: float | None,
    on_nonfinite: str | None,
    on_freeze: str,
    state_dtype: torch.dtype | None,
    seed: int,
    recadam: RecAdam | None,
) -> None:
    """Check the options that torch's AdamW does not have."""
    if layers is not None and not isinstance(layers, LayerMap):
        raise ValueError(f"layers={layers!r} is not a LayerMap: use LayerMap.from_model(model)")
    if plan is not None:
        _plan_layers(plan, layers)
    number = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool)
    if max_grad_norm is not None and not (number and max_grad_norm > 0):
        raise ValueError(
            f"max_grad_norm={max_grad_norm!r}: a positive number, or None for no clipping"
        )
    if on_nonfinite not in (None, "ignore", "skip", "raise"):
        raise ValueError(f"on_nonfinite={on_nonfinite!r}: choose 'ignore', 'skip' or 'raise'")
    if on_freeze not in ON_FREEZE:
        raise ValueError(f"on_freeze={on_freeze!r}: choose 'keep', 'offload' or 'drop'")
    if state_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"state_dtype={state_dtype!r}: torch.float32 or torch.bfloat16, or None for float32 "
            "(float64 for float64 parameters)"
        )
    if recadam is not None and not isinstance(recadam, RecAdam):
        raise ValueError(
            f"recadam={recadam!r}: a gradloc.RecAdam, such as RecAdam(gamma=100.0), or None"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: a whole number of at least 0, below 2**63")


def check_plan(plan: LayerPlan, layers: LayerMap | None, layer_ids: list[list[int]]) -> None:
    """Check that a plan fits the layers, and that all it trains is in the optimizer."""
    layers = _plan_layers(plan, layers)
    plan.check(layers.names)
    if not plan.active:
        raise ValueError(
            f"nothing would train: the plan ({plan.policy}) freezes all {len(plan.scales)} layers; "
            "give some layer a scale above 0"
        )
    present = {layers.names[layer] for ids in layer_ids for layer in ids}
    absent = [name for name in plan.active if name not in present]
    if absent:
        raise ValueError(
            f"the plan trains {listed(absent)}, but no parameter of that is in this "
            "optimizer: it cannot train. Give the optimizer all parameters "
            "(model.named_parameters()), and set requires_grad=False only afterwards; or give such "
            "layers the scale 0"
        )


def _plan_layers(plan: LayerPlan, layers: LayerMap | None) -> LayerMap:
    if not isinstance(plan, LayerPlan):
        raise ValueError(
            f"plan={plan!r} is not a LayerPlan: use a policy, or LayerPlan({{layer name: scale}})"
        )
    if layers is None:
        raise ValueError(
            "a plan needs layers: make the optimizer with layers=LayerMap.from_model(model), the "
            "map that the plan was made for"
        )
    return layers


def check_lr(lr: Any) -> None:
    """Check a learning rate, which schedulers change between steps; not one on an accelerator."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element: lr has shape {tuple(lr.shape)}")
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return  # reading it would wait for the device
    if not 0.0 <= float(lr) < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}: lr is a finite number >= 0")


def check_group(group: dict[str, Any]) -> None:
    """Check the hyperparameters of a param group."""
    check_lr(group["lr"])
    if not 0.0 <= group["eps"]:
        raise ValueError(f"Invalid epsilon value: {group['eps']}: eps is a number >= 0")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas}: a pair of numbers, each in [0, 1)")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"betas must be either both floats or both Tensors: {betas}")
    for i, beta in enumerate(betas):
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}: each is in [0, 1)")
    if not 0.0 <= group["weight_decay"]:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}: a number >= 0")
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported: leave it False")


def check_capturable(param: Tensor, name: str, *, on_device: bool) -> None:
    """Check that a step of this parameter can be captured, as capturable=True asks."""
    if not on_device:
        raise ValueError(
            f"capturable=True, but parameter {name} (device={param.device}, dtype={param.dtype}) "
            "is not updated by the CUDA kernels: leave capturable=False, or move the model to a "
            "CUDA device in float32, bfloat16 or float16 and leave fused=None"
        )


def check_parameters(groups: list[dict[str, Any]], *, stochastic_rounding: bool) -> None:
    """Check that all parameters can be trained and that no two share memory."""
    ranges: list[tuple[str, int, int, str]] = []
    everywhere = {param.device.type for group in groups for param in group["params"]}
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            name = parameter_name(group, g, i)
            if param.dtype not in _TRAINED:
                raise ValueError(
                    f"parameter {name} has dtype={param.dtype}: only real floating-point "
                    "parameters of 16 to 64 bits train (for complex ones, train "
                    "torch.view_as_real of them)"
                )
            sharding.refuse_unsupported(param, name)
            if param.device.type == "meta" and everywhere != {"meta"}:
                raise ValueError(
                    f"parameter {name} is on the meta device, which holds no values, and others "
                    "are not: load its weights before the optimizer is made"
                )
            if stochastic_rounding and param.dtype == torch.float16:
                raise ValueError(
                    f"stochastic_rounding=True, but parameter {name} is float16: it is for "
                    "bfloat16 (float32 parameters need none); convert the model to bfloat16"
                )
            if (
                param.numel()
                and param.layout == torch.strided
                and not sharding.is_sharded(param)
                and param.data_ptr()
                and is_dense(param)
            ):
                start = param.data_ptr()
                end = start + param.numel() * param.element_size()
                ranges.append((str(param.device), start, end, name))
    ranges.sort()
    for (device, _, end, name), (other_device, start, _, other) in itertools.pairwise(ranges):
        if device == other_device and start < end:
            raise ValueError(
                f"parameters {name} and {other} overlap in memory: an element would be updated "
                "twice. Pass tied weights once, as one nn.Parameter"
            )


def check_grad(
    grad: Tensor, param: Tensor, group: dict[str, Any], group_index: int, index: int
) -> None:
    """Check a gradient before a step."""
    if grad.layout != torch.strided:
        name = parameter_name(group, group_index, index)
        raise ValueError(
            f"the gradient of parameter {name} has layout={grad.layout}: AdamW does not support "
            "sparse gradients; "
            "use sparse=False in the embedding, or torch.optim.SparseAdam for it"
        )
    if grad.shape != param.shape or grad.device != param.device or not grad.is_floating_point():
        name = parameter_name(group, group_index, index)
        raise ValueError(
            f"the gradient of parameter {name} has shape={tuple(grad.shape)}, "
            f"device={grad.device}, "
            f"dtype={grad.dtype}; the parameter has shape={tuple(param.shape)}, "
            f"device={param.device}, "
            f"dtype={param.dtype}: call zero_grad() after a model was moved or changed"
        )


def check_loadable(
    state_dict: dict[str, Any],
    groups: list[dict[str, Any]],
    defaults: dict[str, Any],
    kept: list[dict[str, Any]],
) -> None:
    """Check that a state dict fits the parameters and that its hyperparameters are in range.

    Args:
        state_dict: what is to be loaded.
        groups: the optimizer's param groups.
        defaults: what older state dicts lack.
        kept: by param group, the entries that loading will not change.
    """
    both = zip(groups, state_dict["param_groups"], kept, strict=False)
    for g, (group, saved, own) in enumerate(both):
        check_group({**defaults, **saved, **own})
        for i, (param, saved_id) in enumerate(zip(group["params"], saved["params"], strict=False)):
            state = state_dict["state"].get(saved_id, {})
            check_saved(state, param, parameter_name(group, g, i))
