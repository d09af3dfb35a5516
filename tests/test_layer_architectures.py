"""LayerMap on the architectures of transformers: the expected layers are written down.

Whether norms are where the forward pass uses them is in test_layer_norm_placement.py.
"""

from __future__ import annotations

import pytest
from architectures import CASES, COMMON, T5, build, check_partition, shared_model

from gradloc.layers import LayerMap


@pytest.mark.parametrize("name", CASES)
def test_layers_of_an_architecture(name):
    case, model = CASES[name], shared_model(name)
    layers = LayerMap.from_model(model)
    inside = [f"{case.stack}.{i}.{part}" for i in range(2) for part in case.block]
    assert list(layers.names) == [*case.before, *inside, *case.after]
    for layer in layers:
        if layer.stack is None:
            last = layer.name.rpartition(".")[2]
            expected = (
                "head" if last in ("lm_head", "decoder")
                else "norm" if "norm" in last.lower() or last == "ln_f"
                else "other" if last in ("project_in", "project_out", "dense")
                else "embedding"
            )  # fmt: skip
            assert layer.kind == expected, layer.name
            assert layer.block is None
            continue
        kind, norms = case.block[layer.name.removeprefix(f"{case.stack}.{layer.block}.")]
        assert (layer.stack, layer.kind) == (case.stack, kind), layer.name
        block = f"{case.stack}.{layer.block}."
        outside = {p.removeprefix(block).rpartition(".")[0] for p in layer.parameters}
        outside = {p for p in outside if "." not in p and ("norm" in p or p.startswith("ln"))}
        assert outside == set(norms), layer.name
    check_partition(model, layers)


def test_t5_has_two_stacks_and_cross_attention():
    model = build("T5Config", T5, "T5ForConditionalGeneration")
    layers = LayerMap.from_model(model)
    attention, mlp = ("SelfAttention", "attention"), ("DenseReluDense", "mlp")
    expected = [("shared", "embedding")]
    for stack, parts in (
        ("encoder", [attention, mlp]),
        ("decoder", [attention, ("EncDecAttention", "attention"), mlp]),
    ):
        expected += [
            (f"{stack}.block.{i}.layer.{j}.{part}", kind)
            for i in range(2)
            for j, (part, kind) in enumerate(parts)
        ]
        expected.append((f"{stack}.final_layer_norm", "norm"))
    assert [(layer.name, layer.kind) for layer in layers] == expected
    cross = layers.layers[layers.names.index("decoder.block.1.layer.1.EncDecAttention")]
    assert set(cross.parameters) == {
        "decoder.block.1.layer.1.layer_norm.weight",
        *(f"decoder.block.1.layer.1.EncDecAttention.{w}.weight" for w in "qkvo"),
    }
    assert (cross.stack, cross.block) == ("decoder.block", 1)
    check_partition(model, layers)
    tied = layers.names.index("shared")
    for name in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        assert layers.index(name) == tied
    blocks = LayerMap.from_model(model, granularity="block")
    assert [layer.name for layer in blocks if layer.kind == "block"] == [
        f"{stack}.block.{i}" for stack in ("encoder", "decoder") for i in range(2)
    ]


EXACT = {
    "gpt2": (
        "transformer.h.1.mlp",
        {
            "transformer.h.1.ln_2.weight", "transformer.h.1.ln_2.bias",
            *(f"transformer.h.1.mlp.c_fc.{w}" for w in ("weight", "bias")),
            *(f"transformer.h.1.mlp.c_proj.{w}" for w in ("weight", "bias")),
        },
    ),
    "llama": (
        "model.layers.1.self_attn",
        {
            "model.layers.1.input_layernorm.weight",
            *(f"model.layers.1.self_attn.{w}_proj.weight" for w in "qkvo"),
        },
    ),
    "gemma2": (
        "model.layers.0.mlp",
        {
            "model.layers.0.pre_feedforward_layernorm.weight",
            "model.layers.0.post_feedforward_layernorm.weight",
            *(f"model.layers.0.mlp.{w}_proj.weight" for w in ("gate", "up", "down")),
        },
    ),
    "opt": (
        "model.decoder.layers.0.mlp",
        {
            f"model.decoder.layers.0.{m}.{w}"
            for m in ("fc1", "fc2", "final_layer_norm")
            for w in ("weight", "bias")
        },
    ),
    "falcon-new": (
        "transformer.h.1.mlp",
        {
            "transformer.h.1.ln_mlp.weight", "transformer.h.1.ln_mlp.bias",
            "transformer.h.1.mlp.dense_h_to_4h.weight", "transformer.h.1.mlp.dense_4h_to_h.weight",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_exact_parameters(name):
    layer, parameters = EXACT[name]
    layers = LayerMap.from_model(shared_model(name))
    assert set(layers.layers[layers.names.index(layer)].parameters) == parameters


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "mixtral", "mamba"])
def test_granularity_block(name):
    case, model = CASES[name], shared_model(name)
    layers = LayerMap.from_model(model, granularity="block")
    assert list(layers.names) == [*case.before, f"{case.stack}.0", f"{case.stack}.1", *case.after]
    assert [layer.block for layer in layers if layer.kind == "block"] == [0, 1]
    check_partition(model, layers)


def test_mixture_beside_the_mlp_is_one_layer():
    """Router, experts and shared MLP are one MLP, whether a module gathers them or not."""
    settings = {**COMMON, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = build("GraniteMoeSharedConfig", {**settings, "shared_intermediate_size": 8})
    layers = LayerMap.from_model(model)
    assert layers.names[1:3] == ("model.layers.0.self_attn", "model.layers.0.block_sparse_moe")
    assert any("shared_mlp" in name for name in layers.layers[2].parameters)
    check_partition(model, layers)


def test_hybrid_with_a_list_of_pattern_blocks():
    settings = {
        **COMMON, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    }  # fmt: skip
    model = build("JambaConfig", settings)
    layers = LayerMap.from_model(model)
    assert [(layer.name, layer.kind) for layer in layers if layer.stack] == [
        ("model.layers.0.mamba", "other"),
        ("model.layers.0.feed_forward", "mlp"),
        ("model.layers.1.self_attn", "attention"),
        ("model.layers.1.feed_forward", "mlp"),
    ]
    assert "model.layers.0.input_layernorm.weight" in layers.layers[1].parameters
    assert "model.layers.1.pre_ff_layernorm.weight" in layers.layers[4].parameters
    check_partition(model, layers)
