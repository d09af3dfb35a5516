"""gradloc.training.train(resume=True): a run that was stopped ends where it would have ended.

Stopped by an exception here; by SIGKILL in test_sigkill.
"""

import json
import shutil

import pytest
import torch
from conftest import make_gpt2
from small_runs import (
    StopAt,
    assert_equal,
    attention_plan,
    parameters,
    settings,
)
from transformers import AutoModelForCausalLM, TrainerCallback

from gradloc import RandomLayers, Retrace, TracedGradientPolicy
from gradloc.training.train import train


@pytest.mark.parametrize("choice", ["plan", "traced", "retraced", "random", "accumulated"])
def test_a_killed_run_ends_where_an_undisturbed_one_does(
    tokenizer, dataset, tracing, tmp_path, choice
):
    """Checkpoints at 3 and 6, the kill at 5; traces at 3 and 6 where the run re-traces."""
    policies = {
        "plan": {"plan": attention_plan(make_gpt2(tokenizer))},
        "traced": {"policy": TracedGradientPolicy(), "tracing": tracing},
        "retraced": {
            "policy": Retrace(TracedGradientPolicy(threshold=("top_k", 2)), every=3),
            "tracing": tracing,
        },
        "random": {"policy": Retrace(RandomLayers(count=3, seed=5), every=2)},
        "accumulated": {"policy": RandomLayers(share=0.5)},
    }[choice]
    changes = {"gradient_accumulation_steps": 2} if choice == "accumulated" else {}

    whole = make_gpt2(tokenizer)
    result = train(whole, None, dataset, settings(tmp_path / "whole", **changes), **policies)
    config = settings(tmp_path / "killed", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(make_gpt2(tokenizer), None, dataset, config, **policies, callbacks=[StopAt(5)])
    assert json.loads((tmp_path / "killed/training.json").read_text())["status"] == "running"
    assert not (tmp_path / "killed/final").exists()
    # Another kill, while a checkpoint was written: it is there, but not all of it.
    shutil.copytree(tmp_path / "killed/checkpoint-3", tmp_path / "killed/checkpoint-4")
    state = tmp_path / "killed/checkpoint-4/trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 3', '"global_step": 4')[:-5])

    resumed = make_gpt2(tokenizer, seed=1)  # other weights: they must come from the checkpoint
    again = train(resumed, None, dataset, config, **policies, resume=True)
    assert_equal(parameters(resumed), parameters(whole))
    assert again.plan.scales == result.plan.scales
    assert again.num_steps == result.num_steps == 8
    states = [
        torch.load(tmp_path / run / "checkpoint-8/optimizer.pt", weights_only=True)["state"]
        for run in ("whole", "killed")
    ]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(value, states[1][index][key]), (index, key)
    assert not (tmp_path / "killed/checkpoint-4").exists()


def test_a_finished_run_resumes_to_itself(gpt2, tokenizer, dataset, tmp_path):
    """Killed after the last checkpoint and before the model was saved.

    With a rate that ends at 0, the step too many that Trainer takes here would go unseen.
    """
    config = settings(tmp_path / "run", lr_scheduler="constant")
    plan = attention_plan(gpt2)
    first = train(gpt2, None, dataset, config, plan=plan)
    shutil.rmtree(first.folder)
    again = make_gpt2(tokenizer, seed=1)
    result = train(again, None, dataset, config, plan=plan, resume=True)
    assert_equal(parameters(again), parameters(gpt2))
    assert_equal(parameters(AutoModelForCausalLM.from_pretrained(first.folder)), parameters(gpt2))
    assert result.num_steps == 8
    assert result.optimizer_bytes == first.optimizer_bytes
    assert result.final_loss == first.final_loss


class PoisonAt(TrainerCallback):
    """Makes a gradient not finite in given steps."""

    def __init__(self, *steps):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            model.transformer.h[0].attn.c_attn.bias.grad.fill_(float("inf"))


def test_skipped_steps_are_those_of_the_whole_run(tokenizer, dataset, tmp_path):
    """Counted from the last resume on before: a run killed after its skips reported none."""
    config = settings(tmp_path / "run")
    plan = attention_plan(make_gpt2(tokenizer))
    callbacks = [PoisonAt(1, 6), StopAt(5)]
    with pytest.raises(KeyboardInterrupt):
        train(make_gpt2(tokenizer), None, dataset, config, plan=plan, callbacks=callbacks)
    result = train(
        *(make_gpt2(tokenizer), None, dataset, config),
        plan=plan,
        callbacks=[PoisonAt(6)],
        resume=True,
    )
    assert result.num_skipped_steps == 2
    record = json.loads((tmp_path / "run/training.json").read_text())
    assert record["num_skipped_steps"] == 2
    assert [line.get("skipped_steps", 0) for line in record["log"]] == [0, 1, 1, 1, 1, 1, 2, 2]
