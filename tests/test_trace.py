"""trace_gradients: norms against autograd by hand, and a model that is left exactly as it was."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from gradloc.layers import LayerMap
from gradloc.trace import trace_gradients

VOCABULARY, LENGTH = 37, 12


@pytest.fixture
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.5,
        attn_pdrop=0.5,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config)


class Regression(nn.Module):
    """A plain module that returns a scalar; `unused` takes no part in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(4, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x, labels):
        hidden = self.drop(self.norm(self.first(x).tanh()))
        return (self.second(hidden).squeeze(-1) - labels).square().mean()


def batches(count, rows, *, span=None, seed=0):
    """Random tokens; the loss on [start, stop) of each row, or everywhere."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
        labels = ids.clone()
        if span is not None:
            labels[:, : span[0]] = -100
            labels[:, span[1] :] = -100
        result.append({"input_ids": ids, "labels": labels})
    return result


def regression_batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(5, 3, generator=generator), "labels": torch.randn(5, generator=generator)}
        for _ in range(count)
    ]


def norms_by_hand(model, layers, data):
    """[num_batches, num_layers] in float64, by torch.autograd.grad on a copy."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    rows = []
    for batch in data:
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        output = model(**batch)
        loss = output if isinstance(output, torch.Tensor) else output.loss
        names, parameters = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        sums = np.zeros(len(layers))
        for name, grad in zip(names, grads, strict=True):
            if grad is not None:
                sums[layers.index(name)] += grad.square().sum().item()
        rows.append(np.sqrt(sums))
    return np.stack(rows)


def assert_close(found, expected, rtol=2e-5):
    found, expected = np.array(found), np.array(expected)
    error = np.abs(found - expected) / np.maximum(np.abs(expected), 1e-9)
    worst = int(error.argmax())
    assert error.max() < rtol, f"element {worst}: {found[worst]} against {expected[worst]}"


@pytest.mark.parametrize("granularity", ["submodule", "block", "tensor"])
def test_norms_ratios_and_errors_against_autograd(gpt2, granularity):
    layers = LayerMap.from_model(gpt2, granularity=granularity)
    probes = {"updated": batches(3, 2, span=(4, 6)), "new": batches(5, 2, span=(7, 8), seed=1)}
    reference = batches(4, 2, seed=2)
    profile = trace_gradients(gpt2, probes, reference, layers=layers, progress=False, step=7)

    sets = {**probes, "reference": reference}
    rows = {what: norms_by_hand(gpt2, layers, data) for what, data in sets.items()}
    for what, norms in rows.items():
        measured = profile.reference_norms if what == "reference" else profile.probe_norms[what]
        assert tuple(measured) == layers.names
        assert_close(list(measured.values()), norms.mean(0))
        errors = norms.std(0, ddof=1) / math.sqrt(len(norms))
        assert_close(list(profile.standard_errors[what].values()), errors, rtol=1e-3)
    mean = {what: norms.mean(0) for what, norms in rows.items()}
    ratio = (mean["updated"] + mean["new"]) / 2 / mean["reference"]
    assert_close(list(profile.relative.values()), ratio)
    by_kind = mean["new"] / mean["reference"]
    assert_close(list(profile.relative_by_kind["new"].values()), by_kind)
    assert profile.kinds == ("updated", "new")
    assert (profile.step, profile.granularity) == (7, granularity)
    new = profile.probes["new"]
    assert (new.num_batches, new.num_sequences, new.num_tokens) == (5, 10, 10)
    # Position 0 has no loss in a causal model.
    assert profile.references["all"]["new"].num_tokens == 8 * (LENGTH - 1)


def test_plain_module_with_scalar_loss():
    torch.manual_seed(1)
    model = Regression()
    layers = LayerMap.from_model(model)
    probes, reference = regression_batches(3), regression_batches(2, seed=5)
    profile = trace_gradients(model, iter(probes), iter(reference), progress=False)
    assert profile.kinds == ("probe",)
    assert profile.names == layers.names
    assert_close(
        list(profile.probe_norms["probe"].values()), norms_by_hand(model, layers, probes).mean(0)
    )
    assert_close(
        list(profile.reference_norms.values()), norms_by_hand(model, layers, reference).mean(0)
    )
    # A layer outside the loss has 0 / 0.
    assert profile.relative["unused"] == 0
    # Labels [batch] have no position to leave out.
    assert profile.probes["probe"].num_tokens == 15


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss: {"loss": loss},
        lambda loss: (loss, "logits"),
        lambda loss: type("Output", (), {"loss": loss})(),
        lambda loss: loss.reshape(1),
    ],
    ids=["dict", "tuple", "attribute", "one element"],
)
def test_ways_to_return_a_loss(wrap):
    class Wrapped(Regression):
        def forward(self, x, labels):
            return wrap(super().forward(x, labels))

    torch.manual_seed(1)
    model = Wrapped()
    plain = Regression()
    plain.load_state_dict(model.state_dict())
    data = regression_batches(2)
    expected = trace_gradients(plain, data, data, progress=False)
    assert trace_gradients(model, data, data, progress=False).probe_norms == expected.probe_norms


def test_repeated_traces_are_equal(gpt2):
    arguments = (gpt2, batches(2, 2, span=(3, 5)), batches(2, 2))
    both = {"reference_loss": ["matched-spans", "all"], "progress": False, "seed": 4}
    profile = trace_gradients(*arguments, **both)
    assert profile == trace_gradients(*arguments, **both)
    assert profile.reference_loss == "matched-spans"
    assert profile.available_reference_losses == ("matched-spans", "all")
    assert profile != trace_gradients(*arguments, **{**both, "seed": 5})


# What is restored.


def state_of(model):
    """Everything that a trace may not change; gradients by identity and by value."""
    return {
        "grads": [
            (id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()
        ],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


def assert_same_state(before, after):
    for (old_id, old), (new_id, new) in zip(before["grads"], after["grads"], strict=True):
        assert old_id == new_id
        assert old is None or torch.equal(old, new)
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    assert torch.equal(before["torch"], after["torch"])
    for what in ("requires_grad", "training", "python", "numpy"):
        assert before[what] == after[what], what


def unsettle(model):
    """Old gradients on some parameters, mixed requires_grad, mixed training flags."""
    model.train()
    list(model.modules())[2].eval()
    for index, parameter in enumerate(model.parameters()):
        if index % 3 == 0:
            parameter.grad = torch.full_like(parameter, 0.25)
        if index % 4 == 1:
            parameter.requires_grad_(False)


class Interrupting(list):
    """Batches whose second one stops the trace from inside the model's call."""

    def __init__(self, data, error):
        super().__init__([data[0], Interrupting.Batch(data[1], error)])

    class Batch(dict):  # noqa: D106
        def __init__(self, batch, error):
            super().__init__(batch)
            self.error = error

        def items(self):
            raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("boom"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("make", ["gpt2", "regression"])
def test_model_is_restored(make, error, request):
    torch.manual_seed(3)
    model = request.getfixturevalue("gpt2") if make == "gpt2" else Regression()
    data = batches(2, 2, span=(3, 5)) if make == "gpt2" else regression_batches(2)
    unsettle(model)
    before = state_of(model)
    if error is None:
        # A DataLoader draws from torch's global generator when it is iterated.
        loader = torch.utils.data.DataLoader(data, batch_size=None, shuffle=True)
        trace_gradients(model, loader, data, progress=False)
    else:
        with pytest.raises(type(error)):
            trace_gradients(model, data, Interrupting(data, error), progress=False)
    assert_same_state(before, state_of(model))


def test_a_model_that_uses_every_random_generator():
    class Noisy(Regression):
        def forward(self, x, labels):
            x = x + torch.randn_like(x) * 1e-3 + random.random() * 1e-3 + np.random.rand() * 1e-3
            return super().forward(x.float(), labels)

    model = Noisy()
    before = state_of(model)
    trace_gradients(model, regression_batches(2), regression_batches(2), progress=False)
    assert_same_state(before, state_of(model))


def test_frozen_parameters_are_measured_too(gpt2):
    data = batches(2, 2, span=(3, 5)), batches(2, 2)
    expected = trace_gradients(gpt2, *data, progress=False)
    gpt2.requires_grad_(False)
    with torch.no_grad():
        assert trace_gradients(gpt2, *data, progress=False).probe_norms == expected.probe_norms
    with torch.inference_mode():
        assert trace_gradients(gpt2, *data, progress=False).probe_norms == expected.probe_norms


def test_only_the_layers_of_the_map_get_gradients(gpt2):
    gpt2.requires_grad_(False)
    gpt2.transformer.h[1].mlp.requires_grad_(True)
    layers = LayerMap.from_model(gpt2, only_trainable=True)
    gpt2.requires_grad_(False)
    seen = []

    def note(module, arguments):
        seen.append({name for name, p in gpt2.named_parameters() if p.requires_grad})

    handle = gpt2.register_forward_pre_hook(note)
    profile = trace_gradients(
        gpt2, batches(1, 2, span=(3, 5)), batches(1, 2), layers=layers, progress=False
    )
    handle.remove()
    assert profile.names == ("transformer.h.1.mlp",)
    assert all(names == {n for layer in layers for n in layer.parameters} for names in seen)
    assert len(seen) == 2
    assert not any(parameter.requires_grad for parameter in gpt2.parameters())


# Matched spans.


def test_matched_reference_has_as_many_tokens_per_kind(gpt2):
    # 6 probes each; 6 reference sequences: every length is dealt exactly once.
    probes = {"short": batches(3, 2, span=(4, 5)), "long": batches(3, 2, span=(2, 9))}
    profile = trace_gradients(
        gpt2, probes, batches(3, 2, seed=9), reference_loss=("all", "matched-spans"), progress=False
    )
    matched = profile.references["matched-spans"]
    assert {kind: one.num_tokens for kind, one in matched.items()} == {"short": 6, "long": 42}
    assert {kind: one.num_tokens for kind, one in profile.probes.items()} == {
        "short": 6,
        "long": 42,
    }
    assert all(one.num_sequences == 6 for one in matched.values())
    spans = profile.with_reference("matched-spans")
    for name in profile.names:
        short, long = matched["short"], matched["long"]
        index = profile.names.index(name)
        mean = (short.norms[index] + long.norms[index]) / 2
        assert spans.reference_norms[name] == pytest.approx(mean, rel=1e-12)
        ratio = profile.probe_norms["short"][name] / short.norms[index]
        assert spans.relative_by_kind["short"][name] == pytest.approx(ratio, rel=1e-12)


def test_a_kind_s_spans_do_not_depend_on_other_kinds(gpt2):
    short = batches(3, 2, span=(4, 6))
    arguments = {"reference_loss": "matched-spans", "progress": False}
    alone = trace_gradients(gpt2, {"short": short}, batches(3, 2), **arguments)
    among = trace_gradients(
        gpt2, {"long": batches(3, 2, span=(2, 9)), "short": short}, batches(3, 2), **arguments
    )
    key = "matched-spans"
    assert alone.references[key]["short"] == among.references[key]["short"]


# What is refused. Batches: test_trace_batches.py.


GOOD = batches(2, 2)


def test_layers_of_another_model(gpt2):
    with pytest.raises(ValueError, match="first"):
        trace_gradients(gpt2, GOOD, GOOD, layers=LayerMap.from_model(Regression()), progress=False)


def test_a_hook_that_steps_in_the_backward_pass(gpt2):
    parameter = gpt2.transformer.h[0].attn.c_attn.weight
    parameter.register_post_accumulate_grad_hook(lambda p: p.data.add_(1))
    before = state_of(gpt2)
    with pytest.raises(ValueError, match=r"c_attn\.weight' has a hook"):
        trace_gradients(gpt2, GOOD, GOOD, progress=False)
    assert_same_state(before, state_of(gpt2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norm_that_is_not_finite(value):
    model = Regression()
    data = regression_batches(3)
    data[2]["labels"][0] = value
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"batch 2 of the 'new' probes: .* layer 'first' is (nan|inf)"
    ):
        trace_gradients(model, {"new": data}, regression_batches(1), progress=False)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"logits": 1}, "gave no loss"),
        (torch.ones(2), "gave no loss"),
        (torch.ones(()), "depends on no"),
    ],
    ids=["dict", "vector", "constant"],
)
def test_model_without_a_loss(output, message):
    model = Regression()
    model.forward = lambda x, labels: output
    before = state_of(model)
    with pytest.raises(ValueError, match=f"batch 0 of the 'probe' probes: .*{message}"):
        trace_gradients(model, regression_batches(1), regression_batches(1), progress=False)
    assert_same_state(before, state_of(model))


def test_a_layer_that_only_probes_reach():
    class Switch(Regression):
        def forward(self, x, labels):
            loss = super().forward(x, labels)
            return loss + self.unused(x[:, :2]).square().mean() if x.sum() > 1e6 else loss

    probes = [{"x": torch.full((5, 3), 1e6), "labels": torch.zeros(5)}]
    with pytest.raises(ValueError, match=r"'unused' get a gradient .* more reference batches"):
        trace_gradients(Switch(), probes, regression_batches(1), progress=False)
