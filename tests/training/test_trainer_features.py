"""A plain Trainer with our callback, in each of Trainer's ways of running, against torch's AdamW.

The reference is Trainer with torch.optim.AdamW whose gradients of frozen layers are None.
"""

import pytest
import torch
import transformers
from conftest import make_gpt2
from small_runs import (
    arguments,
    assert_close,
    assert_equal,
    attention_plan,
    model_and_method,
    parameters,
    plain_trainer,
    reference_trainer,
    without_dropout,
)
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainingArguments

from gradloc import LayerMap, RandomLayers, Retrace
from gradloc.training.localized_trainer import collate_blocks

# How older versions of Accelerate ask for autocast.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")

# The older name is deprecated where there is the newer.
RECOMPUTE = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
CHANGING = Retrace(RandomLayers(count=3, seed=5), every=2)


def plan_at(model, step):
    """The plan of CHANGING at a step, by hand."""
    layers = LayerMap.from_model(model)
    return RandomLayers(count=3, seed=5)(layers, step=step - step % 2)


def pair(tokenizer, dataset, folder, *, choice, dropout=True, callbacks=lambda: (), **changes):
    """Train ours and the reference alike; both trainers, and the parameters at the start."""
    trainers = []
    kinds = {name: changes.pop(name) for name in ("eval_dataset",) if name in changes}
    start = parameters(make_gpt2(tokenizer))
    for kind in ("ours", "theirs"):
        model, method = model_and_method(tokenizer, dropout=dropout, **choice)
        args = arguments(folder / kind, **changes)
        if kind == "ours":
            trainer = plain_trainer(model, args, dataset, method, callbacks=callbacks(), **kinds)
        else:

            def plan(step, model=model):
                return choice.get("plan") or plan_at(model, step)

            trainer = reference_trainer(model, args, dataset, plan, callbacks=callbacks(), **kinds)
        trainer.train()
        trainers.append(trainer)
    return *trainers, start


def assert_same_run(ours, theirs, start, *, within=1e-4):
    assert_close(parameters(ours.model), parameters(theirs.model), start, within=within)
    for key in ("loss", "eval_loss", "learning_rate"):
        found, expected = (
            [entry[key] for entry in trainer.state.log_history if key in entry]
            for trainer in (ours, theirs)
        )
        assert len(found) == len(expected)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-9), key
    norms = [entry["grad_norm"] for entry in ours.state.log_history if "grad_norm" in entry]
    assert len(norms) == len(theirs.reference.norms)
    assert norms == pytest.approx(theirs.reference.norms, rel=max(1e-4, within))


BOTH = pytest.mark.parametrize("choice", ["static", "changing"])


def chosen_by(choice, tokenizer):
    if choice == "static":
        return {"plan": attention_plan(make_gpt2(tokenizer))}
    return {"policy": CHANGING}


@BOTH
@pytest.mark.parametrize(
    ("feature", "within"),
    [
        ({}, 1e-4),
        ({"gradient_accumulation_steps": 3}, 1e-4),
        ({"bf16": True}, 2e-2),
        ({RECOMPUTE: True}, 1e-4),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 3}, 1e-4),
        ({"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 1}, 1e-4),
        ({"lr_scheduler_type": "constant", "num_train_epochs": 0.1, "max_steps": -1}, 1e-4),
    ],
    ids=["plain", "accumulation", "bf16", "recomputing", "cosine", "inverse_sqrt", "epochs"],
)
def test_equals_adamw_over_the_active_layers(tokenizer, dataset, tmp_path, choice, feature, within):
    """Groups, decay, clipping by the active layers' norm, plan changes, schedule, logged norms."""
    chosen = chosen_by(choice, tokenizer)
    pair_ = pair(tokenizer, dataset, tmp_path, choice=chosen, **feature)
    assert_same_run(*pair_, within=within)


# torch's compiler looks at .grad of what it traces, and warns of itself.
@BOTH
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_torch_compile(tokenizer, dataset, tmp_path, choice):
    """Layers change in the run and the compiled graph need not know.

    The graph is executed by aot_eager: inductor gives the same but compiles for half a minute.
    """
    torch._dynamo.reset()
    changes = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 6}
    chosen = chosen_by(choice, tokenizer)
    found = pair(tokenizer, dataset, tmp_path, choice=chosen, dropout=False, **changes)
    assert_same_run(*found)


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 48),
    reason="before transformers 4.48 Trainer adds up the losses of accumulated batches for GPT-2, "
    "instead of averaging them, whatever the optimizer",
)
def test_accumulation_equals_a_large_batch(tokenizer, dataset, tmp_path):
    ends = []
    for name, batch, steps in (("large", 6, 1), ("accumulated", 2, 3)):
        model, method = model_and_method(tokenizer, dropout=False, policy=CHANGING)
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        args = arguments(tmp_path / name, **changes)
        plain_trainer(model, args, dataset, method).train()
        ends.append(parameters(model))
    assert_close(*ends, parameters(make_gpt2(tokenizer)), within=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same(tokenizer, dataset, tmp_path, reentrant):
    """With reentrant checkpointing behind frozen embeddings, blocks would get no gradient at all.

    That is what requires_grad=False on the embeddings did; the callback leaves it undone there.
    """
    ends = []
    recomputing = {RECOMPUTE: True, f"{RECOMPUTE}_kwargs": {"use_reentrant": reentrant}}
    plan = attention_plan(make_gpt2(tokenizer))
    for name, changes in (("plain", {}), ("recomputing", recomputing)):
        model, method = model_and_method(tokenizer, plan=plan)
        trainer = plain_trainer(model, arguments(tmp_path / name, **changes), dataset, method)
        trainer.train()
        ends.append(parameters(model))
        assert all(p.requires_grad for p in model.parameters())
    assert_close(*ends, parameters(make_gpt2(tokenizer)))


@BOTH
def test_evaluation_during_training_changes_nothing(tokenizer, dataset, tmp_path, choice):
    """Without dropout: Trainer's evaluation draws from the generator that dropout uses."""
    chosen = chosen_by(choice, tokenizer)
    small = dataset.select(range(6))
    found = pair(
        tokenizer,
        dataset,
        tmp_path,
        choice=chosen,
        dropout=False,
        eval_dataset=small,
        eval_strategy="steps",
        eval_steps=3,
    )
    assert_same_run(*found)
    without, method = model_and_method(tokenizer, dropout=False, **chosen)
    plain_trainer(without, arguments(tmp_path / "without"), dataset, method).train()
    assert_equal(parameters(found[0].model), parameters(without))


def test_reduce_on_plateau(tokenizer, dataset, tmp_path):
    found = pair(
        tokenizer,
        dataset,
        tmp_path,
        choice={"policy": CHANGING},
        eval_dataset=dataset.select(range(6)),
        eval_strategy="steps",
        eval_steps=1,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "threshold": 0.5, "factor": 0.5},
        metric_for_best_model="eval_loss",
    )
    assert_same_run(*found)
    rates = [e["learning_rate"] for e in found[0].state.log_history if "learning_rate" in e]
    assert rates[-1] < rates[0] / 4, "the schedule never acted"


@BOTH
def test_early_stopping_and_the_best_model(tokenizer, dataset, tmp_path, choice):
    """The highest loss is called the best, so that the best checkpoint is an early one.

    Getting worse by a rate that is too high would let rounding grow, and nothing could be compared.
    """
    found = pair(
        tokenizer,
        dataset,
        tmp_path,
        choice=chosen_by(choice, tokenizer),
        callbacks=lambda: [EarlyStoppingCallback(early_stopping_patience=2)],
        eval_dataset=dataset.select(range(6)),
        max_steps=30,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        lr_scheduler_type="constant",
    )
    ours, theirs, start = found
    assert ours.state.global_step == theirs.state.global_step < 30
    best = ours.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith(f"-{ours.state.global_step}"), "the last was the best: nothing shown"
    saved = AutoModelForCausalLM.from_pretrained(best)
    assert_equal(parameters(ours.model), parameters(saved))
    assert_close(parameters(ours.model), parameters(theirs.model), start)


def test_logged_layer_norms_are_those_of_layer_grad_norms(tokenizer, dataset, tmp_path):
    from gradloc import layer_grad_norms

    model, method = model_and_method(
        tokenizer, dropout=False, policy=CHANGING, log_layer_norms=True
    )
    by_hand = without_dropout(make_gpt2(tokenizer))
    layers = LayerMap.from_model(by_hand)
    rows = dataset.select(range(2))
    batch = collate_blocks([rows[0], rows[1]])
    by_hand(**batch).loss.backward()
    expected = dict(zip(layers.names, layer_grad_norms(by_hand, layers).tolist(), strict=True))
    trainer = plain_trainer(model, arguments(tmp_path, max_steps=3), rows, method)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(lines) == 3
    for step, line in enumerate(lines):
        active = plan_at(model, step).active
        logged = {k.removeprefix("grad_norm/"): v for k, v in line.items() if "/" in k}
        assert sorted(logged) == sorted(active)
        if step == 0:
            assert logged == pytest.approx({name: expected[name] for name in active}, rel=1e-5)
        total = sum(value**2 for value in logged.values()) ** 0.5
        assert line["grad_norm"] == pytest.approx(total, rel=1e-5)
