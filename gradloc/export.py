"""A plan in the words of other trainers: axolotl, peft, torch param groups, regular expressions.

Needs the model for its names and module classes only, so the meta device will do. Writes no files
and imports none of these trainers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradloc.layer_kinds import is_linear
from gradloc.layers import LayerMap
from gradloc.memory import fitting_layers, tied_names
from gradloc.name_patterns import NameGroup, expression, group_names, numbered, prefixes
from gradloc.plan import LayerPlan

# Modules whose weights these models' own kernels read, past any adapter; peft refuses them.
_BYPASSED = ("out_proj",)
_BYPASSING = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


@dataclass(frozen=True)
class Export:
    """A plan for another trainer.

    Attributes:
        text: what goes into its configuration, ending in a newline.
        notes: what of the plan is not in it, a sentence each.
    """

    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoraTargets:
    """Where peft's adapters go under a plan.

    Attributes:
        settings: keyword arguments of `peft.LoraConfig` that choose exactly `modules`.
        modules: full names of the modules that get an adapter, in model order.
        layers_without: active layers in which no module can carry one.
        notes: what else differs from training the layers themselves, a sentence each.
    """

    settings: dict[str, Any]
    modules: tuple[str, ...]
    layers_without: tuple[str, ...]
    notes: tuple[str, ...] = ()


def export_plan(
    plan: LayerPlan, model: nn.Module, to: str, *, layers: LayerMap | None = None
) -> Export:
    """Write a plan for another trainer.

    Args:
        plan: the plan.
        model: the model; only names and module classes are read.
        to: "axolotl" (YAML), "peft" (JSON: arguments of `LoraConfig`), "param-groups" (JSON: see
            `named_param_groups`) or "regex" (one regular expression a line).
        layers: the plan's map; None: made from the model, with the granularity that fits.

    Raises:
        ValueError: an unknown `to`, a plan that does not fit the model, or under which nothing
            trains, or for peft no module that can carry an adapter.
    """
    if to not in FORMATS:
        raise ValueError(f"to={to!r}: choose from {', '.join(map(repr, FORMATS))}")
    return FORMATS[to](plan, model, _layers_to_train(plan, model, layers))


def regular_expressions(
    plan: LayerPlan, model: nn.Module, *, layers: LayerMap | None = None
) -> list[str]:
    """Anchored regular expressions that match the names of the parameters that train, no others.

    They say the same to `re.search`, `re.match`, `re.fullmatch` and `grep -E`. The further names of
    tied parameters that do not train are not matched either.

    Raises:
        ValueError: as `export_plan`.
    """
    layers = _layers_to_train(plan, model, layers)
    return [
        "^" + expression(group, r"\.") + (r"\..+$" if group.is_module else "$")
        for group in _active_groups(plan, model, layers)
    ]


def axolotl_patterns(
    plan: LayerPlan, model: nn.Module, *, layers: LayerMap | None = None
) -> list[str]:
    """The list for axolotl's `unfrozen_parameters`.

    axolotl escapes every dot by itself and asks whether a name begins with a match
    (`axolotl/utils/freeze.py`): an escaped dot would match nothing there, and a pattern needs no
    end. Older versions escape the dot of `.+` too, so none is used.

    Raises:
        ValueError: as `export_plan`.
    """
    layers = _layers_to_train(plan, model, layers)
    return [
        f"^{expression(group, '.')}{'.' if group.is_module else '$'}"
        for group in _active_groups(plan, model, layers)
    ]


def named_param_groups(
    plan: LayerPlan, model: nn.Module, *, layers: LayerMap | None = None
) -> list[dict[str, Any]]:
    """Names of the parameters that train, by learning-rate scale.

    Returns:
        A dict {"lr_scale": scale, "params": names} for every scale above 0, in model order.

    Raises:
        ValueError: as `export_plan`.
    """
    groups: dict[float, list[str]] = {}
    for layer in _layers_to_train(plan, model, layers):
        scale = plan.scales[layer.name]
        if scale > 0:
            groups.setdefault(scale, []).extend(layer.parameters)
    return [{"lr_scale": scale, "params": names} for scale, names in groups.items()]


def param_groups(
    model: nn.Module, plan: LayerPlan, *, lr: float, layers: LayerMap | None = None
) -> list[dict[str, Any]]:
    """Param groups for any torch optimizer: the active layers, each with learning rate lr·scale.

    `torch.optim.AdamW` over them does what `LocalizedAdamW` does under this plan, in more
    launches where there are many scales, and for one plan only. Schedulers work as usual: they
    start from each group's own rate.

    Args:
        model: the model; may be wrapped (DDP, torch.compile).
        plan: the plan.
        lr: learning rate of a layer with scale 1.
        layers: the plan's map; None: made from the model, with the granularity that fits.

    Returns:
        A dict {"params": parameters, "lr": lr·scale, "lr_scale": scale} for every scale above 0.

    Raises:
        ValueError: as `export_plan`, or a learning rate that is negative or not finite.
    """
    if not math.isfinite(lr) or lr < 0:
        raise ValueError(f"lr={lr!r}: give a finite learning rate >= 0")
    layers = _layers_to_train(plan, model, layers)
    groups: dict[float, list[nn.Parameter]] = {}
    for _, parameter, position in layers.parameters(model):
        scale = plan.scales[layers.names[position]]
        if scale > 0:
            groups.setdefault(scale, []).append(parameter)
    return [
        {"params": found, "lr": lr * scale, "lr_scale": scale} for scale, found in groups.items()
    ]


def lora_targets(
    plan: LayerPlan, model: nn.Module, *, layers: LayerMap | None = None
) -> LoraTargets:
    """Settings of `peft.LoraConfig` that put adapters into the active layers, nowhere else.

    `target_modules` is a list of names within a block, with `layers_to_transform` and
    `layers_pattern` where blocks differ; where the choice is not the same in every chosen block, it
    is a list of full names, and a regular expression where a full name ends another one.

    Raises:
        ValueError: as `export_plan`; or no module of the active layers can carry an adapter.
    """
    layers = _layers_to_train(plan, model, layers)
    _check_names(model, layers)
    found: dict[str, nn.Module] = {}
    without, notes = [], []
    for layer in layers:
        if plan.scales[layer.name] == 0:
            continue
        before = len(found)
        for name in layer.parameters:
            path, _, last = name.rpartition(".")
            module = model.get_submodule(path)
            if last == "weight" and _carries_adapter(module) and not _bypassed(path, model):
                found[path] = module
                notes += [
                    f"{alias} is the same as {name}, but the adapter on {path} does not change "
                    f"what {alias.rpartition('.')[0]} does"
                    for one, alias in tied_names(model, layer)
                    if one == name
                ]
        if len(found) == before:
            without.append(layer.name)
    if not found:
        raise ValueError(
            f"{plan}: no module of the active layers ({', '.join(without[:4])}) is a Linear, "
            "Conv1D or Embedding, so peft can put no adapter there: choose other layers, or train "
            "these without peft"
        )
    names = [name for name, _ in model.named_modules() if name]
    settings = _lora_settings(list(found), names)
    transposed = {
        not isinstance(one, nn.Linear)
        for one in found.values()
        if not isinstance(one, nn.Embedding)
    }
    if transposed == {True}:
        settings["fan_in_fan_out"] = True  # Conv1D alone: peft would set it with a warning
    return LoraTargets(settings, tuple(found), tuple(without), tuple(notes))


def _carries_adapter(module: nn.Module) -> bool:
    # An embedding with a forward of its own (positions from a mask, a scale) is not what peft's
    # adapter of an embedding adds to.
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward
    return isinstance(module, nn.Linear) or (
        is_linear(module) and type(module).__name__ == "Conv1D"
    )


def _bypassed(path: str, model: nn.Module) -> bool:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return model_type in _BYPASSING and path.rpartition(".")[2] in _BYPASSED


def _lora_settings(chosen: list[str], names: list[str]) -> dict[str, Any]:
    """The simplest of four ways that gives exactly these modules.

    A regular expression comes last: for models whose experts are fused, peft replaces it by the
    last parts of the names that it matches, in every block.
    """
    split = [numbered(path) for path in chosen]
    prefixes = {prefix for prefix, _, _ in split}
    settings: dict[str, Any]
    if len(prefixes) == 1 and None not in {number for _, number, _ in split}:
        settings = {"target_modules": list(dict.fromkeys(rest for _, _, rest in split))}
        if _lora_matches(settings, names) == set(chosen):
            return settings
        settings["layers_to_transform"] = sorted({int(str(number)) for _, number, _ in split})
        settings["layers_pattern"] = prefixes.pop().rpartition(".")[2]
        if _lora_matches(settings, names) == set(chosen):
            return settings
    settings = {"target_modules": chosen}
    if _lora_matches(settings, names) == set(chosen):
        return settings
    groups = group_names([(path, False) for path in chosen], names)
    return {"target_modules": "|".join(expression(group, r"\.") for group in groups)}


def _lora_matches(settings: dict[str, Any], names: Iterable[str]) -> set[str]:
    """The modules that peft takes a list of targets to mean (`check_target_module_exists`).

    Versions differ in which block number they read from a name with several, the first or the last,
    and whether a stack may be at the root; a name on which they differ is given as both "" and
    itself, which no choice of modules contains.
    """
    found = set()
    targets = settings["target_modules"]
    for name in names:
        if name not in targets and not name.endswith(tuple(f".{target}" for target in targets)):
            continue
        if name in targets or "layers_to_transform" not in settings:
            found.add(name)
            continue
        stack = settings["layers_pattern"]
        inside = [
            match is not None and int(match[1]) in settings["layers_to_transform"]
            for match in (
                re.match(rf".*\.{stack}\.(\d+)\.", name),
                re.match(rf"(?:^|.*?\.){stack}\.(\d+)\.", name),
            )
        ]
        if any(inside):
            found.add(name)
        if any(inside) != all(inside):
            found.add("")
    return found


def _active_groups(plan: LayerPlan, model: nn.Module, layers: LayerMap) -> list[NameGroup]:
    _check_names(model, layers)
    active = [name for layer in layers if plan.scales[layer.name] > 0 for name in layer.parameters]
    everything = dict(model.named_parameters(remove_duplicate=False))
    # Further names of the active ones may be matched as well; all other names must not.
    trained = {id(everything[name]) for name in active}
    frozen = [name for name, parameter in everything.items() if id(parameter) not in trained]
    closed = {prefix for name in frozen for prefix in prefixes(name)}
    units: dict[tuple[str, bool], None] = {}
    for name in active:
        whole = next((prefix for prefix in prefixes(name) if prefix not in closed), None)
        units[(name, False) if whole is None else (whole, True)] = None
    return group_names(list(units), everything)


def _check_names(model: nn.Module, layers: LayerMap) -> None:
    names = {name for name, _ in model.named_parameters()}
    for layer in layers:
        for name in layer.parameters:
            if name not in names:
                raise ValueError(
                    f"model={type(model).__name__} has no parameter {name!r} of layer "
                    f"{layer.name!r}: pass the model that the map was made from, without DDP or "
                    "torch.compile around it"
                )


def _layers_to_train(plan: LayerPlan, model: nn.Module, layers: LayerMap | None) -> LayerMap:
    found = fitting_layers(plan, model, layers)
    if not plan.active:
        raise ValueError(f"{plan}: nothing trains, so there is nothing to export: choose a layer")
    return found


def _lost_scales(plan: LayerPlan) -> list[str]:
    scales = sorted({scale for scale in plan.scales.values() if scale not in (0.0, 1.0)})
    if not scales:
        return []
    return [
        f"the learning-rate scales ({scales[0]:.4g} to {scales[-1]:.4g}) are lost: this format "
        "knows only trained and frozen; param-groups keeps them"
    ]


def _axolotl(plan: LayerPlan, model: nn.Module, layers: LayerMap) -> Export:
    lines = [f"  - '{_yaml(one)}'" for one in axolotl_patterns(plan, model, layers=layers)]
    head = f"# {' '.join(str(plan).split())}\n# For full fine-tuning: leave `adapter` out.\n"
    return Export(
        head + "unfrozen_parameters:\n" + "\n".join(lines) + "\n", tuple(_lost_scales(plan))
    )


def _yaml(text: str) -> str:
    return text.replace("'", "''")


def _peft(plan: LayerPlan, model: nn.Module, layers: LayerMap) -> Export:
    targets = lora_targets(plan, model, layers=layers)
    notes = _lost_scales(plan)
    if targets.layers_without:
        notes.append(
            f"no adapter in {', '.join(targets.layers_without)}: no Linear, Conv1D or plain "
            "Embedding is there to carry one"
        )
    text = json.dumps(targets.settings, indent=1, ensure_ascii=False) + "\n"
    return Export(text, (*notes, *targets.notes))


def _param_groups(plan: LayerPlan, model: nn.Module, layers: LayerMap) -> Export:
    groups = named_param_groups(plan, model, layers=layers)
    return Export(json.dumps(groups, indent=1, ensure_ascii=False) + "\n")


def _regex(plan: LayerPlan, model: nn.Module, layers: LayerMap) -> Export:
    lines = regular_expressions(plan, model, layers=layers)
    return Export("\n".join(lines) + "\n", tuple(_lost_scales(plan)))


FORMATS: dict[str, Callable[[LayerPlan, nn.Module, LayerMap], Export]] = {
    "axolotl": _axolotl,
    "peft": _peft,
    "param-groups": _param_groups,
    "regex": _regex,
}
