"""LocalizationCallback over several runs, and how it is put together with a Trainer.

Forgotten callbacks, a second run, another policy at a resume, gradients released in backward. What
a single run does is in test_callback.
"""

import copy
import logging
import pickle

import pytest
import torch
from conftest import make_gpt2
from small_runs import (
    StopAt,
    arguments,
    assert_close,
    assert_equal,
    attention_plan,
    model_and_method,
    parameters,
    plain_trainer,
    without_dropout,
)
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

from gradloc import (
    GradientProfile,
    LayerMap,
    LayerPlan,
    RandomLayers,
    Retrace,
    TracedGradientPolicy,
    trace_gradients,
)
from gradloc.training.callback import LocalizationCallback
from gradloc.training.localized_trainer import collate_blocks
from gradloc.training.trainer_optimizer import localized_optimizer

# How older versions of Accelerate ask for autocast.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")


class Plans(TrainerCallback):
    """The plan that the optimizer steps with, step by step."""

    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(localized_optimizer(optimizer).plan)


def attention_only(profile, step=0):
    return LayerPlan({name: float("attn" in name) for name in profile.names})


def test_a_forgotten_callback_is_an_error(tokenizer, dataset, tmp_path):
    """Trainer would clip by all gradients and the optimizer again, and no plan would change."""
    model, method = model_and_method(tokenizer, policy=Retrace(RandomLayers(count=3), every=2))
    args = arguments(tmp_path, max_steps=2)
    before = parameters(model)

    def trainer(callbacks):
        return Trainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=collate_blocks,
            optimizer_cls_and_kwargs=method.optimizer(args),
            callbacks=callbacks,
        )

    forgotten = trainer([])
    with pytest.raises(RuntimeError, match=r"pass callbacks=\[method\] to Trainer"):
        forgotten.train()
    assert_equal(parameters(model), before)
    guarded = localized_optimizer(forgotten.optimizer)
    for copied in (copy.deepcopy(guarded), pickle.loads(pickle.dumps(guarded))):
        assert copied.plan == guarded.plan
    trainer([method]).train()
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("again", ["same trainer", "new trainer"])
@pytest.mark.parametrize("every", [3, None])
def test_a_second_run_chooses_as_the_first_did(tokenizer, dataset, tmp_path, again, every):
    """It began with the plan of the first run's last steps."""
    drawn = RandomLayers(count=3, seed=5)
    policy = drawn if every is None else Retrace(drawn, every=every)
    model, method = model_and_method(tokenizer, policy=policy)
    args, plans = arguments(tmp_path), Plans()
    trainer = plain_trainer(model, args, dataset, method, callbacks=[plans])
    trainer.train()
    last = plans.seen[-1]
    assert method.plan == last, "the plan cannot be read after training"
    first, plans.seen = plans.seen, []
    if again == "new trainer":
        trainer = plain_trainer(model, args, dataset, method, callbacks=[plans])
    trainer.train()
    layers = LayerMap.from_model(model)
    assert first == [drawn(layers, step=n - n % (every or 8)) for n in range(8)]
    assert plans.seen == first
    assert method.plan == last


def test_a_plan_chosen_between_runs_holds(tokenizer, dataset, tracing, tmp_path):
    """Traced on the trained model: another choice than the first, and not traced once more."""
    policy = TracedGradientPolicy(threshold=("top_k", 2))
    model, method = model_and_method(tokenizer, policy=policy, tracing=tracing)
    args = arguments(tmp_path, max_steps=4, learning_rate=0.05)
    plain_trainer(model, args, dataset, method).train()
    untrained = method.profile
    expected = trace_gradients(model, tracing.probes, tracing.reference, progress=False)
    chosen = method.choose(args)
    assert method.profile.relative == pytest.approx(expected.relative, rel=1e-6)
    assert method.profile.relative != pytest.approx(untrained.relative, rel=1e-2)
    profile, plans = method.profile, Plans()
    plain_trainer(model, args, dataset, method, callbacks=[plans]).train()
    assert plans.seen == [chosen] * 4
    assert method.profile is profile


def test_an_interrupted_run_is_begun_anew(tokenizer, dataset, tmp_path):
    """What was frozen by requires_grad in it must be in the groups of the next optimizer."""
    model, method = model_and_method(tokenizer, policy=RandomLayers(count=3, seed=5))
    args, plans = arguments(tmp_path), Plans()
    with pytest.raises(KeyboardInterrupt):
        plain_trainer(model, args, dataset, method, callbacks=[StopAt(2)]).train()
    assert not all(p.requires_grad for p in model.parameters())
    method.policy = RandomLayers(count=3, seed=6)
    plain_trainer(model, args, dataset, method, callbacks=[plans]).train()
    assert plans.seen == [RandomLayers(count=3, seed=6)(method.layers)] * 8
    assert all(p.requires_grad for p in model.parameters())


def test_resuming_with_another_policy_is_said(tokenizer, dataset, tmp_path, caplog):
    changes = {"save_strategy": "steps", "save_steps": 3}
    for seed, told in ((1, False), (1, False), (2, True)):
        policy = Retrace(RandomLayers(count=3, seed=seed), every=4)
        model, method = model_and_method(tokenizer, policy=policy)
        trainer = plain_trainer(model, arguments(tmp_path, **changes), dataset, method)
        resumed = (tmp_path / "checkpoint-3").exists()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="gradloc"):
            trainer.train(resume_from_checkpoint=resumed and str(tmp_path / "checkpoint-3"))
        lines = [r.getMessage() for r in caplog.records if "another policy" in r.getMessage()]
        assert len(lines) == told
    assert "seed=1), every=4)) than that given (Retrace(policy=RandomLayers(" in lines[0]
    assert "seed=2), every=4))" in lines[0]


def test_the_seed_of_rounding_is_trainers(tokenizer, dataset, tmp_path):
    """In bfloat16, where the seed shows."""
    ends = []
    for seed, options in ((3, {}), (4, {}), (4, {"seed": 3})):
        model = without_dropout(make_gpt2(tokenizer)).to(torch.bfloat16)
        method = LocalizationCallback(model, plan=attention_plan(model))
        # The same data in the same order: seed is then that of the rounding alone.
        args = arguments(tmp_path, max_steps=3, seed=seed, data_seed=0)
        cls, kwargs = method.optimizer(args, stochastic_rounding=True, **options)
        assert kwargs["seed"] == options.get("seed", seed)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=collate_blocks,
            optimizer_cls_and_kwargs=(cls, kwargs),
            callbacks=[method],
        )
        trainer.train()
        ends.append(parameters(model))
    assert_equal(ends[2], ends[0])
    assert any(not torch.equal(ends[1][name], ends[0][name]) for name in ends[0])


@pytest.mark.parametrize("choice", ["plan", "traced", "random"])
def test_gradients_released_in_backward(tokenizer, dataset, tracing, tmp_path, choice):
    """The same run; tracing comes before the optimizer's hooks are on the parameters."""
    chosen = {
        "plan": {"plan": attention_plan(make_gpt2(tokenizer))},
        "traced": {"policy": TracedGradientPolicy(), "tracing": tracing},
        "random": {"policy": Retrace(RandomLayers(count=3, seed=5), every=2)},
    }[choice]
    ends, plans = [], []
    for release in (False, True):
        model, method = model_and_method(tokenizer, **chosen)
        args = arguments(tmp_path, max_grad_norm=0.0)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=collate_blocks,
            optimizer_cls_and_kwargs=method.optimizer(args, release_gradients=release),
            callbacks=[method],
        )
        trainer.train()
        ends.append(parameters(model))
        plans.append(method.plan)
    assert plans[0] == plans[1]
    assert_close(ends[1], ends[0], parameters(make_gpt2(tokenizer)), within=1e-5)


def test_what_released_gradients_exclude(tokenizer, dataset, tracing, tmp_path):
    def refused(message, policy, **changes):
        _, method = model_and_method(tokenizer, policy=policy, tracing=tracing)
        with pytest.raises(ValueError, match=message):
            method.optimizer(arguments(tmp_path, **changes), release_gradients=True)

    traced = TracedGradientPolicy()
    refused(r"args\.max_grad_norm=0\.5 .*Set args\.max_grad_norm=0", traced)
    refused("accumulation_steps=2", traced, max_grad_norm=0.0, gradient_accumulation_steps=2)
    refused("traces during training", Retrace(traced, every=2), max_grad_norm=0.0)


def test_a_function_that_reads_only_names(tokenizer, dataset, tmp_path):
    """The one in the README: the error says how to use it without a profile."""
    model = make_gpt2(tokenizer)
    with pytest.raises(ValueError, match=r"set `attention_only\.needs_profile = False` if it rea"):
        LocalizationCallback(model, policy=attention_only)
    with pytest.raises(ValueError, match=r"set `policy\.needs_profile = False`"):
        LocalizationCallback(model, policy=lambda profile, step=0: attention_only(profile))

    def mine(source, step=0):
        return attention_only(source)

    mine.needs_profile = False
    method = LocalizationCallback(model, policy=mine)
    plain_trainer(model, arguments(tmp_path, max_steps=2), dataset, method).train()
    assert method.plan.scales == attention_plan(model).scales


@pytest.mark.parametrize("bf16", [False, True])
def test_a_profile_traced_again_is_that_of_the_checkpoint(
    tokenizer, dataset, tracing, tmp_path, bf16
):
    """Traced at step 4 of 6 on what checkpoint-4 holds; by hand from there."""
    policy = Retrace(TracedGradientPolicy(threshold=("top_k", 3)), every=4)
    model, method = model_and_method(tokenizer, policy=policy, tracing=tracing)
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "learning_rate": 0.03}
    args = arguments(tmp_path, bf16=bf16, **changes)
    plain_trainer(model, args, dataset, method).train()
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-4")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected, untrained = (
            trace_gradients(m, tracing.probes, tracing.reference, progress=False)
            for m in (saved, make_gpt2(tokenizer))
        )
    first = GradientProfile.load(tmp_path / "checkpoint-4/profile.json")
    assert (first.step, method.profile.step) == (0, 4)
    assert first.relative == pytest.approx(untrained.relative, rel=1e-6)
    assert method.profile.relative == pytest.approx(expected.relative, rel=1e-6)
    assert method.profile.relative != pytest.approx(untrained.relative, rel=1e-2)
    assert method.plan.scales == policy(expected).scales


@pytest.mark.parametrize("kind", ["no", "bf16"])
def test_a_trace_has_the_precision_of_the_launcher(tokenizer, tracing, tmp_path, monkeypatch, kind):
    """Trainer follows `accelerate launch --mixed_precision`, though its arguments say nothing."""
    model, args = make_gpt2(tokenizer), arguments(tmp_path)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(trace_gradients(model, tracing.probes, tracing.reference, progress=False))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", kind)
    launched = tracing.trace(model, LayerMap.from_model(model), args, 0)
    assert launched.relative == found[kind == "bf16"].relative
    assert launched.relative != found[kind != "bf16"].relative
