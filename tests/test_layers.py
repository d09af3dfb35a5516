"""LayerMap on plain modules and by its own contract: look-ups, ties, patterns, errors, the table.

Which layers the architectures of transformers have is in test_layer_architectures.py.
"""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from architectures import Block, TinyModel, check_partition
from torch import nn

from gradloc.layers import Layer, LayerMap


def kinds(layers: LayerMap) -> dict[str, str]:
    return {layer.name: layer.kind for layer in layers}


def test_unknown_model_by_submodule():
    model = TinyModel(tied=False)
    layers = LayerMap.from_model(model)
    assert list(kinds(layers).items()) == [
        ("temperature", "other"),
        ("tokens", "embedding"),
        ("blocks.0.attn", "attention"),
        ("blocks.0.mlp", "mlp"),
        ("blocks.0", "other"),
        ("blocks.1.attn", "attention"),
        ("blocks.1.mlp", "mlp"),
        ("blocks.1", "other"),
        ("final_norm", "norm"),
        ("head", "head"),
    ]
    by_name = {layer.name: set(layer.parameters) for layer in layers}
    assert by_name["blocks.0.mlp"] == {
        "blocks.0.up.weight",
        "blocks.0.down.weight",
        "blocks.0.norm_b.weight",
        "blocks.0.norm_b.bias",
    }
    assert {"blocks.1.norm_a.weight", "blocks.1.norm_a.bias"} < by_name["blocks.1.attn"]
    assert by_name["blocks.1"] == {"blocks.1.scale"}
    assert (layers.layers[3].stack, layers.layers[3].block) == ("blocks", 0)
    assert (layers.layers[0].stack, layers.layers[0].block) == (None, None)
    check_partition(model, layers)


def test_list_in_a_sequential_and_torch_encoder_layers():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.ModuleList([block, copy.deepcopy(block)]))
    layers = LayerMap.from_model(model)
    assert kinds(layers) == {
        "0.0.self_attn": "attention",
        "0.0.mlp": "mlp",
        "0.1.self_attn": "attention",
        "0.1.mlp": "mlp",
    }
    mlp = layers.layers[layers.names.index("0.0.mlp")]
    assert set(mlp.parameters) == {
        *(f"0.0.linear{i}.{what}" for i in (1, 2) for what in ("weight", "bias")),
        "0.0.norm2.weight",
        "0.0.norm2.bias",
    }
    check_partition(model, layers)


def test_decoder_layer_of_torch_has_cross_attention():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2, norm=nn.LayerNorm(8))
    layers = LayerMap.from_model(model)
    by_name = {layer.name: layer for layer in layers}
    assert layers.names[:3] == ("layers.0.self_attn", "layers.0.multihead_attn", "layers.0.mlp")
    for number, name in enumerate(("self_attn", "multihead_attn", "mlp"), start=1):
        assert f"layers.1.norm{number}.weight" in by_name[f"layers.1.{name}"].parameters, name
    assert layers.names[-1] == "norm"
    check_partition(model, layers)


def test_plain_mlp_has_a_layer_a_module():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2))
    layers = LayerMap.from_model(model)
    assert list(kinds(layers).items()) == [("0", "other"), ("2", "norm"), ("3", "other")]
    assert all(layer.stack is None for layer in layers)
    check_partition(model, layers)


def test_sequential_that_repeats_a_class_is_a_stack():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Sequential(Block(4), Block(4)), nn.Linear(4, 5))
    layers = LayerMap.from_model(model, granularity="block")
    assert list(kinds(layers).items()) == [
        ("0", "embedding"),
        ("1.0", "block"),
        ("1.1", "block"),
        ("2", "other"),
    ]
    assert [layer.block for layer in layers] == [None, 0, 1, None]
    check_partition(model, layers)


def test_block_that_stands_twice_in_the_list():
    """Weights shared between depths count once, and later blocks keep their number."""
    shared = Block(4)
    model = nn.ModuleDict({"blocks": nn.ModuleList([shared, shared, Block(4)])})
    layers = LayerMap.from_model(model, granularity="block")
    assert [(layer.name, layer.block) for layer in layers] == [("blocks.0", 0), ("blocks.2", 2)]
    assert layers.index("blocks.1.up.weight") == 0
    check_partition(model, layers)
    assert "blocks.{0, 2}" in str(layers)


def test_modules_in_a_list_that_are_no_blocks():
    """A list of Linears or Embeddings holds layers, not blocks, and the list is not a stack."""
    model = nn.ModuleDict(
        {
            "codebooks": nn.ModuleList([nn.Embedding(3, 2), nn.Embedding(3, 2)]),
            "steps": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),
        }
    )
    layers = LayerMap.from_model(model, granularity="block")
    assert list(kinds(layers).items()) == [
        ("codebooks.0", "embedding"),
        ("codebooks.1", "embedding"),
        ("steps.0", "other"),
        ("steps.1", "other"),
    ]


def test_convolutional_blocks_are_whole():
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))

    model = nn.ModuleDict({"stages": nn.ModuleList([block(), block()]), "out": nn.Linear(2, 3)})
    layers = LayerMap.from_model(model)
    assert list(kinds(layers).items()) == [
        ("stages.0", "other"),
        ("stages.1", "other"),
        ("out", "other"),
    ]
    check_partition(model, layers)


def test_granularity_tensor_keeps_kinds_and_order():
    model = TinyModel()
    layers = LayerMap.from_model(model, granularity="tensor")
    assert sorted(layers.names) == sorted(name for name, _ in model.named_parameters())
    assert kinds(layers)["blocks.0.norm_b.weight"] == "mlp"
    assert kinds(layers)["blocks.1.scale"] == "other"
    coarse = LayerMap.from_model(model)
    order = [coarse.index(name) for name in layers.names]
    assert order == sorted(order)
    check_partition(model, layers)


def test_tied_weight_counts_once_and_is_the_embedding():
    model = TinyModel(tied=True)
    layers = LayerMap.from_model(model)
    assert "head" not in layers.names
    tokens = layers.names.index("tokens")
    # named_parameters meets the head first, so that is the parameter's name.
    assert layers.layers[tokens].parameters == ("head.weight",)
    assert layers.layers[tokens].num_elements == 44
    assert layers.index("head.weight") == layers.index("tokens.weight") == tokens
    assert layers.index(model.tokens.weight) == tokens
    check_partition(model, layers)
    names = [name for name, _, _ in layers.parameters(model)]
    assert names == [name for name, _ in model.named_parameters()]


def test_map_of_an_untied_model_fits_it_tied():
    layers = LayerMap.from_model(TinyModel(tied=False))
    found = layers.parameters(TinyModel(tied=True))
    assert len({id(parameter) for _, parameter, _ in found}) == len(found)


def test_parameters_lists_each_object_once_with_its_layer():
    model = TinyModel(tied=False)
    layers = LayerMap.from_model(model)
    triples = layers.parameters(model)
    assert [(n, id(p)) for n, p, _ in triples] == [(n, id(p)) for n, p in model.named_parameters()]
    assert all(n in layers.layers[position].parameters for n, _, position in triples)


def test_wrapped_models_fit_the_map_and_give_the_same_one():
    model = TinyModel()
    layers = LayerMap.from_model(model)
    wrapped = nn.DataParallel(model)
    assert [i for _, _, i in layers.parameters(wrapped)] == [
        i for _, _, i in layers.parameters(model)
    ]
    assert layers.index("module.blocks.0.up.weight") == layers.index("blocks.0.up.weight")
    assert LayerMap.from_model(wrapped).names == layers.names

    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # only wraps it here
    compiled = LayerMap.from_model(model)
    assert compiled.names == layers.names
    assert "blocks.1._orig_mod.up.weight" in compiled.layers[6].parameters
    assert len(layers.parameters(model)) == len(compiled.parameters(model))
    check_partition(model, compiled)


def test_copies_know_names_but_no_objects():
    model = TinyModel()
    layers = LayerMap.from_model(model)
    for copied in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert copied.layers == layers.layers
        assert copied.index("tokens.weight") == layers.index("tokens.weight")
        with pytest.raises(ValueError, match=r"in no layer.*named_parameters"):
            copied.index(model.tokens.weight)
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"shape \(11, 4\) is in no layer"):
        layers.index(other.tokens.weight)
    assert len(layers.parameters(other)) == len(layers.parameters(model))


def test_identity_of_a_freed_parameter_is_not_reused():
    model = TinyModel()
    layers = LayerMap.from_model(model)
    freed = {id(parameter) for parameter in model.parameters()}
    del model
    gc.collect()
    for _ in range(300):  # CPython hands freed addresses out again
        parameter = nn.Parameter(torch.zeros(1))
        with pytest.raises(ValueError, match="in no layer"):
            layers.index(parameter)
        if id(parameter) in freed:
            break


def test_map_does_not_keep_the_model_alive():
    model = TinyModel()
    layers = LayerMap.from_model(model)
    alive = weakref.ref(model.tokens.weight)
    del model
    gc.collect()
    assert alive() is None
    assert len(layers) == 9


def test_only_trainable():
    model = TinyModel(tied=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attn" in name)
    layers = LayerMap.from_model(model, only_trainable=True)
    assert layers.names == ("blocks.0.attn", "blocks.1.attn")
    assert all("attn." in name for layer in layers for name in layer.parameters)
    assert len(layers.parameters(model)) == 8
    with pytest.raises(ValueError, match=r"'tokens\.weight' is in no layer"):
        layers.index("tokens.weight")
    model.tokens.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'tokens\.weight' of the model in no layer"):
        layers.parameters(model)


def test_quantised_weights_are_left_out():
    model = TinyModel(tied=False)
    model.blocks[0].up.weight = nn.Parameter(
        torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False
    )
    layers = LayerMap.from_model(model)
    assert "blocks.0.up.weight" not in {n for layer in layers for n in layer.parameters}
    assert "blocks.0.up.weight" not in {n for n, _, _ in layers.parameters(model)}


def test_patterns_first_match_wins():
    model = TinyModel(tied=False)
    layers = LayerMap.from_model(
        model,
        patterns=[
            (r"norm", "norms"),
            (r"^blocks\.(\d+)\.(attn|up|down)", r"block \1 \2"),
            (".*", "rest"),
        ],
    )
    assert layers.granularity == "patterns"
    assert set(layers.names) == {
        "norms", "rest",
        *(f"block {i} {part}" for i in (0, 1) for part in ("attn", "up", "down")),
    }  # fmt: skip
    by_name = {layer.name: layer for layer in layers}
    assert len(by_name["norms"].parameters) == 10
    assert (by_name["norms"].kind, by_name["norms"].block) == ("other", None)
    assert (by_name["block 1 up"].kind, by_name["block 1 up"].block) == ("mlp", 1)
    assert by_name["rest"].num_elements == 44 + 44 + 1 + 2
    check_partition(model, layers)
    assert "block 1 up" in str(layers)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([(r"attn", "a")], r"19 parameters .*, 'tokens\.weight', .* and 15 more\. End .*\"rest\""),
        ([(r"(", "a")], r"pattern '\(' is no regular expression"),
        ([(r".*", r"\1")], r"layer name '\\\\1' does not fit pattern '\.\*'"),
        ([(r"(x?)", r"\1")], r"layer name '\\\\1' is empty for parameter"),
        ([], r"patterns leave \d+ parameters in no layer"),
    ],
    ids=["unmatched", "bad-regex", "bad-group", "empty-name", "none"],
)
def test_wrong_patterns(patterns, message):
    model = TinyModel(tied=False)
    with pytest.raises(ValueError, match=message):
        LayerMap.from_model(model, patterns=patterns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt2"}, r"model='gpt2' is not a torch\.nn\.Module: load"),
        ({"model": nn.ReLU()}, r"model=ReLU has no floating-point parameters"),
        ({"granularity": "head"}, r"granularity='head': choose one of 'submodule', 'block'"),
        ({"granularity": "block", "patterns": [(".*", "a")]}, r"granularity='block' with patterns"),
        ({"model": nn.LazyLinear(3)}, r"'weight' has no shape yet: run one batch"),
        (
            {"model": nn.Linear(2, 2).requires_grad_(False), "only_trainable": True},
            r"model=Linear has no floating-point parameters with requires_grad=True",
        ),
    ],
    ids=["no-module", "no-parameters", "granularity", "both", "lazy", "nothing-trains"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")  # torch says so in the test
def test_wrong_arguments(arguments, message):
    arguments = {"model": nn.Linear(2, 2), **arguments}
    with pytest.raises(ValueError, match=message):
        LayerMap.from_model(**arguments)


def test_index_names_the_unknown_parameter():
    layers = LayerMap.from_model(TinyModel())
    with pytest.raises(ValueError, match=r"parameter 'lm\.weight' is in no layer.*9 layers"):
        layers.index("lm.weight")


def test_parameters_names_what_does_not_fit():
    layers = LayerMap.from_model(TinyModel(depth=3))
    with pytest.raises(ValueError, match=r"has no 'blocks\.2\.attn\.qkv\.weight'.*and \d+ more"):
        layers.parameters(TinyModel(depth=2))
    with pytest.raises(ValueError, match=r"'blocks\.3\.scale'.*of the model in no layer"):
        layers.parameters(TinyModel(depth=4))


def test_map_by_hand_refuses_doubles():
    one = Layer("a", "other", None, None, ("w",), 1)
    with pytest.raises(ValueError, match="layers is empty"):
        LayerMap([])
    with pytest.raises(ValueError, match="'a' stands twice"):
        LayerMap([one, one])
    with pytest.raises(ValueError, match="'w' is in 'a' and 'b'"):
        LayerMap([one, Layer("b", "other", None, None, ("w",), 1)])


def test_import_stays_light():
    code = (
        "import sys, gradloc.layers; "
        "sys.exit(any(m in sys.modules for m in ('transformers', 'peft', 'datasets', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
