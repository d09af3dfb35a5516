"""Each norm belongs to the layer whose input or output it normalises in a real forward pass.

Names decide in gradloc; here the tensors do: a norm's output goes into a module of its layer, or
its input comes out of one.
"""

from __future__ import annotations

import pytest
import torch
from architectures import CASES, T5, build, shared_model
from torch import nn

from gradloc.layers import LayerMap

# Post-norms stand behind the residual sum, which the forward pass alone does not tell from a norm
# in front of the next sublayer.
POST_NORM = {"opt-projected", "bert"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in POST_NORM])
def test_norms_go_where_the_forward_pass_uses_them(name):
    case, model = CASES[name], shared_model(name)
    layers = LayerMap.from_model(model)
    extra = {}
    if name == "gpt2-cross-attention":
        extra = {"encoder_hidden_states": torch.randn(1, 3, 16)}
    seen = storages(model, input_ids=torch.arange(3, 9)[None], **extra)
    check_norms(model, layers, seen, count=2 * sum(len(n) for _, n in case.block.values()))


def storages(model: nn.Module, **inputs) -> dict[str, tuple[set[int], set[int]]]:
    """Which storages go into and come out of every module; all are kept, so addresses differ."""
    kept: list[torch.Tensor] = []
    seen: dict[str, tuple[set[int], set[int]]] = {}

    def tensors(value) -> set[int]:
        if isinstance(value, torch.Tensor):
            kept.append(value)
            return {value.untyped_storage().data_ptr()}
        values = value.values() if isinstance(value, dict) else value
        found: set[int] = set()
        if isinstance(value, (dict, list, tuple)):
            found = found.union(*map(tensors, values))
        return found

    handles = []
    for name, module in model.named_modules():

        def hook(module, args, kwargs, output, name=name):
            seen[name] = (tensors([args, kwargs]), tensors(output))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def check_norms(
    model: nn.Module,
    layers: LayerMap,
    seen: dict[str, tuple[set[int], set[int]]],
    count: int,
) -> None:
    """A norm's output goes into a module of its layer, or its input comes out of one."""
    checked = 0
    for layer in layers:
        owners = {name.rpartition(".")[0] for name in layer.parameters}
        own = {layer.name} & seen.keys() or owners & seen.keys()
        norms = {
            owner
            for owner in owners
            if "norm" in type(model.get_submodule(owner)).__name__.lower()
            and not owner.startswith(f"{layer.name}.")
            and owner != layer.name
        }
        for norm in norms:
            into, out = seen[norm]
            feeds = any(out & seen[one][0] for one in own - norms)
            follows = any(into & seen[one][1] for one in own - norms)
            assert feeds or follows, f"{norm} has nothing to do with {layer.name}"
            checked += 1
    assert checked == count


def test_norms_of_t5():
    model = build("T5Config", T5, "T5ForConditionalGeneration")
    ids = torch.arange(3, 9)[None]
    seen = storages(model, input_ids=ids, decoder_input_ids=ids)
    check_norms(model, LayerMap.from_model(model), seen, count=10)


def test_the_check_sees_a_misplaced_norm():
    """The tests above would prove nothing if any placement passed."""
    model = shared_model("gemma2")
    wrong = LayerMap.from_model(
        model,
        patterns=[
            (r"layers\.(\d+)\.(self_attn|pre_feedforward_layernorm)", r"model.layers.\1.self_attn"),
            (r"layers\.(\d+)\.", r"model.layers.\1.mlp"),
            (".*", "rest"),
        ],
    )
    seen = storages(model, input_ids=torch.arange(3, 9)[None])
    with pytest.raises(AssertionError, match="has nothing to do with"):
        check_norms(model, wrong, seen, count=8)
