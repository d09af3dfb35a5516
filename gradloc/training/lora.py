"""LoRA through peft, in the linear modules of a plan's active layers, nowhere else.

Makes and merges adapters. Training them is `gradloc.training.train`'s business, and where else a
plan can send peft is `gradloc.export`'s.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradloc.export import lora_targets
from gradloc.layer_kinds import is_linear
from gradloc.layers import LayerMap
from gradloc.memory import fitting_layers
from gradloc.plan import LayerPlan
from gradloc.wording import listed

# Layers of these kinds get no adapter, even where their matrix could carry one.
_WITHOUT = ("embedding", "norm", "head")
_ADAPTER = ".lora_"  # in the name of every parameter of an adapter, after the module's path
_PREFIX = "base_model.model."  # what peft puts before the names of the model


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Settings of the adapters: W x becomes W x + (alpha / rank) B A x (Hu et al., ICLR 2022).

    Args:
        rank: rows of A, >= 1.
        alpha: scale of the adapter, above 0.
        dropout: on the adapter's input while training, in [0, 1).

    Raises:
        ValueError: a setting out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r}: give a whole number of at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha={self.alpha!r}: give a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: give a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LoraModel:
    """A model with adapters, and what the optimizer needs to train them.

    Attributes:
        model: the peft model; only its adapters require gradients.
        layers: its layers. An adapter is in the layer of what it adapts.
        plan: over these layers: those with an adapter keep the scale of the original plan, all
            others have 0.
    """

    model: nn.Module
    layers: LayerMap
    plan: LayerPlan


def add_lora(
    model: nn.Module,
    lora: Lora,
    plan: LayerPlan,
    layers: LayerMap | None = None,
    *,
    seed: int = 0,
) -> LoraModel:
    """Put adapters into the linear modules of the active layers.

    Embeddings, norms and the head get none, also where the plan trains them, nor do the few linear
    modules that their model reads past any adapter. A layer's scale multiplies the learning rate of
    its adapters, as it does for the weights themselves.

    peft puts the adapters into the very model that is given and turns off `requires_grad` of all
    its own parameters; use the model that is returned from then on, and `merge_lora` to get a plain
    one back. Its outputs are at first those of the model, as B begins at zero.

    Args:
        model: a causal language model of transformers, without adapters.
        lora: settings of the adapters.
        plan: which layers, and at which scale.
        layers: the plan's map; None: made from the model, with the granularity that fits.
        seed: of A. The same seed gives the same bits; the global random state is left alone.

    Raises:
        ValueError: the plan does not fit the model or trains nothing, its active layers have no
            linear module, or the model has adapters already. Nothing has been changed then.
        ImportError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'gradloc[peft]'") from error

    if hasattr(model, "peft_config"):
        raise ValueError(
            f"model={type(model).__name__} has adapters of peft already: give the model without, "
            "or merge them first (merge_lora)"
        )
    found = fitting_layers(plan, model, layers)
    linear = _linear_weights(plan, model, found)
    tensors = LayerMap.from_model(model, granularity="tensor")
    chosen = LayerPlan({name: float(name in linear) for name in tensors.names}, plan.policy)
    targets = lora_targets(chosen, model, layers=tensors)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias="none",
        task_type="CAUSAL_LM",
        **targets.settings,
    )
    scales = {path: linear[f"{path}.weight"] for path in targets.modules}
    # peft makes adapters on the CPU and moves them: seeding its generator alone is enough, and
    # leaves those of other devices as they are.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks newer versions of transformers for an attribute by its older name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        torch.default_generator.manual_seed(seed)
        adapted: nn.Module = peft.get_peft_model(model, config)
    granularity = found.granularity if found.granularity != "patterns" else "tensor"
    adapted_layers = LayerMap.from_model(adapted, granularity=granularity)
    return LoraModel(
        model=adapted, layers=adapted_layers, plan=_plan_over(adapted_layers, scales, plan)
    )


def merge_lora(peft_model: nn.Module) -> nn.Module:
    """Add the adapters to the weights, W + (alpha / rank) B A, and take them out.

    Args:
        peft_model: the model of a `LoraModel`, which is used up.

    Returns:
        The model that `add_lora` was given, of its own class and with all parameters requiring
        gradients again. Merging rounds to the dtype of the weights.

    Raises:
        ValueError: the model has no adapters.
    """
    merge: Any = getattr(peft_model, "merge_and_unload", None)
    if merge is None:
        raise ValueError(
            f"peft_model={type(peft_model).__name__} has no adapters: give the model of what "
            "add_lora returned"
        )
    merged: nn.Module = merge()
    for parameter in merged.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return merged


def _linear_weights(plan: LayerPlan, model: nn.Module, layers: LayerMap) -> dict[str, float]:
    """Names of the weights that get an adapter, each with the scale of its layer.

    Raises:
        ValueError: there are none.
    """
    # By tensor, as a layer may be a whole block, or what patterns gather.
    kinds = {layer.name: layer.kind for layer in LayerMap.from_model(model, granularity="tensor")}
    linear = {
        name: plan.scales[layer.name]
        for layer in layers
        for name in layer.parameters
        if plan.scales[layer.name] > 0
        and kinds[name] not in _WITHOUT
        and name.endswith(".weight")
        and is_linear(model.get_submodule(name.removesuffix(".weight")))
    }
    if not linear:
        active = listed(plan.active) or "there are none"
        raise ValueError(
            f"{plan}: the active layers ({active}) have no linear module that could carry an "
            "adapter; embeddings, norms and the head get none: choose attention or MLP layers, or "
            "train these without LoRA"
        )
    return linear


def _plan_over(layers: LayerMap, scales: dict[str, float], plan: LayerPlan) -> LayerPlan:
    """The plan over the layers of the peft model, by the modules that were adapted."""
    found = dict.fromkeys(layers.names, 0.0)
    for layer in layers:
        for name in layer.parameters:
            module, adapter, _ = name.removeprefix(_PREFIX).partition(_ADAPTER)
            if adapter:
                found[layer.name] = scales[module]
    return LayerPlan(found, policy=f"LoRA in the layers of ({plan.policy})")
