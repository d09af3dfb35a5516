"""LayerPlan.memory: its numbers against the bytes of real gradients and of the real optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import COMMON, TinyModel, build, shared_model
from torch import nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW, RandomLayers, RecAdam
from gradloc.memory import MemoryEstimate, MemoryRow
from gradloc.wording import bytes_in_words

MODELS = ("gpt2", "llama", "opt", "mixtral", "gemma2", "bert")


def gradient_bytes(model: nn.Module) -> int:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return sum(grad.numel() * grad.element_size() for grad in grads)


def trained(
    model: nn.Module, layers: LayerMap, plan: LayerPlan, *, gradients: str = "active", **options
) -> LocalizedAdamW:
    """One step of the optimizer after one real backward pass."""
    for _, parameter, position in layers.parameters(model):
        active = layers.names[position] in plan.active
        parameter.requires_grad_(active or gradients == "all")
    optimizer = LocalizedAdamW(
        list(model.named_parameters()), lr=1e-3, layers=layers, plan=plan, **options
    )
    tokens = torch.arange(12).reshape(2, 6) % 7 + 3
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("granularity", ["submodule", "block", "tensor"])
@pytest.mark.parametrize("gradients", ["active", "all"])
def test_real_bytes(name: str, granularity: str, gradients: str) -> None:
    model = copy.deepcopy(shared_model(name))
    layers = LayerMap.from_model(model, granularity=granularity)
    plan = RandomLayers(share=0.4, seed=4)(layers)
    estimate = plan.memory(model, gradients=gradients)
    optimizer = trained(model, layers, plan, gradients=gradients)
    assert estimate.moment_bytes == optimizer.state_bytes()
    assert estimate.gradient_bytes == gradient_bytes(model)
    assert estimate.parameter_bytes == sum(p.nbytes for p in model.parameters())
    # The same bytes are predicted with the map given, and by a model without memory.
    assert estimate == plan.memory(model, layers=layers, gradients=gradients)
    outline = model.to("meta")
    outline.tie_weights()  # moving to another device unties
    assert estimate == plan.memory(outline, gradients=gradients)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("dtype", "moments"), [(torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)], ids=str
)
def test_dtypes(dtype: torch.dtype, moments: int, amsgrad: bool) -> None:
    model = copy.deepcopy(shared_model("llama")).to(dtype)
    layers = LayerMap.from_model(model)
    plan = LayerPlan({name: float("mlp" in name) for name in layers.names})
    elements = sum(layer.num_elements for layer in layers if "mlp" in layer.name)
    estimate = plan.memory(model, amsgrad=amsgrad)
    assert estimate.moment_bytes == (3 if amsgrad else 2) * moments * elements
    assert estimate.gradient_bytes == dtype.itemsize * elements
    assert trained(model, layers, plan, amsgrad=amsgrad).state_bytes() == estimate.moment_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dtype_that_was_asked_for(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    model = copy.deepcopy(shared_model("llama")).to(dtype)
    layers = LayerMap.from_model(model)
    plan = LayerPlan({name: float("mlp" in name) for name in layers.names})
    estimate = plan.memory(model, state_dtype=state_dtype)
    if dtype == torch.bfloat16:
        elements = sum(layer.num_elements for layer in layers if "mlp" in layer.name)
        assert estimate.moment_bytes == 2 * state_dtype.itemsize * elements
    optimizer = trained(model, layers, plan, state_dtype=state_dtype)
    assert optimizer.state_bytes() == estimate.moment_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("anchor_dtype", [None, "bfloat16"])
def test_anchors(dtype: torch.dtype, anchor_dtype: str | None) -> None:
    model = copy.deepcopy(shared_model("llama")).to(dtype)
    layers = LayerMap.from_model(model)
    plan = LayerPlan({name: float("mlp" in name) for name in layers.names})
    recadam = RecAdam(gamma=1.0, anchor_dtype=anchor_dtype)
    estimate, without = plan.memory(model, recadam=recadam), plan.memory(model)
    itemsize = dtype.itemsize if anchor_dtype is None else 2
    elements = sum(layer.num_elements for layer in layers if "mlp" in layer.name)
    everything = sum(layer.num_elements for layer in layers)
    assert estimate.anchor_bytes == itemsize * elements > 0
    assert estimate.total_bytes == without.total_bytes + itemsize * elements
    assert estimate.full_bytes == without.full_bytes + itemsize * everything
    optimizer = trained(model, layers, plan, recadam=recadam)
    assert optimizer.state_bytes() == estimate.moment_bytes + estimate.anchor_bytes
    head, *lines = str(estimate).splitlines()
    total = next(line for line in lines if line.startswith("total"))
    assert head.split()[3:5] == ["moments", "anchors"]
    assert f"  {bytes_in_words(estimate.anchor_bytes)}  " in total
    assert plan.memory(model, recadam=RecAdam(gamma=0.0)) == without
    assert "anchors" not in str(without)


def test_the_parts_of_a_model() -> None:
    """By hand: 64 words of width 16, untied; blocks and final norm are the rest."""
    model = shared_model("llama")
    plan = LayerPlan({name: float(name == "lm_head") for name in LayerMap.from_model(model).names})
    rows = {row.name: row for row in plan.memory(model).rows}
    words, rest = 4 * 64 * 16, 4 * sum(p.numel() for p in model.model.layers.parameters()) + 4 * 16
    assert rows == {
        "embeddings": MemoryRow("embeddings", 1, 0, words, 0, 0, words, 2 * words),
        "head": MemoryRow("head", 1, 1, words, words, 2 * words, words, 2 * words),
        "the other layers": MemoryRow("the other layers", 5, 0, rest, 0, 0, rest, 2 * rest),
    }
    estimate = plan.memory(model)
    assert estimate.total_bytes == 2 * words + rest + 3 * words
    assert estimate.full_bytes == 4 * (2 * words + rest)
    assert estimate.total == MemoryRow(
        "total", 7, 1, 2 * words + rest, words, 2 * words, 2 * words + rest, 2 * (2 * words + rest)
    )


def test_a_tied_head_is_counted_once_and_said() -> None:
    model = shared_model("gpt2")
    plan = RandomLayers(count=3)(LayerMap.from_model(model))
    estimate = plan.memory(model)
    assert [row.name for row in estimate.rows] == ["embeddings", "the other layers"]
    assert estimate.rows[0].parameter_bytes == 4 * (64 + 32) * 16
    said = "transformer.wte.weight is also lm_head.weight: counted once, as embeddings"
    assert said in estimate.assumptions
    assert said in str(estimate)
    assert not any(
        "lm_head" in one for one in _llama_plan().memory(shared_model("llama")).assumptions
    )


def test_parameters_in_no_layer_are_counted() -> None:
    """A map of the trainable ones knows no others, but they take memory too."""
    model = build("LlamaConfig", COMMON)
    model.model.embed_tokens.requires_grad_(False)
    layers = LayerMap.from_model(model, only_trainable=True)
    plan = LayerPlan(dict.fromkeys(layers.names, 1.0))
    estimate = plan.memory(model, layers=layers)
    words = 4 * 64 * 16
    assert estimate.rows[-1] == MemoryRow("in no layer", 0, 0, words, 0, 0, 0, 0)
    assert estimate.parameter_bytes == sum(p.nbytes for p in model.parameters())
    with pytest.raises(ValueError, match=r"pass it as layers"):
        plan.memory(model)


def test_the_table() -> None:
    rows = (
        MemoryRow("embeddings", 2, 0, 3 * 2**20, 0, 0, 3 * 2**20, 6 * 2**20),
        MemoryRow("head", 1, 1, 512, 512, 1024, 512, 1024),
        MemoryRow("the other layers", 24, 6, 2**31, 2**29, 2**30, 2**31, 2**32),
    )
    assert str(MemoryEstimate(rows, ("a note",))).splitlines() == [
        "                    train  parameters  gradients  moments  together  full training",
        "-" * 82,
        "embeddings         0 of 2     3.0 MiB        0 B      0 B   3.0 MiB       12.0 MiB",
        "head               1 of 1       512 B      512 B  1.0 KiB   2.0 KiB        2.0 KiB",
        "the other layers  6 of 24     2.0 GiB  512.0 MiB  1.0 GiB   3.5 GiB        8.0 GiB",
        "-" * 82,
        "total             7 of 27     2.0 GiB  512.0 MiB  1.0 GiB   3.5 GiB        8.0 GiB",
        "saved: 4.5 GiB of 8.0 GiB (56%)",
        "a note",
    ]


def test_a_module_that_nobody_has_seen() -> None:
    model = TinyModel()
    plan = RandomLayers(count=2)(LayerMap.from_model(model))
    assert plan.memory(model).parameter_bytes == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradients": "some"}, r"gradients='some': choose 'active'.*'all'"),
        ({"state_dtype": torch.float16}, r"state_dtype=torch\.float16: choose None"),
        ({"state_dtype": "bfloat16"}, r"state_dtype='bfloat16': choose None"),
    ],
)
def test_options_that_mean_nothing(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _llama_plan().memory(shared_model("llama"), **options)


def test_a_plan_of_another_model() -> None:
    message = (
        r"unknown layers 'model\.layers\.7\.mlp'.*Tried granularity submodule, block, tensor; "
        "submodule is nearest"
    )
    plan = LayerPlan({**_llama_plan().scales, "model.layers.7.mlp": 1.0})
    with pytest.raises(ValueError, match=message):
        plan.memory(shared_model("llama"))
    with pytest.raises(ValueError, match="does not fit the model"):
        plan.memory(shared_model("llama"), layers=LayerMap.from_model(shared_model("llama")))


def _llama_plan() -> LayerPlan:
    return RandomLayers(count=3)(LayerMap.from_model(shared_model("llama")))
