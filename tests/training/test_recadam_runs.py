"""TrainConfig(recadam=...): it acts in a run, is off at gamma 0, and survives a kill.

What the optimizer does with it is in test_recadam.py and test_recadam_state.py.
"""

import json

import pytest
import torch
from conftest import make_gpt2
from small_runs import StopAt, assert_equal, parameters, settings

from gradloc import RandomLayers, RecAdam, Retrace
from gradloc.training.train import train

PULL = RecAdam(gamma=200.0, k=0.5, t0=6.0)  # lr·gamma is 0.6
# Another half of the layers every two steps, so that layers stop and return.
CHOICE = {"policy": Retrace(RandomLayers(share=0.5, seed=3), every=2)}


def distance(model, start):
    """2-norm of how far the parameters are from where they began."""
    ends = parameters(model)
    return sum(float((ends[name] - start[name]).square().sum()) for name in start) ** 0.5


def test_it_acts_and_gamma_0_is_the_run_without(tokenizer, dataset, tmp_path):
    start = parameters(make_gpt2(tokenizer))
    found = {}
    for name, recadam in {"none": None, "off": RecAdam(gamma=0.0), "pull": PULL}.items():
        model = make_gpt2(tokenizer)
        config = settings(tmp_path / name, recadam=recadam, weight_decay=0.0, max_steps=4)
        train(model, None, dataset, config, **CHOICE)
        found[name] = model
    assert_equal(parameters(found["off"]), parameters(found["none"]))
    assert 0 < distance(found["pull"], start) < 0.2 * distance(found["none"], start)


def test_a_killed_run_ends_where_an_undisturbed_one_does(tokenizer, dataset, tmp_path):
    """Checkpoints at 3 and 6, the kill at 5; anchors are the weights before training."""
    start = parameters(make_gpt2(tokenizer))
    whole = make_gpt2(tokenizer)
    options = {"recadam": PULL, "on_freeze": "drop"}
    train(whole, None, dataset, settings(tmp_path / "whole", **options), **CHOICE)
    config = settings(tmp_path / "killed", **options)
    with pytest.raises(KeyboardInterrupt):
        train(make_gpt2(tokenizer), None, dataset, config, **CHOICE, callbacks=[StopAt(5)])
    resumed = make_gpt2(tokenizer, seed=1)  # other weights: they must come from the checkpoint
    train(resumed, None, dataset, config, **CHOICE, resume=True)
    assert_equal(parameters(resumed), parameters(whole))
    path = tmp_path / "killed/checkpoint-8/optimizer.pt"
    state = torch.load(path, weights_only=True)["state"]
    assert len({tuple(sorted(one)) for one in state.values()}) == 2, "some have an anchor alone"
    values = list(start.values())
    for one in state.values():
        shape = one["anchor"].shape
        assert any(v.shape == shape and torch.equal(v, one["anchor"]) for v in values)


def test_a_run_is_not_resumed_with_another_pull(tokenizer, dataset, tmp_path):
    config = settings(tmp_path / "run", recadam=PULL, max_steps=3)
    train(make_gpt2(tokenizer), None, dataset, config, **CHOICE)
    kept = json.loads((tmp_path / "run/training.json").read_text())["settings"]["recadam"]
    assert RecAdam(**kept) == PULL
    other = settings(tmp_path / "run", max_steps=3)
    with pytest.raises(ValueError, match=r"recadam=None \(was {'gamma': 200\.0"):
        train(make_gpt2(tokenizer), None, dataset, other, **CHOICE, resume=True)


def test_settings_that_are_none():
    with pytest.raises(ValueError, match=r"recadam=200\.0: a gradloc\.RecAdam, or None"):
        settings("run", recadam=200.0)
