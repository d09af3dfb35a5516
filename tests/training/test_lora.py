"""LoRA in the layers of a plan: where adapters are, what trains, and merging them again."""

import copy
import math

import pytest
import torch
from architectures import shared_model
from conftest import make_gpt2
from numerics import assert_same_bits
from small_runs import StopAt, assert_equal, parameters, settings
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from gradloc import (
    LayerMap,
    LayerPlan,
    LocalizedAdamW,
    TracedGradientPolicy,
    trace_gradients,
)
from gradloc.training.lora import Lora, add_lora, merge_lora
from gradloc.training.train import train

pytest.importorskip("peft", reason="peft is an optional dependency")

PREFIX = "base_model.model."
# Linear modules by kind of layer.
PARTS = {
    "gpt2": {"attn": ("c_attn", "c_proj"), "mlp": ("c_fc", "c_proj")},
    "llama": {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    },
}
STACK = {"gpt2": "transformer.h", "llama": "model.layers"}


def model_of(name):
    return copy.deepcopy(shared_model(name))


def plan_of(model, scales, granularity="submodule"):
    names = LayerMap.from_model(model, granularity=granularity).names
    assert scales.keys() <= set(names)
    return LayerPlan({name: scales.get(name, 0.0) for name in names})


def adapted_modules(model):
    """Where adapters are, by the names of the parameters."""
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    return {name.removeprefix(PREFIX).partition(".lora_")[0] for name in names}


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def randomise(model, seed=3):
    """Adapters that do something: B is zero at first."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))


def base_weights(model):
    """The model's own weights, under the names that they have without adapters."""
    return {
        name.removeprefix(PREFIX).replace(".base_layer", ""): value
        for name, value in parameters(model).items()
        if "lora_" not in name
    }


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_adapters_are_in_active_layers_alone(name):
    model = model_of(name)
    attention, mlp = PARTS[name]
    layers = LayerMap.from_model(model)
    outside = [layer.name for layer in layers if layer.kind in ("embedding", "norm", "head")]
    assert len(outside) >= 3
    scales = {f"{STACK[name]}.0.{attention}": 0.5, f"{STACK[name]}.1.{mlp}": 2.0}
    before = parameters(model)
    # Embeddings, final norm and head are active and yet get none.
    found = add_lora(
        model, Lora(rank=3), plan_of(model, {**scales, **dict.fromkeys(outside, 1.0)}), layers
    )
    expected = {
        f"{layer}.{part}" for layer in scales for part in PARTS[name][layer.rpartition(".")[2]]
    }
    assert adapted_modules(found.model) == expected
    assert trained_names(found.model) == {
        f"{PREFIX}{module}.lora_{side}.default.weight" for module in expected for side in "AB"
    }
    assert found.plan.scales == {
        layer: scales.get(layer.removeprefix(PREFIX), 0.0) for layer in found.layers.names
    }
    assert [layer.removeprefix(PREFIX) for layer in found.layers.names] == list(layers.names)
    for module, start in before.items():
        assert_same_bits(base_weights(found.model)[module], start, module)
    for parameter_name, parameter in found.model.named_parameters():
        if "lora_" in parameter_name:
            assert 3 in parameter.shape
    tokens = torch.arange(6)[None] + 3
    # B begins at zero.
    with torch.no_grad():
        logits = shared_model(name).eval()(input_ids=tokens).logits
        torch.testing.assert_close(found.model.eval()(input_ids=tokens).logits, logits)


@pytest.mark.parametrize("granularity", ["block", "tensor", "patterns"])
def test_other_layers(granularity):
    """A layer may be a block, a tensor, or what patterns gather from blocks and embeddings."""
    model = model_of("gpt2")
    if granularity == "patterns":
        patterns = [(r"attn|wte", "attention and words"), (r".*", "rest")]
        layers = LayerMap.from_model(model, patterns=patterns)
        active = {"attention and words": 0.5}
        expected = {
            f"transformer.h.{block}.attn.{p}" for block in "01" for p in ("c_attn", "c_proj")
        }
    else:
        layers = LayerMap.from_model(model, granularity=granularity)
        if granularity == "block":
            active = {"transformer.h.1": 0.5}
            expected = {f"transformer.h.1.attn.{part}" for part in ("c_attn", "c_proj")}
            expected |= {f"transformer.h.1.mlp.{part}" for part in ("c_fc", "c_proj")}
        else:
            # Of a bias alone there is nothing to adapt.
            active = {
                "transformer.h.0.mlp.c_fc.weight": 0.5,
                "transformer.h.1.mlp.c_fc.bias": 1.0,
                "transformer.h.1.ln_1.weight": 1.0,
                "transformer.wpe.weight": 1.0,
            }
            expected = {"transformer.h.0.mlp.c_fc"}
    plan = LayerPlan({name: active.get(name, 0.0) for name in layers.names})
    found = add_lora(model, Lora(rank=2), plan, layers)
    assert adapted_modules(found.model) == expected
    scaled = {name for name, scale in found.plan.scales.items() if scale}
    assert {found.plan.scales[name] for name in scaled} == {0.5}
    index = found.layers.index
    assert {found.layers.names[index(name)] for name in trained_names(found.model)} == scaled
    assert granularity == "patterns" or found.layers.granularity == granularity


def test_adapters_in_traced_layers(gpt2, tracing):
    """By the method itself; whose layers these are is found out from the plan."""
    profile = trace_gradients(gpt2, tracing.probes, tracing.reference)
    plan = TracedGradientPolicy(threshold=("top_k", 4))(profile)
    expected = {name for name in plan.active if ".h." in name}
    assert 0 < len(expected) < 4
    found = add_lora(gpt2, Lora(), plan)
    assert {module.rpartition(".")[0] for module in adapted_modules(found.model)} == expected


def test_the_seed_alone_decides_the_adapters():
    def made(seed):
        model = model_of("gpt2")
        found = add_lora(
            model, Lora(rank=2), plan_of(model, {"transformer.h.0.mlp": 1.0}), seed=seed
        )
        return {name: p for name, p in parameters(found.model).items() if "lora_" in name}

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = made(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = made(0), made(1)
    assert len(first) == 4
    for name, value in first.items():
        assert_same_bits(again[name], value, name)
        # A differs by seed; B is zero.
        assert torch.equal(other[name], value) == ("lora_B" in name)
        assert bool(value.any()) == ("lora_A" in name)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_merging_keeps_the_outputs(name):
    model = model_of(name)
    attention, mlp = PARTS[name]
    plan = plan_of(model, {f"{STACK[name]}.0.{mlp}": 1.0, f"{STACK[name]}.1.{attention}": 1.0})
    found = add_lora(model, Lora(rank=2, alpha=8.0, dropout=0.5), plan)
    randomise(found.model)
    tokens = torch.arange(20)[None] % 13 + 3
    with torch.no_grad():
        plain = shared_model(name).eval()(input_ids=tokens).logits
        adapted = found.model.eval()(input_ids=tokens).logits
        assert (adapted - plain).abs().max() > 1e-2
        merged = merge_lora(found.model)
        torch.testing.assert_close(merged(input_ids=tokens).logits, adapted, atol=1e-5, rtol=1e-5)
    assert type(merged) is {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}[name]
    names = [name for name, _ in shared_model(name).named_parameters()]
    assert [name for name, _ in merged.named_parameters()] == names
    assert trained_names(merged) == set(names)
    # Only what was adapted has changed.
    start = parameters(shared_model(name))
    changed = {
        name for name, value in parameters(merged).items() if not torch.equal(value, start[name])
    }
    assert {name.removesuffix(".weight").rpartition(".")[0] for name in changed} == set(plan.active)
    assert not any(hasattr(merged, name) for name in ("peft_config", "merge_and_unload"))
    # And can be adapted again.
    assert add_lora(merged, Lora(), plan).plan.active


def test_the_plan_scales_the_learning_rate_of_adapters():
    """Against torch's AdamW with a group a scale, over several steps."""
    scales = {"transformer.h.0.attn": 0.25, "transformer.h.1.mlp": 3.0}
    tokens = torch.arange(24).reshape(2, 12) % 11 + 3

    def prepared():
        model = model_of("gpt2").eval()  # without dropout
        found = add_lora(model, Lora(rank=2), plan_of(model, scales))
        return found, [(n, p) for n, p in found.model.named_parameters() if p.requires_grad]

    ours, trained = prepared()
    optimizer = LocalizedAdamW(
        trained, lr=1e-2, weight_decay=0.1, layers=ours.layers, plan=ours.plan
    )
    theirs, others = prepared()
    groups = [
        {"params": [p for name, p in others if f".{layer}." in name], "lr": 1e-2 * scale}
        for layer, scale in scales.items()
    ]
    reference = torch.optim.AdamW(groups, weight_decay=0.1)
    start = parameters(ours.model)
    for _ in range(4):
        for model, one in ((ours.model, optimizer), (theirs.model, reference)):
            one.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            one.step()
    moved = {}
    for name, value in parameters(ours.model).items():
        torch.testing.assert_close(value, parameters(theirs.model)[name], atol=1e-6, rtol=1e-5)
        if "lora_B" in name:
            moved[name] = (value - start[name]).abs().max().item()
    for name, distance in moved.items():
        scale = next(scale for layer, scale in scales.items() if f".{layer}." in name)
        # An Adam step moves by about the learning rate.
        assert 1e-2 * scale < distance < 4.5e-2 * scale, (name, distance)


def test_training_moves_adapters_alone(tokenizer, dataset, tmp_path):
    """Through `gradloc.training.train`; killed at step 5, it goes on from the checkpoint at 3."""
    plan = plan_of(make_gpt2(tokenizer), {"transformer.h.0.attn": 1.0, "transformer.h.1.mlp": 0.5})

    def prepared(seed=0):
        return add_lora(make_gpt2(tokenizer), Lora(rank=2, dropout=0.1), plan, seed=seed)

    def run(found, folder, **kwargs):
        given = {"layers": found.layers, "plan": found.plan, **kwargs}
        return train(found.model, None, dataset, settings(tmp_path / folder), **given)

    found = prepared()
    result = run(found, "run")
    start, end = parameters(prepared().model), parameters(found.model)
    for name, value in end.items():
        assert torch.equal(value, start[name]) != ("lora_" in name), name
    assert result.optimizer_bytes == sum(
        2 * value.numel() * value.element_size() for name, value in end.items() if "lora_" in name
    )
    assert trained_names(found.model) == {name for name in end if "lora_" in name}
    with pytest.raises(KeyboardInterrupt):
        run(prepared(), "killed", callbacks=[StopAt(5)])
    resumed = prepared(seed=1)  # other adapters: they must come from the checkpoint
    run(resumed, "killed", resume=True)
    assert_equal(parameters(resumed.model), end)
    merged = merge_lora(found.model)
    base = parameters(make_gpt2(tokenizer))
    for name, value in parameters(merged).items():
        layer = name.removesuffix(".weight").rpartition(".")[0]
        moved = layer in plan.active and name.endswith(".weight")
        assert torch.equal(value, base[name]) != moved, name
    merged.save_pretrained(tmp_path / "merged")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    assert_equal(parameters(again), parameters(merged))


def test_what_cannot_be_adapted_is_refused():
    model = model_of("llama")
    names = [name for name, _ in model.named_modules()]
    before = parameters(model)
    head = plan_of(model, {"lm_head": 1.0, "model.norm": 1.0, "model.embed_tokens": 1.0})
    for plan, message in [
        (head, r"active layers \(model.embed_tokens, model.norm, lm_head\) have no linear module"),
        (plan_of(model, {}), "there are none"),
        (LayerPlan({"a": 1.0}), "does not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_lora(model, Lora(), plan)
        with pytest.raises(ValueError, match=message):
            add_lora(model, Lora(), plan, LayerMap.from_model(model))
    assert [name for name, _ in model.named_modules()] == names
    assert_equal(parameters(model), before)
    assert trained_names(model) == set(before)
    plan = plan_of(model, {"model.layers.0.mlp": 1.0})
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters"):
        merge_lora(model)
    found = add_lora(model, Lora(), plan)
    for one in (model, found.model):
        with pytest.raises(ValueError, match="has adapters of peft already"):
            add_lora(one, Lora(), found.plan, found.layers)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 0), ("rank", 2.0), ("rank", True), ("alpha", 0.0), ("alpha", math.inf),
     ("dropout", 1.0), ("dropout", -0.1), ("dropout", math.nan)],
)  # fmt: skip
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        Lora(**{name: value})
