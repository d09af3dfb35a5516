"""Plans in the words of other trainers: each is read back as that trainer reads it."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from architectures import CASES, TinyModel, build, shared_model
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW, RandomLayers
from gradloc.export import (
    axolotl_patterns,
    export_plan,
    lora_targets,
    named_param_groups,
    param_groups,
    regular_expressions,
)

GRANULARITIES = ("submodule", "block", "tensor")


def plans_of(layers: LayerMap) -> list[LayerPlan]:
    """All layers, one alone (first and last), and random choices of several sizes."""
    ends = [
        LayerPlan({name: float(name == end) for name in layers.names})
        for end in (layers.names[0], layers.names[-1])
    ]
    shares = [(0.2, 1), (0.5, 2), (0.5, 3), (0.8, 4), (1.0, 5)]
    return [*ends, *(RandomLayers(share=share, seed=seed)(layers) for share, seed in shares)]


def active_names(layers: LayerMap, plan: LayerPlan) -> set[str]:
    return {name for one in layers if plan.scales[one.name] > 0 for name in one.parameters}


def frozen_names(model: nn.Module, active: set[str]) -> set[str]:
    """All names of parameters that don't train, those of tied ones included."""
    trained = {id(model.get_parameter(name)) for name in active}
    pairs = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in pairs if id(parameter) not in trained}


def gpt2_of(depth: int) -> nn.Module:
    return build("GPT2Config", {**CASES["gpt2"].settings, "n_layer": depth})


def plan_of(model: nn.Module, active: str, granularity: str = "submodule") -> LayerPlan:
    """Trains the layers whose whole name matches."""
    names = LayerMap.from_model(model, granularity=granularity).names
    return LayerPlan({name: float(re.fullmatch(active, name) is not None) for name in names})


def axolotl_reads(pattern: str) -> re.Pattern[str]:
    """A pattern as axolotl's LayerNamePattern compiles it; a range of rows must not be seen in it.

    src/axolotl/utils/freeze.py at 107c67a: every dot that no plus follows is escaped.
    """
    assert re.match(r"^(.+)\[([0-9]*)(?::([0-9]*))?\]$", pattern) is None, pattern
    return re.compile(re.sub(r"\.(?!\+)", r"\\.", pattern))


def old_axolotl_reads(pattern: str) -> re.Pattern[str]:
    """Before ranges were added, each dot was."""
    return re.compile(pattern.replace(".", r"\."))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_expressions_match_exactly_what_trains(name: str, granularity: str) -> None:
    model = shared_model(name)
    layers = LayerMap.from_model(model, granularity=granularity)
    for plan in plans_of(layers):
        active = active_names(layers, plan)
        frozen = frozen_names(model, active)
        found = [re.compile(one) for one in regular_expressions(plan, model, layers=layers)]
        patterns = axolotl_patterns(plan, model, layers=layers)
        readings = {
            "search": [one.search for one in found],
            "match": [one.match for one in found],
            "fullmatch": [one.fullmatch for one in found],
            "axolotl": [axolotl_reads(one).match for one in patterns],
            "old axolotl": [old_axolotl_reads(one).match for one in patterns],
        }
        for what, matchers in readings.items():
            matched = {one for one in active | frozen if any(match(one) for match in matchers)}
            assert matched == active, (what, found, patterns)
        # No line is there for nothing, and none twice.
        for one in found:
            assert any(one.match(parameter) for parameter in active), one
        assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("active", "granularity", "regex", "axolotl"),
    [
        (
            r"transformer\.h\.(0|3|5)\.attn",
            "submodule",
            [r"^transformer\.h\.(0|3|5)\.(ln_1|attn)\..+$"],
            ["^transformer.h.(0|3|5).(ln_1|attn)."],
        ),
        (
            r"transformer\.h\.\d+\.mlp|transformer\.wpe",
            "submodule",
            [r"^transformer\.wpe\..+$", r"^transformer\.h\.[0-9]+\.(ln_2|mlp)\..+$"],
            ["^transformer.wpe.", "^transformer.h.[0-9]+.(ln_2|mlp)."],
        ),
        (
            r"transformer\.h\.1[01]?",
            "block",
            [r"^transformer\.h\.(1|10|11)\..+$"],
            ["^transformer.h.(1|10|11)."],
        ),
        (
            r"transformer\.h\.[01]\.attn\.c_proj\.weight|transformer\.h\.1\.ln_2\.bias",
            "tensor",
            [
                r"^transformer\.h\.(0|1)\.attn\.c_proj\.weight$",
                r"^transformer\.h\.1\.ln_2\.bias$",
            ],
            ["^transformer.h.(0|1).attn.c_proj.weight$", "^transformer.h.1.ln_2.bias$"],
        ),
        (r"transformer\..*", "block", [r"^transformer\..+$"], ["^transformer."]),
    ],
    ids=["some blocks", "all blocks", "whole blocks", "tensors", "everything"],
)
def test_expressions_are_few(
    active: str, granularity: str, regex: list[str], axolotl: list[str]
) -> None:
    model = gpt2_of(12)
    plan = plan_of(model, active, granularity)
    assert regular_expressions(plan, model) == regex
    assert axolotl_patterns(plan, model) == axolotl


class Odd(nn.Module):
    """Names that a regular expression reads as something else."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a+b", "aab", "c[0]", "c0", "d-e", "d|f"):
            self.add_module(name, nn.Linear(2, 2))
        self.register_parameter("g*", nn.Parameter(torch.ones(2)))
        self.register_parameter("ggg", nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize("chosen", ["a+b", "c[0]", "d-e", "d|f", "g*"])
def test_odd_names(chosen: str) -> None:
    model = Odd()
    layers = LayerMap.from_model(model)
    plan = LayerPlan({name: float(name == chosen) for name in layers.names})
    active = active_names(layers, plan)
    names = [name for name, _ in model.named_parameters()]
    (found,) = regular_expressions(plan, model)
    assert {name for name in names if re.search(found, name)} == active
    (pattern,) = axolotl_patterns(plan, model)
    assert {name for name in names if axolotl_reads(pattern).match(name)} == active


def test_the_frozen_name_of_a_tied_weight_is_not_matched() -> None:
    """The head is one module: its bias trains alone, its weight is the frozen embedding."""
    model = nn.ModuleDict({"tokens": nn.Embedding(5, 2), "head": nn.Linear(2, 5)})
    model["head"].weight = model["tokens"].weight
    plan = plan_of(model, "head")
    assert regular_expressions(plan, model) == [r"^head\.bias$"]
    assert axolotl_patterns(plan, model) == ["^head.bias$"]
    both = LayerPlan(dict.fromkeys(plan.scales, 1.0))
    assert regular_expressions(both, model) == [r"^tokens\..+$", r"^head\..+$"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_train_as_the_plan(granularity: str) -> None:
    """AdamW of torch over the groups ends where LocalizedAdamW does, frozen layers untouched."""
    ours = copy.deepcopy(shared_model("gpt2"))
    theirs = copy.deepcopy(ours)
    before = copy.deepcopy(dict(ours.named_parameters()))
    layers = LayerMap.from_model(ours, granularity=granularity)
    scales = {name: (0.0, 0.3, 1.0, 2.5)[index % 4] for index, name in enumerate(layers.names)}
    plan = LayerPlan(scales)
    # The gradient of a key's bias is rounding noise around 0: eps keeps Adam from enlarging it.
    options = {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-4}
    mine = LocalizedAdamW(ours.named_parameters(), lr=0.01, layers=layers, plan=plan, **options)
    groups = param_groups(theirs, plan, lr=0.01)
    assert [(group["lr_scale"], group["lr"]) for group in groups] == [
        (scale, 0.01 * scale) for scale in dict.fromkeys(s for s in scales.values() if s)
    ]
    other = torch.optim.AdamW(groups, lr=123.0, **options)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step)) for one in (mine, other)
    ]
    for step in range(4):
        tokens = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((ours, mine), (theirs, other)):
            model.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        frozen = scales[layers.names[layers.index(name)]] == 0
        torch.testing.assert_close(parameter, wanted[name], rtol=2e-5, atol=2e-6, msg=name)
        assert torch.equal(wanted[name], before[name]) == frozen, name


def test_groups_by_name() -> None:
    model = shared_model("gpt2")
    layers = LayerMap.from_model(model)
    scales = {name: float(index % 3) for index, name in enumerate(layers.names)}
    plan = LayerPlan(scales)
    groups = named_param_groups(plan, model)
    assert [group["lr_scale"] for group in groups] == [1.0, 2.0]
    for group in groups:
        wanted = [
            n for one in layers if scales[one.name] == group["lr_scale"] for n in one.parameters
        ]
        assert group["params"] == wanted
    export = export_plan(plan, model, "param-groups")
    assert json.loads(export.text) == groups
    assert export.notes == ()


def test_groups_of_a_wrapped_model() -> None:
    model = TinyModel()
    plan = plan_of(model, r"blocks\.\d\.attn")
    wrapped = nn.parallel.DataParallel(model)
    (group,) = param_groups(wrapped, plan, lr=0.5, layers=LayerMap.from_model(model))
    (direct,) = param_groups(model, plan, lr=0.5)
    assert [id(one) for one in group["params"]] == [id(one) for one in direct["params"]]
    for ask in (regular_expressions, axolotl_patterns, lora_targets):
        with pytest.raises(ValueError, match=r"has no parameter '.*without DDP"):
            ask(plan, wrapped, layers=LayerMap.from_model(model))


def test_the_yaml_for_axolotl() -> None:
    yaml = pytest.importorskip("yaml")
    model = gpt2_of(4)
    plan = LayerPlan({**plan_of(model, r".*\.[02]\.attn").scales, "transformer.h.3.mlp": 0.25})
    export = export_plan(plan, model, "axolotl")
    assert yaml.safe_load(export.text) == {
        "unfrozen_parameters": [
            "^transformer.h.(0|2).(ln_1|attn).", "^transformer.h.3.(ln_2|mlp)."
        ]
    }  # fmt: skip
    assert export.text.startswith("# LayerPlan(3 of 11 layers train; by hand)\n# For full fine")
    (note,) = export.notes
    assert "0.25" in note
    assert "param-groups keeps them" in note


def test_a_policy_of_several_lines_stays_a_comment() -> None:
    yaml = pytest.importorskip("yaml")
    model = shared_model("llama")
    plan = LayerPlan(plan_of(model, ".*mlp").scales, policy="mine\nunfrozen_parameters: []")
    assert len(yaml.safe_load(export_plan(plan, model, "axolotl").text)["unfrozen_parameters"]) == 1


@pytest.mark.parametrize("to", ["axolotl", "peft", "param-groups", "regex"])
def test_a_model_without_weights_gives_the_same(to: str) -> None:
    model = shared_model("llama")
    outline = copy.deepcopy(model).to("meta")
    plan = RandomLayers(count=3)(LayerMap.from_model(model))
    assert export_plan(plan, outline, to) == export_plan(plan, model, to)


@pytest.mark.parametrize("to", ["axolotl", "peft", "param-groups", "regex"])
def test_plans_that_cannot_be_exported(to: str) -> None:
    model = shared_model("llama")
    names = LayerMap.from_model(model).names
    with pytest.raises(ValueError, match="nothing trains, so there is nothing to export"):
        export_plan(LayerPlan(dict.fromkeys(names, 0.0)), model, to)
    with pytest.raises(ValueError, match=r"unknown layers 'a'.*Tried granularity"):
        export_plan(LayerPlan({"a": 1.0}), model, to)


def test_options_that_mean_nothing() -> None:
    model = shared_model("llama")
    plan = LayerPlan(dict.fromkeys(LayerMap.from_model(model).names, 1.0))
    with pytest.raises(ValueError, match="to='trl': choose from 'axolotl', 'peft'"):
        export_plan(plan, model, "trl")
    for lr in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"lr={lr!r}: give a finite"):
            param_groups(model, plan, lr=lr)
