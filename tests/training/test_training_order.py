"""TrainConfig.shuffle=False: rows in the dataset's own order, also through a kill and a resume.

With it, data mixes that are turned off train to the bits of a run without them.
"""

import pytest
import torch
from conftest import make_gpt2, sentences
from transformers import Trainer, TrainerCallback

from gradloc import LayerMap, LayerPlan
from gradloc.training import localized_trainer
from gradloc.training.config import TrainConfig
from gradloc.training.corpus import pack_documents
from gradloc.training.mixing import MixReview, Replay, mixed_rows
from gradloc.training.train import train

BLOCK = 16


class StopAt(TrainerCallback):
    """A kill: raises in the middle of the run."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def new(tokenizer):
    return pack_documents(sentences(60, seed=1), tokenizer, block_size=BLOCK)


@pytest.fixture(scope="module")
def keep(tokenizer):
    return pack_documents(sentences(40, seed=2, shift=2), tokenizer, block_size=BLOCK)


@pytest.fixture
def seen(monkeypatch):
    """The rows in the order in which the run reads them."""
    rows = []

    def collate(batch, inner=localized_trainer.collate_blocks):
        rows.extend(tuple(row["input_ids"]) for row in batch)
        return inner(batch)

    monkeypatch.setattr(localized_trainer, "collate_blocks", collate)
    return rows


def run(model, dataset, output, *, callbacks=(), resume=False, **changes):
    """Train everything, with dropout in force; gives the weights."""
    usual = {
        "batch_size": 2,
        "learning_rate": 3e-3,
        "save_steps": 3,
        "shuffle": False,
        "progress": False,
        "device": "cpu",
    }
    layers = LayerMap.from_model(model)
    plan = LayerPlan(dict.fromkeys(layers.names, 1.0))
    config = TrainConfig(output=output, **{**usual, **changes})
    train(model, None, dataset, config, plan=plan, callbacks=callbacks, resume=resume)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_come_in_the_order_of_the_dataset_in_every_epoch(
    gpt2, new, seen, tmp_path, accumulation
):
    run(gpt2, new, tmp_path, epochs=2, gradient_accumulation_steps=accumulation)
    assert seen == [tuple(row["input_ids"]) for row in new] * 2


def test_a_trainer_that_only_knows_a_random_order_keeps_it_too(
    gpt2, new, seen, tmp_path, monkeypatch
):
    """As the older ones; they pass no dataset."""

    def sampler(self, train_dataset=None):
        return torch.utils.data.RandomSampler(self.train_dataset)

    monkeypatch.setattr(Trainer, "_get_train_sampler", sampler)
    run(gpt2, new, tmp_path / "own")
    own = [tuple(row["input_ids"]) for row in new]
    assert seen == own
    seen.clear()
    run(gpt2, new, tmp_path / "random", shuffle=True)
    assert seen != own


def test_rows_are_shuffled_without_being_asked(gpt2, new, seen, tmp_path):
    run(gpt2, new, tmp_path, shuffle=True)
    own = [tuple(row["input_ids"]) for row in new]
    assert seen != own
    assert sorted(seen) == sorted(own)
    assert TrainConfig(output=tmp_path).shuffle


@pytest.mark.parametrize(("stop", "saved"), [(4, 3), (7, 6)])
def test_a_resumed_run_goes_on_in_the_order_and_ends_in_the_same_bits(
    tokenizer, new, keep, seen, tmp_path, stop, saved
):
    """Checkpoints at 3, 6 and 9; the rows of steps that are done are not read again."""
    rows = mixed_rows(new, keep, mix=Replay(1), num_rows=20, seed=0)
    whole = run(make_gpt2(tokenizer), rows, tmp_path / "whole")
    assert seen == [tuple(row["input_ids"]) for row in rows]
    with pytest.raises(KeyboardInterrupt):
        run(make_gpt2(tokenizer), rows, tmp_path / "killed", callbacks=[StopAt(stop)])
    seen.clear()
    other = make_gpt2(tokenizer, seed=1)  # the weights must come from the checkpoint
    resumed = run(other, rows, tmp_path / "killed", resume=True)
    assert seen == [tuple(rows[index]["input_ids"]) for index in range(2 * saved, 20)]
    assert same(resumed, whole)


def test_the_order_belongs_to_the_settings_of_a_run(tokenizer, new, tmp_path):
    config = {"max_steps": 6}
    with pytest.raises(KeyboardInterrupt):
        run(make_gpt2(tokenizer), new, tmp_path, callbacks=[StopAt(4)], **config)
    with pytest.raises(ValueError, match=r"shuffle=True \(was False\)"):
        run(make_gpt2(tokenizer), new, tmp_path, resume=True, shuffle=True, **config)


def test_a_mix_that_is_turned_off_is_training_without_one_bit_for_bit(
    tokenizer, new, keep, tmp_path
):
    def trained(name, mix):
        rows = mixed_rows(new, keep, mix=mix, num_rows=14, seed=0)
        return run(make_gpt2(tokenizer), rows, tmp_path / name)

    plain = trained("plain", None)
    assert not same(plain, dict(make_gpt2(tokenizer).named_parameters()))
    assert same(trained("replay-0", Replay(0)), plain)
    assert same(trained("mix-review-0", MixReview(0)), plain)
    assert not same(trained("replay-1", Replay(1)), plain)
    assert not same(trained("mix-review-1", MixReview(1)), plain)
