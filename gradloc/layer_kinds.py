"""Tell what a module is (attention, MLP, norm, head, ...) from its name, class and children.

No model is known by name here, and where a module's parameters go is decided elsewhere: in
`layer_blocks.py` inside a block, in `layer_discovery.py` outside.
"""

from __future__ import annotations

import re

from torch import nn

ATTENTION = re.compile(r"attn|attention|(^|_)(self_?)?att($|_)")
CROSS_ATTENTION = re.compile(r"cross|encoder_att|enc_?dec|multihead_attn")
MLP = re.compile(r"mlp|ffn|ffw|feed_?forward|moe|expert|router|dense\w*dense|(^|_)ff($|_)")
NORM = re.compile(r"norm|(^|_)ln(_|\d|$)")
# What may stand in a block beside the MLP and still be a part of it.
MIXTURE_PART = re.compile(r"moe|expert|router|^gate$|shared")
# Query, key, value and output projections, where a block has no attention module around them.
PROJECTION = re.compile(r"^(w?qkv|w?[qkvo]|query|key|value|query_key_value)(_?proj\w*)?$")

_STATE_SPACE = re.compile(r"mamba|ssm")
# Families carry "Moe" in the class of every module, a Mamba mixer too: only the end counts.
_MLP_CLASS = re.compile(r"mlp|ffn|ffw|feedforward|moe(block|layer)?$|experts|router|dense\w*dense")
_LINEAR_CLASS = re.compile(r"^conv1d$|linear(\d*bit\w*|_\w+)?$")  # transformers' Conv1D is a Linear
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$")
_HEAD = re.compile(r"^(lm_?)?head$|^output_projection$")
# peft keeps the original module under one of these names, beside the adapter.
_ADAPTED = ("base_layer", "original_module")
# torch.compile, activation checkpointing and FSDP1 put a module of their own around a block.
_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
WRAPPER_NAMES = re.compile(rf"(?:{'|'.join(_TRANSPARENT)})\.")


def sublayer_kind(name: str, module: nn.Module | None = None) -> str | None:
    """Kind of a block's child: its lower-case name speaks first, then its class."""
    if ATTENTION.search(name):
        return "attention"
    if MLP.search(name):
        return "mlp"
    return None if module is None or _STATE_SPACE.search(name) else class_kind(module)


def class_kind(module: nn.Module) -> str | None:
    """The kind "attention" or "mlp" by the class alone, None if it is neither."""
    cls = class_name(module)
    if "attention" in cls or "attn" in cls:
        return "attention"
    return "mlp" if _MLP_CLASS.search(cls) and not _STATE_SPACE.search(cls) else None


def outside_kind(name: str, core: nn.Module, *, is_head: bool, heads_known: bool) -> str:
    """Kind of a module in no block; `name` is the last part of its path, in lower case.

    Where the model says which module is its head (`heads_known`), a mere "head" is something else.
    """
    if is_head or name == "lm_head" or (not heads_known and _HEAD.search(name)):
        return "head"
    if is_norm(name, core):
        return "norm"
    return "embedding" if isinstance(core, nn.Embedding) or _EMBEDDING.search(name) else "other"


def is_norm(name: str, core: nn.Module) -> bool:
    """Whether a module is a norm, a list of norms, or a norm with parts, named and classed so."""
    if isinstance(core, nn.ModuleList):
        norms = [is_norm(name, one) for one in core]
        return NORM.search(name) is not None and len(norms) > 0 and all(norms)
    classed = "norm" in class_name(core)
    named = NORM.search(name) is not None
    return (classed or named) and not is_linear(core) and (is_leaf(core) or (classed and named))


def normalises_input(module: nn.Module) -> bool:
    """Whether a sublayer contains the norm in front of it, as Megatron-BERT's attention does."""
    children = [name.lower() for name, _ in module.named_children()]
    return any(re.match(r"(ln|norm|(self_attn_|pre_)?layer_?norm)$", name) for name in children)


def is_linear(core: nn.Module) -> bool:
    """Whether a module is one matrix product, quantised or not."""
    linear = isinstance(core, nn.Linear) or _LINEAR_CLASS.search(class_name(core)) is not None
    return linear and is_leaf(core)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a leaf of torch.nn's kind (Linear, Embedding, a norm): never a block."""
    core = unwrapped(module)
    known = any(cls.__module__.startswith("torch.nn.modules.") for cls in type(core).__mro__[:-2])
    return is_leaf(core) and (known or is_linear(core) or is_norm("", core))


def is_leaf(module: nn.Module) -> bool:
    """Whether none of a module's children owns parameters."""
    return not any(owns_parameters(child) for child in module.children())


def owns_parameters(module: nn.Module) -> bool:
    """Whether there are parameters in a module or below it."""
    return next(module.parameters(), None) is not None


def is_adapted(module: nn.Module) -> bool:
    """Whether peft put this module around another one."""
    return any(isinstance(module._modules.get(name), nn.Module) for name in _ADAPTED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside what peft, torch.compile or checkpointing put around it, or itself."""
    for name in (*_ADAPTED, *_TRANSPARENT):
        inner = module._modules.get(name)
        if inner is not None:
            return unwrapped(inner)
    return module


def transparent_child(module: nn.Module) -> str | None:
    """Name under which a wrapper that adds nothing holds the real module."""
    return next((name for name in _TRANSPARENT if module._modules.get(name) is not None), None)


def class_name(module: nn.Module) -> str:
    """A module's class in lower case."""
    return type(module).__name__.lower()
