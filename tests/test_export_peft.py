"""Where peft puts adapters by the settings that a plan is exported to, on real models.

The other formats are in test_export.py.
"""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from architectures import CASES, TinyModel, shared_model
from test_export import active_names, gpt2_of, plan_of, plans_of
from torch import nn

from gradloc import LayerMap, LayerPlan
from gradloc.export import export_plan, lora_targets


def adaptable(model: nn.Module, layers: LayerMap, plan: LayerPlan) -> set[str]:
    """Linear, Conv1D and plain Embedding modules with their own weight in an active layer."""
    from transformers.pytorch_utils import Conv1D

    active = active_names(layers, plan)
    mamba = getattr(model, "config", None) is not None and model.config.model_type == "mamba"
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) or type(module) is nn.Embedding
        if f"{path}.weight" in active and not (mamba and path.endswith("out_proj"))
    }


def adapted(model: nn.Module, settings: dict) -> tuple[nn.Module, set[str]]:
    """The model with adapters as peft makes them, and where they are."""
    import peft

    with warnings.catch_warnings():
        # Advice on Conv1D beside Linear, and on merging where an embedding is tied.
        warnings.simplefilter("ignore")
        result = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **settings))
    places = {
        name.removeprefix("base_model.model.")
        for name, module in result.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    return result, places


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("granularity", ["submodule", "block"])
def test_adapters_are_where_layers_train(name: str, granularity: str) -> None:
    model = shared_model(name)
    layers = LayerMap.from_model(model, granularity=granularity)
    for plan in plans_of(layers)[:4]:
        expected = adaptable(model, layers, plan)
        if not expected:
            with pytest.raises(ValueError, match="peft can put no adapter there"):
                lora_targets(plan, model, layers=layers)
            continue
        targets = lora_targets(plan, model, layers=layers)
        settings = json.loads(json.dumps(targets.settings))
        _, places = adapted(model, settings)
        assert places == expected == set(targets.modules), settings
        held = {layers.names[layers.index(f"{path}.weight")] for path in expected}
        assert set(targets.layers_without) == set(plan.active) - held


@pytest.mark.parametrize(
    ("name", "active", "settings"),
    [
        (
            "gpt2",
            r".*\.(0|3|5)\.attn",
            {
                "target_modules": ["attn.c_attn", "attn.c_proj"],
                "layers_to_transform": [0, 3, 5],
                "layers_pattern": "h",
                "fan_in_fan_out": True,
            },
        ),
        (
            "gpt2",
            r".*\.mlp",
            {"target_modules": ["mlp.c_fc", "mlp.c_proj"], "fan_in_fan_out": True},
        ),
        (
            "gpt2",
            r".*\.(0|3)\.attn|.*\.3\.mlp|.*\.wpe",
            {
                "target_modules": [
                    "transformer.wpe",
                    *(
                        f"transformer.h.{block}.attn.c_{p}"
                        for block in (0, 3)
                        for p in ("attn", "proj")
                    ),
                    *("transformer.h.3.mlp.c_fc", "transformer.h.3.mlp.c_proj"),
                ],
                "fan_in_fan_out": True,
            },
        ),
        (
            "llama",
            r".*\.1\.mlp",
            {
                "target_modules": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
                "layers_to_transform": [1],
                "layers_pattern": "layers",
            },
        ),
        ("llama", "lm_head", {"target_modules": ["lm_head"]}),
    ],
    ids=["some blocks", "all blocks", "not a product", "one block", "head"],
)
def test_lora_settings(name: str, active: str, settings: dict) -> None:
    model = gpt2_of(6) if name == "gpt2" else shared_model(name)
    plan = plan_of(model, active)
    assert lora_targets(plan, model).settings == settings
    layers = LayerMap.from_model(model)
    assert adapted(model, settings)[1] == adaptable(model, layers, plan)


@pytest.mark.parametrize("name", ["opt", "gemma3", "gpt2", "llama"])
def test_an_adapted_model_runs(name: str) -> None:
    """OPT's positions are an Embedding that takes a mask: an adapter there would not even run."""
    model = shared_model(name)
    plan = LayerPlan(dict.fromkeys(LayerMap.from_model(model).names, 1.0))
    targets = lora_targets(plan, model)
    ours, _ = adapted(model, targets.settings)
    tokens = torch.arange(6)[None] + 3
    torch.testing.assert_close(ours(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert ("model.decoder.embed_positions" in targets.layers_without) == (name == "opt")
    assert ("model.embed_tokens" in targets.layers_without) == (name == "gemma3")


def test_blocks_at_the_root() -> None:
    """Some versions of peft want a dot before the stack's name: full names work in all."""
    model = TinyModel(depth=3)
    plan = plan_of(model, r"blocks\.[02]\.attn")
    wanted = [f"blocks.{block}.attn.{part}" for block in (0, 2) for part in ("qkv", "out")]
    settings = lora_targets(plan, model).settings
    assert settings == {"target_modules": wanted}
    assert adapted(model, settings)[1] == set(wanted)


def test_a_name_that_ends_another() -> None:
    """Such as a language model beside one of the same kind: only a regular expression will do."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    plan = plan_of(model, "a")
    settings = lora_targets(plan, model).settings
    assert settings == {"target_modules": "a"}
    assert adapted(model, settings)[1] == {"a"}


def test_numbers_inside_blocks() -> None:
    """Versions of peft read the block's number from the first or the last number of a name."""
    inner = [nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(4)]
    blocks = [nn.ModuleDict({"layers": nn.ModuleList(inner[i : i + 2])}) for i in (0, 2)]
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(blocks)})})
    plan = plan_of(model, r"model\.layers\.1", "block")
    wanted = ["model.layers.1.layers.0.up", "model.layers.1.layers.1.up"]
    settings = lora_targets(plan, model).settings
    assert settings == {"target_modules": wanted}
    assert adapted(model, settings)[1] == set(wanted)


def test_what_peft_cannot_do_is_said() -> None:
    model = shared_model("gpt2")
    scales = dict.fromkeys(LayerMap.from_model(model).names, 0.0)
    plan = LayerPlan({**scales, "transformer.wte": 1.0, "transformer.ln_f": 0.5})
    notes = export_plan(plan, model, "peft").notes
    assert [note.partition(":")[0] for note in notes] == [
        "the learning-rate scales (0.5 to 0.5) are lost",
        "no adapter in transformer.ln_f",
        "lm_head.weight is the same as transformer.wte.weight, but the adapter on transformer.wte "
        "does not change what lm_head does",
    ]
