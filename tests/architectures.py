"""Tiny models for the tests of layers: one of our own, and transformers' architectures.

The architectures stand in a table with the layers that they must have; tests are in test_layer*.py.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradloc.layers import LayerMap


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)


class Block(nn.Module):
    """Pre-norm block whose norms are defined last and whose MLP is two loose matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.norm_a = nn.LayerNorm(width)
        self.norm_b = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.ones(1))


class TinyModel(nn.Module):
    """A model nobody has seen before; the head is defined first and tied to the embedding."""

    def __init__(self, *, tied: bool = True, width: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.head = nn.Linear(width, 11, bias=False)
        self.final_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.tokens = nn.Embedding(11, width)
        self.temperature = nn.Parameter(torch.ones(()))
        if tied:
            self.head.weight = self.tokens.weight


COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {**COMMON, "ffn_dim": 24, "word_embed_proj_dim": 16}
FALCON = {k: v for k, v in COMMON.items() if k not in ("intermediate_size", "num_key_value_heads")}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


@dataclass(frozen=True)
class Case:
    """An architecture and the layers that it must have.

    `block` maps layer (inside a block; "" is the block's own) to (kind, norms that stand outside
    of that module and belong to it).
    """

    config: str
    settings: dict[str, Any]
    stack: str
    block: dict[str, tuple[str, tuple[str, ...]]]
    before: tuple[str, ...]  # embeddings, and what else stands before the blocks
    after: tuple[str, ...]  # final norm and head


def pre_norm(
    attention: str, mlp: str, first: str = "input_layernorm", second: str | None = None
) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {attention: ("attention", (first,)), mlp: ("mlp", (second,) if second else ())}


LLAMA_BLOCK = pre_norm("self_attn", "mlp", second="post_attention_layernorm")
LLAMA = ("model.layers", LLAMA_BLOCK, ("model.embed_tokens",), ("model.norm", "lm_head"))
TIED_LLAMA = (*LLAMA[:3], ("model.norm",))
SANDWICH = {
    "self_attn": ("attention", ("input_layernorm", "post_attention_layernorm")),
    "mlp": ("mlp", ("pre_feedforward_layernorm", "post_feedforward_layernorm")),
}
CASES = {
    "gpt2": Case(
        "GPT2Config", GPT, "transformer.h", pre_norm("attn", "mlp", "ln_1", "ln_2"),
        ("transformer.wte", "transformer.wpe"), ("transformer.ln_f",),
    ),
    "gpt2-cross-attention": Case(
        "GPT2Config", {**GPT, "add_cross_attention": True}, "transformer.h",
        {
            "attn": ("attention", ("ln_1",)),
            "crossattention": ("attention", ("ln_cross_attn",)),
            "mlp": ("mlp", ("ln_2",)),
        },
        ("transformer.wte", "transformer.wpe"), ("transformer.ln_f",),
    ),
    "gpt-neox": Case(
        "GPTNeoXConfig", COMMON, "gpt_neox.layers",
        pre_norm("attention", "mlp", second="post_attention_layernorm"),
        ("gpt_neox.embed_in",), ("gpt_neox.final_layer_norm", "lm_head"),
    ),
    "opt": Case(
        "OPTConfig", OPT, "model.decoder.layers",
        pre_norm("self_attn", "mlp", "self_attn_layer_norm", "final_layer_norm"),
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        ("model.decoder.final_layer_norm",),
    ),
    "opt-projected": Case(
        "OPTConfig", {**OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
        "model.decoder.layers",
        pre_norm("self_attn", "mlp", "self_attn_layer_norm", "final_layer_norm"),
        (
            "model.decoder.embed_tokens", "model.decoder.embed_positions",
            "model.decoder.project_out", "model.decoder.project_in",
        ),
        (),
    ),
    "bloom": Case(
        "BloomConfig", {**COMMON, "n_layer": 2, "n_head": 2}, "transformer.h",
        pre_norm("self_attention", "mlp", second="post_attention_layernorm"),
        ("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
        ("transformer.ln_f",),
    ),
    "llama": Case("LlamaConfig", COMMON, *LLAMA),
    "mistral": Case("MistralConfig", COMMON, *LLAMA),
    "qwen2": Case("Qwen2Config", COMMON, *LLAMA),
    "qwen3": Case("Qwen3Config", {**COMMON, "head_dim": 8}, *LLAMA),
    "gemma": Case("GemmaConfig", {**COMMON, "head_dim": 8}, *TIED_LLAMA),
    "gemma2": Case(
        "Gemma2Config", {**COMMON, "head_dim": 8}, "model.layers", SANDWICH, *TIED_LLAMA[2:]
    ),
    "gemma3": Case(
        "Gemma3TextConfig", {**COMMON, "head_dim": 8}, "model.layers", SANDWICH, *TIED_LLAMA[2:]
    ),
    "phi": Case(
        "PhiConfig", COMMON, "model.layers", pre_norm("self_attn", "mlp"),
        ("model.embed_tokens",), ("model.final_layernorm", "lm_head"),
    ),
    "phi3": Case("Phi3Config", COMMON, *LLAMA),
    "falcon-sequential": Case(
        "FalconConfig", {**FALCON, "parallel_attn": False}, "transformer.h",
        pre_norm("self_attention", "mlp", second="post_attention_layernorm"),
        ("transformer.word_embeddings",), ("transformer.ln_f",),
    ),
    "falcon-parallel": Case(
        "FalconConfig", FALCON, "transformer.h", pre_norm("self_attention", "mlp"),
        ("transformer.word_embeddings",), ("transformer.ln_f",),
    ),
    "falcon-new": Case(
        "FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 1},
        "transformer.h", pre_norm("self_attention", "mlp", "ln_attn", "ln_mlp"),
        ("transformer.word_embeddings",), ("transformer.ln_f",),
    ),
    "mpt": Case(
        "MptConfig",
        {"vocab_size": 64, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32},
        "transformer.blocks", pre_norm("attn", "ffn", "norm_1", "norm_2"),
        ("transformer.wte",), ("transformer.norm_f",),
    ),
    "mixtral": Case("MixtralConfig", {**COMMON, "num_local_experts": 2}, *LLAMA),
    "qwen2-moe": Case(
        "Qwen2MoeConfig",
        {
            **COMMON, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        *LLAMA,
    ),
    "olmo2": Case(
        "Olmo2Config", COMMON, "model.layers",
        {
            "self_attn": ("attention", ("post_attention_layernorm",)),
            "mlp": ("mlp", ("post_feedforward_layernorm",)),
        },
        *LLAMA[2:],
    ),
    "glm4": Case(
        "Glm4Config", {**COMMON, "head_dim": 8}, "model.layers",
        {
            "self_attn": ("attention", ("input_layernorm", "post_self_attn_layernorm")),
            "mlp": ("mlp", ("post_attention_layernorm", "post_mlp_layernorm")),
        },
        *LLAMA[2:],
    ),
    "cohere": Case(
        "CohereConfig", COMMON, "model.layers", pre_norm("self_attn", "mlp"), *TIED_LLAMA[2:]
    ),
    "gptj": Case(
        "GPTJConfig", {**GPT, "rotary_dim": 4}, "transformer.h", pre_norm("attn", "mlp", "ln_1"),
        ("transformer.wte",), ("transformer.ln_f", "lm_head"),
    ),
    "mamba": Case(
        "MambaConfig",
        {k: v for k, v in COMMON.items() if "num_key" not in k and k != "intermediate_size"},
        "backbone.layers", {"mixer": ("other", ("norm",))},
        ("backbone.embeddings",), ("backbone.norm_f",),
    ),
    "bert": Case(
        "BertConfig", {**COMMON, "is_decoder": True}, "bert.encoder.layer",
        {"attention": ("attention", ()), "mlp": ("mlp", ())},
        (
            "bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings",
            "bert.embeddings.token_type_embeddings", "bert.embeddings.LayerNorm",
        ),
        (
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm", "cls.predictions.decoder",
        ),
    ),
}  # fmt: skip


def build(config: str, settings: dict[str, Any], model: str = "AutoModelForCausalLM") -> nn.Module:
    """A model with random weights, the same for the same arguments."""
    import transformers

    torch.manual_seed(0)
    with warnings.catch_warnings():  # advice about optional kernels
        warnings.simplefilter("ignore")
        made = getattr(transformers, config)(**settings)
        cls = getattr(transformers, model)
        return (cls.from_config(made) if model.startswith("Auto") else cls(made)).eval()


@functools.cache
def shared_model(name: str) -> nn.Module:
    """The model of a case, built once; not to be changed."""
    return build(CASES[name].config, CASES[name].settings)


def check_partition(model: nn.Module, layers: LayerMap) -> None:
    """Every parameter is in exactly one layer, and sizes add up."""
    expected = [name for name, _ in model.named_parameters()]
    placed = [name for layer in layers for name in layer.parameters]
    assert sorted(placed) == sorted(expected)
    for layer in layers:
        sizes = sum(model.get_parameter(name).numel() for name in layer.parameters)
        assert layer.num_elements == sizes, layer.name
    unique = {id(p): p for p in model.parameters()}.values()
    assert sum(layer.num_elements for layer in layers) == sum(p.numel() for p in unique)
    for name, parameter in model.named_parameters():
        position = layers.index(name)
        assert name in layers.layers[position].parameters
        assert layers.index(parameter) == position, name
