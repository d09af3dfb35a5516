"""Slow weights in a Trainer: the move itself, what it leaves alone, and resuming bit for bit."""

import math
import shutil

import pytest
import torch
from conftest import make_gpt2
from numerics import assert_same_bits
from small_runs import StopAt, arguments, assert_equal, attention_plan, parameters, settings
from transformers import Trainer, TrainerCallback

from gradloc import LayerMap, LayerPlan, RandomLayers, Retrace
from gradloc.training.localized_trainer import collate_blocks
from gradloc.training.slow_weights import SLOW_WEIGHTS_FILE, SlowWeights, SlowWeightsCallback
from gradloc.training.train import train


class Watch(TrainerCallback):
    """Keeps the parameters at the end of each step, as the callbacks before this one left them."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = parameters(model)


def run(model, dataset, config, *callbacks, resume=False, **choice):
    choice = choice or {"plan": attention_plan(model)}
    return train(model, None, dataset, config, callbacks=callbacks, resume=resume, **choice)


@pytest.mark.parametrize(("every", "strength"), [(3, 0.5), (2, 0.3), (1, 0.9)])
def test_every_few_steps_weights_move_back(tokenizer, dataset, tmp_path, every, strength):
    model = make_gpt2(tokenizer)
    slow, plan = parameters(model), attention_plan(model)
    before, after = Watch(), Watch()
    callback = SlowWeightsCallback(SlowWeights(every=every, strength=strength))
    run(model, dataset, settings(tmp_path), before, callback, after)
    for step in range(1, 9):
        fast, found = before.seen[step], after.seen[step]
        if step % every:
            assert_equal(found, fast)
            continue
        for name, value in found.items():
            start = slow[name].double()
            exact = start + (1 - strength) * (fast[name].double() - start)
            off = (value.double() - exact).abs().max().item()
            assert off <= 4e-7 * exact.abs().max().item(), (step, name, off)
        slow = found
    assert_equal(parameters(model), after.seen[8])
    # Frozen layers neither move nor have copies.
    start, layers = parameters(make_gpt2(tokenizer)), LayerMap.from_model(model)
    held = 0
    for name, value in parameters(model).items():
        trains = plan.scales[layers.names[layers.index(name)]] > 0
        assert torch.equal(value, start[name]) != trains, name
        held += value.numel() * value.element_size() if trains else 0
    assert callback.extra_bytes == held


def test_at_strength_0_not_one_bit_changes(tokenizer, dataset, tmp_path):
    plain, same = make_gpt2(tokenizer), make_gpt2(tokenizer)
    run(plain, dataset, settings(tmp_path / "plain"))
    callback = SlowWeightsCallback(SlowWeights(every=1, strength=0))
    run(same, dataset, settings(tmp_path / "same"), callback)
    for name, value in parameters(plain).items():
        assert_same_bits(parameters(same)[name], value, name)
    assert callback.extra_bytes == 0
    assert not list(tmp_path.rglob(SLOW_WEIGHTS_FILE))
    one = SlowWeightsCallback(SlowWeights(every=1, strength=0.5))
    other = make_gpt2(tokenizer)
    run(other, dataset, settings(tmp_path / "other"), one)
    assert not torch.equal(
        other.transformer.h[0].attn.c_attn.weight, plain.transformer.h[0].attn.c_attn.weight
    )


def test_at_strength_1_every_step_is_undone(tokenizer, dataset, tmp_path):
    model, watch = make_gpt2(tokenizer), Watch()
    callback = SlowWeightsCallback(SlowWeights(every=2, strength=1))
    run(model, dataset, settings(tmp_path), watch, callback)
    start = parameters(make_gpt2(tokenizer))
    assert not torch.equal(
        watch.seen[8]["transformer.h.0.attn.c_attn.weight"],
        start["transformer.h.0.attn.c_attn.weight"],
    )
    for name, value in start.items():
        assert_same_bits(parameters(model)[name], value, name)


def test_the_optimizer_is_left_alone(tokenizer, dataset, tmp_path):
    """Its moments go on as if nothing had moved: step counts are those of a run without."""
    model = make_gpt2(tokenizer)
    run(model, dataset, settings(tmp_path), SlowWeightsCallback(SlowWeights(every=2)))
    saved = torch.load(tmp_path / "checkpoint-8/optimizer.pt", weights_only=True)["state"]
    assert {state["step"].item() for state in saved.values()} == {8}


@pytest.mark.parametrize(
    ("choice", "every"),
    [("plan", 2), ("all", 3), ("redrawn", 2), ("redrawn", 3), ("accumulated", 4)],
)
def test_a_killed_run_ends_where_an_undisturbed_one_does(
    tokenizer, dataset, tmp_path, choice, every
):
    """Checkpoints at 3 and 6, the kill at 5: in mid-interval for every=2, at its end for 3.

    With "redrawn" layers also freeze and return, at step 3 among others.
    """
    layers = LayerMap.from_model(make_gpt2(tokenizer)).names
    given = {
        "plan": {"plan": attention_plan(make_gpt2(tokenizer))},
        "all": {"plan": LayerPlan(dict.fromkeys(layers, 1.0))},
        "redrawn": {"policy": Retrace(RandomLayers(count=3, seed=5), every=3)},
        "accumulated": {"policy": RandomLayers(share=0.5)},
    }[choice]
    changes = {"gradient_accumulation_steps": 2} if choice == "accumulated" else {}

    def slow():
        return SlowWeightsCallback(SlowWeights(every=every, strength=0.4))

    whole, first = make_gpt2(tokenizer), slow()
    run(whole, dataset, settings(tmp_path / "whole", **changes), first, **given)
    config = settings(tmp_path / "killed", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(make_gpt2(tokenizer), dataset, config, slow(), StopAt(5), **given)
    resumed, again = make_gpt2(tokenizer, seed=1), slow()
    run(resumed, dataset, config, again, **given, resume=True)
    assert_equal(parameters(resumed), parameters(whole))
    if choice != "redrawn":  # there the most is held before the kill or after it
        assert again.extra_bytes == first.extra_bytes > 0


class DieAtSave(TrainerCallback):
    """A kill after Trainer has written a checkpoint and before any callback was told of it."""

    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_a_complete_checkpoint_has_the_copies(tokenizer, dataset, tmp_path):
    """They are written first: one that Trainer has finished can be resumed at any moment."""
    whole = make_gpt2(tokenizer)
    changed = SlowWeights(every=2, strength=0.4)
    run(whole, dataset, settings(tmp_path / "whole"), SlowWeightsCallback(changed))
    config, killed = settings(tmp_path / "killed"), make_gpt2(tokenizer)
    with pytest.raises(KeyboardInterrupt):
        run(killed, dataset, config, DieAtSave(), SlowWeightsCallback(changed))
    assert (tmp_path / "killed/checkpoint-3" / SLOW_WEIGHTS_FILE).is_file()
    run(killed, dataset, config, SlowWeightsCallback(changed), resume=True)
    assert_equal(parameters(killed), parameters(whole))


class AskForCheckpoint(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 4


@pytest.mark.parametrize("strategy", ["asked for", "epoch"])
def test_checkpoints_that_trainer_writes_at_other_times(tokenizer, dataset, tmp_path, strategy):
    """In a plain Trainer with torch's own AdamW: by a later callback, and at the end of an epoch.

    Eight rows are an epoch of four steps.
    """
    rows = dataset.select(range(8))

    def trained(folder, model, checkpoint=None, stop=99):
        args = arguments(
            folder,
            num_train_epochs=2,
            max_steps=-1,
            save_strategy="no" if strategy == "asked for" else "epoch",
        )
        callbacks = [SlowWeightsCallback(SlowWeights(every=3)), AskForCheckpoint(), StopAt(stop)]
        if strategy == "epoch":
            del callbacks[1]
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=collate_blocks,
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return parameters(model)

    whole = trained(tmp_path / "whole", make_gpt2(tokenizer))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", make_gpt2(tokenizer), stop=5)
    checkpoint = str(tmp_path / "killed/checkpoint-4")
    resumed = trained(tmp_path / "killed", make_gpt2(tokenizer, seed=1), checkpoint)
    assert_equal(resumed, whole)


def test_resuming_refuses_what_does_not_fit(tokenizer, dataset, tmp_path):
    config = settings(tmp_path / "run")
    slow = SlowWeights(every=2, strength=0.4)
    with pytest.raises(KeyboardInterrupt):
        run(make_gpt2(tokenizer), dataset, config, SlowWeightsCallback(slow), StopAt(5))
    file = tmp_path / "run/checkpoint-3" / SLOW_WEIGHTS_FILE

    def resumed(settings_now):
        model = make_gpt2(tokenizer)
        return run(model, dataset, config, SlowWeightsCallback(settings_now), resume=True)

    for other in (SlowWeights(2, 0.5), SlowWeights(3, 0.4), SlowWeights(2, 0)):
        with pytest.raises(ValueError, match=r"'every': 2, 'strength': 0.4}, not at 3 with"):
            resumed(other)
    file.rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"has no slow weights: '.*checkpoint-3/slow_weights"):
        resumed(slow)
    # Of another model: the same names, other shapes.
    from safetensors.torch import load_file, save_file

    from gradloc.training.checkpoints import last_complete_checkpoint

    tensors = load_file(tmp_path / "away")
    about = {"step": "3", "settings": '{"every": 2, "strength": 0.4}'}
    name = next(iter(tensors))
    for wrong in ({**tensors, name: tensors[name][:1]}, {**tensors, "other": torch.ones(1)}):
        save_file({key: value.contiguous() for key, value in wrong.items()}, file, about)
        with pytest.raises(ValueError, match="is of another model or plan"):
            resumed(slow)
    # One that was cut short is not there for `train`.
    file.write_bytes((tmp_path / "away").read_bytes()[:-8])
    assert last_complete_checkpoint(tmp_path / "run") is None
    shutil.copy(tmp_path / "away", file)
    assert resumed(slow).num_steps == 8


def test_a_callback_can_serve_again(tokenizer, dataset, tmp_path):
    """After a run that was killed, with another model: nothing of the first is left."""
    callback = SlowWeightsCallback(SlowWeights(every=3))
    with pytest.raises(KeyboardInterrupt):
        run(make_gpt2(tokenizer, seed=1), dataset, settings(tmp_path / "a"), callback, StopAt(2))
    again, fresh = make_gpt2(tokenizer), make_gpt2(tokenizer)
    run(again, dataset, settings(tmp_path / "b"), callback)
    run(fresh, dataset, settings(tmp_path / "c"), SlowWeightsCallback(SlowWeights(every=3)))
    assert_equal(parameters(again), parameters(fresh))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dataset, tokenizer, tmp_path, dtype):
    """Copies have the parameters' dtype, and the move is rounded once."""
    model, before, after = make_gpt2(tokenizer).to(dtype), Watch(), Watch()
    start = parameters(model)
    callback = SlowWeightsCallback(SlowWeights(every=2, strength=0.5))
    # Two steps, with a model in float16 at a rate that survives.
    config = settings(tmp_path, max_steps=2, eps=1e-4)
    run(model, dataset, config, before, callback, after)
    name = "transformer.h.0.attn.c_attn.weight"
    fast, found, first = before.seen[2][name], after.seen[2][name], start[name]
    exact = (first.double() + fast.double()) / 2
    off = (found.double() - exact).abs()
    wide, kind = torch.finfo(torch.promote_types(dtype, torch.float32)).eps, torch.finfo(dtype)
    rounding = kind.eps / 2 * exact.abs().clamp(min=kind.smallest_normal)
    allowed = rounding + 4 * wide * (first.abs() + fast.abs())
    assert (off <= allowed).all(), (off - allowed).max()
    assert not torch.equal(found, fast)
    assert found.dtype == dtype


@pytest.mark.parametrize(
    "wrong",
    [("every", 0), ("every", 2.0), ("every", True), ("strength", -0.1), ("strength", 1.1),
     ("strength", math.nan), ("strength", "0.5"), ("strength", True)],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range(wrong):
    name, value = wrong
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        SlowWeights(**{name: value})
