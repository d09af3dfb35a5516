"""How a single block is cut: norms by their names and order, mixtures, blocks within blocks."""

from __future__ import annotations

import pytest
import torch
from architectures import Attention, check_partition
from torch import nn

from gradloc.layer_blocks import Sublayer, place_norms
from gradloc.layers import LayerMap

ATTENTION = Sublayer("self_attn", "b.self_attn", "attention")
CROSS = Sublayer("encoder_attn", "b.encoder_attn", "attention")
MLP = Sublayer("mlp", "b.mlp", "mlp")
MAMBA = Sublayer("mamba", "b.mamba", "other")
NORMED = Sublayer("attention", "b.attention", "attention", normalises_input=True)

PLACEMENTS = {
    # id: (sublayers, norms in the order of definition, their sublayers)
    "llama": ([ATTENTION, MLP], "input_layernorm post_attention_layernorm", [0, 1]),
    "defined-in-any-order": ([ATTENTION, MLP], "post_attention_layernorm input_layernorm", [1, 0]),
    "gemma2": (
        [ATTENTION, MLP],
        "input_layernorm post_attention_layernorm pre_feedforward_layernorm "
        "post_feedforward_layernorm",
        [0, 0, 1, 1],
    ),
    "olmo2": ([ATTENTION, MLP], "post_attention_layernorm post_feedforward_layernorm", [0, 1]),
    "post-mlp-norm-beside-pre-norms": (
        [ATTENTION, MLP],
        "input_layernorm post_attention_layernorm post_mlp_layernorm",
        [0, 1, 1],
    ),
    "glm4": (
        [ATTENTION, MLP],
        "input_layernorm post_attention_layernorm post_self_attn_layernorm post_mlp_layernorm",
        [0, 1, 0, 1],
    ),
    "llama-of-meta": ([ATTENTION, MLP], "ffn_norm attention_norm", [1, 0]),
    "falcon": ([ATTENTION, MLP], "ln_mlp ln_attn", [1, 0]),
    "bart": (
        [ATTENTION, CROSS, MLP],
        "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
        [0, 1, 2],
    ),
    "gpt2-cross": ([ATTENTION, CROSS, MLP], "ln_1 ln_2 ln_cross_attn", [0, 2, 1]),
    "numbered-three": ([ATTENTION, CROSS, MLP], "norm1 norm2 norm3", [0, 1, 2]),
    "numbered-sandwich": ([ATTENTION, MLP], "norm1 norm2 norm3 norm4", [0, 0, 1, 1]),
    "second-round": (
        [ATTENTION, MLP],
        "input_layernorm post_attention_layernorm post_norm1 post_norm2",
        [0, 1, 0, 1],
    ),
    "one-behind-everything": ([ATTENTION, MLP], "attn_norm ffn_norm layer_norm", [0, 1, 1]),
    "parallel": ([ATTENTION, MLP], "ln", [0]),
    "rwkv-first-block": ([ATTENTION, MLP], "pre_ln ln1 ln2", [0, 0, 1]),
    "griffin": ([MAMBA, MLP], "temporal_pre_norm channel_pre_norm", [0, 1]),
    "hybrid-parallel": ([MAMBA, ATTENTION, MLP], "input_layernorm pre_ff_layernorm", [1, 2]),
    "state-space": ([MAMBA], "norm", [0]),
    "megatron-bert": ([NORMED, MLP], "ln", [1]),
    "mlp-only": ([MLP], "input_layernorm", [0]),
}


@pytest.mark.parametrize("case", PLACEMENTS)
def test_norms_by_name_and_order(case):
    sublayers, norms, expected = PLACEMENTS[case]
    placed = place_norms(norms.split(), sublayers)
    assert [placed[norm] for norm in norms.split()] == expected


def test_norm_named_after_a_matrix_of_the_block_stays_with_the_block():
    norms = ["input_layernorm", "post_attention_layernorm", "post_per_layer_input_norm"]
    placed = place_norms(norms, [ATTENTION, MLP], leftover=["per_layer_input_gate"])
    assert placed == {"input_layernorm": 0, "post_attention_layernorm": 1}


def stack(block: type[nn.Module]) -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])})


def outline(model: nn.Module) -> list[tuple[str, str]]:
    layers = LayerMap.from_model(model)
    check_partition(model, layers)
    return [(layer.name, layer.kind) for layer in layers if layer.block == 0]


class MLPBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})


def test_router_and_experts_beside_each_other_are_one_mlp():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention(4)
            self.gate = nn.Linear(4, 2)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
            self.shared_expert = nn.Sequential(nn.Linear(4, 4))

    model = stack(Block)
    assert outline(model) == [
        ("blocks.0.self_attn", "attention"),
        ("blocks.0.experts", "mlp"),
    ]
    layers = LayerMap.from_model(model)
    assert layers.index("blocks.1.gate.weight") == layers.index("blocks.1.experts.1.0.bias")
    assert layers.index("blocks.1.shared_expert.0.bias") == layers.index("blocks.1.gate.weight")


def test_projections_without_an_attention_module():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"):
                setattr(self, name, nn.Linear(4, 4))

    assert outline(stack(Block)) == [("blocks.0.attn", "attention"), ("blocks.0.mlp", "mlp")]


def test_gates_and_scales_belong_to_what_they_act_on():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    class Block(MLPBlock):
        def __init__(self) -> None:
            super().__init__()
            self.attn_scale = Scale()
            self.attn = Attention(4)
            self.mlp_scale = Scale()
            self.side = nn.Linear(4, 4)

    model = stack(Block)
    assert outline(model) == [
        ("blocks.0.attn", "attention"),
        ("blocks.0.mlp", "mlp"),
        ("blocks.0", "other"),
    ]
    layers = LayerMap.from_model(model)
    assert layers.names[layers.index("blocks.1.attn_scale.weight")] == "blocks.1.attn"
    assert layers.names[layers.index("blocks.1.mlp_scale.weight")] == "blocks.1.mlp"
    assert layers.names[layers.index("blocks.1.side.bias")] == "blocks.1"


def test_norms_around_attention_in_a_module_of_their_own():
    """DBRX's way: the second norm inside of norm_attn_norm is in front of the MLP."""

    class NormAttentionNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1 = nn.LayerNorm(4)
            self.attn = Attention(4)
            self.norm_2 = nn.LayerNorm(4)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_attn_norm = NormAttentionNorm()
            self.ffn = nn.Sequential(nn.Linear(4, 4))

    model = stack(Block)
    assert outline(model) == [
        ("blocks.0.norm_attn_norm.attn", "attention"),
        ("blocks.0.ffn", "mlp"),
    ]
    layers = LayerMap.from_model(model)
    assert layers.index("blocks.1.norm_attn_norm.norm_2.bias") == layers.index(
        "blocks.1.ffn.0.weight"
    )


def test_block_within_a_block():
    """Zamba's way: a block that holds a whole transformer block besides its own mixer."""

    class Inner(MLPBlock):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention(4)
            self.input_layernorm = nn.LayerNorm(4)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = Inner()
            self.mamba = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    assert outline(stack(Block)) == [
        ("blocks.0.shared.self_attn", "attention"),
        ("blocks.0.mamba", "other"),
        ("blocks.0.shared.mlp", "mlp"),
    ]


def test_family_names_in_classes_mislead_nobody():
    """KimiLinearRMSNorm is no Linear, and a GraniteMoe mixer is no mixture of experts."""

    class KimiLinearRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    class GraniteMoeMambaLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

    class Block(MLPBlock):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = GraniteMoeMambaLayer()
            self.input_layernorm = KimiLinearRMSNorm()

    model = stack(Block)
    assert outline(model) == [("blocks.0.mixer", "other"), ("blocks.0.mlp", "mlp")]
    layers = LayerMap.from_model(model)
    assert layers.names[layers.index("blocks.1.input_layernorm.weight")] == "blocks.1.mixer"


def test_list_that_holds_the_sublayers_themselves():
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_lin = nn.Linear(4, 4)
            self.out_lin = nn.Linear(4, 4)

    assert outline(stack(SelfAttention)) == [("blocks.0", "attention")]
