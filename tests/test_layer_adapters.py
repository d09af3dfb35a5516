"""LayerMap on models with peft adapters: an adapter belongs to the layer that it adapts."""

from __future__ import annotations

import pytest
from architectures import CASES, COMMON, build, check_partition

from gradloc.layers import LayerMap

peft = pytest.importorskip("peft", reason="peft is an optional dependency")
# peft reads an attribute that newer transformers renamed; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

LORA = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj"], "opt": ["q_proj", "fc1"]}


@pytest.mark.parametrize("name", LORA)
def test_lora_belongs_to_what_it_adapts(name):
    case = CASES[name]
    config = peft.LoraConfig(r=2, target_modules=LORA[name], fan_in_fan_out=name == "gpt2")
    model = peft.get_peft_model(build(case.config, case.settings), config)
    full = LayerMap.from_model(model)
    plain = LayerMap.from_model(build(case.config, case.settings))
    assert [n.removeprefix("base_model.model.") for n in full.names] == list(plain.names)
    assert [layer.kind for layer in full] == [layer.kind for layer in plain]
    check_partition(model, full)

    adapters = LayerMap.from_model(model, only_trainable=True)
    attention, mlp = (f"base_model.model.{case.stack}.0.{part}" for part in case.block)
    assert adapters.names[:2] == (attention, mlp)
    assert len(adapters) == 4
    for layer in adapters:
        assert len(layer.parameters) == 2, layer
        assert all("lora_" in parameter for parameter in layer.parameters)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(name for name, _, _ in adapters.parameters(model)) == sorted(trainable)


def test_lora_on_embedding_and_saved_head_stay_one_layer():
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]
    )
    model = peft.get_peft_model(build("LlamaConfig", COMMON), config)
    layers = LayerMap.from_model(model)
    prefix = "base_model.model."
    assert (layers.names[0], layers.names[-1]) == (
        f"{prefix}model.embed_tokens",
        f"{prefix}lm_head",
    )
    assert [layers.layers[i].kind for i in (0, -2, -1)] == ["embedding", "norm", "head"]
    assert len(layers.layers[0].parameters) == 3
    assert len(layers.layers[-1].parameters) == 2
    adapters = LayerMap.from_model(model, only_trainable=True)
    assert adapters.layers[-1].parameters == (f"{prefix}lm_head.modules_to_save.default.weight",)
    check_partition(model, layers)
