"""LocalizationCallback in a plain Trainer: where the plan comes from, clipping, logs, resuming."""

import copy

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
    reference_trainer,
)
from transformers import Trainer, TrainerCallback

from gradloc import (
    AllLayers,
    GradientProfile,
    LayerMap,
    LayerPlan,
    LocalizedAdamW,
    RandomLayers,
    Retrace,
    TracedGradientPolicy,
    trace_gradients,
)
from gradloc.training.callback import LocalizationCallback
from gradloc.training.checkpoints import last_complete_checkpoint
from gradloc.training.localized_trainer import LocalizedTrainer, collate_blocks
from gradloc.training.trainer_optimizer import localized_optimizer


@pytest.fixture
def plan(tokenizer):
    return attention_plan(make_gpt2(tokenizer))


def active_parameters(model, plan):
    layers = LayerMap.from_model(model)
    return {n for n, _, layer in layers.parameters(model) if layers.names[layer] in plan.active}


class Watch(TrainerCallback):
    """What requires a gradient in each step, and what Trainer's limit is outside of clipping."""

    def __init__(self):
        self.trained, self.limits = [], set()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.trained.append({n for n, p in model.named_parameters() if p.requires_grad})

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.limits.add(args.max_grad_norm)


def test_a_plan_from_a_file(tokenizer, dataset, plan, tmp_path):
    plan.save(tmp_path / "chosen.json")
    model, method = model_and_method(tokenizer, plan=tmp_path / "chosen.json")
    before, watch = parameters(model), Watch()
    active = active_parameters(model, plan)
    trainer = plain_trainer(model, arguments(tmp_path), dataset, method, callbacks=[watch])
    trainer.train()
    assert method.plan.scales == plan.scales
    assert watch.trained == [active] * 8, "backward computed gradients of frozen layers"
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in active), name
    localized = localized_optimizer(trainer.optimizer)
    assert localized.state_bytes() == 8 * sum(before[name].numel() for name in active)
    assert repr(type(localized)) == repr(LocalizedAdamW)
    assert copy.deepcopy(localized).plan.scales == plan.scales


@pytest.mark.parametrize("early", [False, True])
def test_traced_when_training_begins(tokenizer, dataset, tracing, tmp_path, early):
    """Or by choose(args): the same plan, as nothing has trained in between."""
    model, method = model_and_method(tokenizer, policy=TracedGradientPolicy(), tracing=tracing)
    expected = trace_gradients(model, tracing.probes, tracing.reference, progress=False)
    args, watch = arguments(tmp_path, save_strategy="steps", save_steps=4), Watch()
    if early:
        chosen = method.choose(args)
    else:
        with pytest.raises(ValueError, match="no plan yet"):
            _ = method.plan
    plain_trainer(model, args, dataset, method, callbacks=[watch]).train()
    assert method.profile.relative == pytest.approx(expected.relative, rel=1e-6)
    assert method.plan.scales == TracedGradientPolicy()(expected).scales
    assert watch.trained == [active_parameters(model, method.plan)] * 8
    if early:
        assert method.plan == chosen
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        found = GradientProfile.load(folder / "profile.json")
        assert found.relative == method.profile.relative
    assert LayerPlan.load(tmp_path / "checkpoint-4/plan.json").scales == method.plan.scales


@pytest.mark.parametrize("choice", ["plan", "traced", "retraced", "random"])
def test_resumed_by_plain_train(tokenizer, dataset, tracing, plan, tmp_path, choice):
    """Stopped at 5, resumed from 3; the traced plan must be the checkpoint's, not a new trace."""
    chosen = {
        "plan": {"plan": plan},
        "traced": {"policy": TracedGradientPolicy(), "tracing": tracing},
        "retraced": {
            "policy": Retrace(TracedGradientPolicy(threshold=("top_k", 2)), every=4),
            "tracing": tracing,
        },
        "random": {"policy": Retrace(RandomLayers(count=3, seed=5), every=2)},
    }[choice]
    changes = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 0.03}

    whole, method = model_and_method(tokenizer, **chosen)
    trainer = plain_trainer(whole, arguments(tmp_path / "whole", **changes), dataset, method)
    trainer.train()
    args = arguments(tmp_path / "stopped", **changes)
    stopped, other = model_and_method(tokenizer, **chosen)
    with pytest.raises(KeyboardInterrupt):
        plain_trainer(stopped, args, dataset, other, callbacks=[StopAt(5)]).train()

    resumed, again = model_and_method(tokenizer, **chosen)
    second = plain_trainer(resumed, arguments(tmp_path / "stopped", **changes), dataset, again)
    second.train(resume_from_checkpoint=str(last_complete_checkpoint(tmp_path / "stopped")))
    assert_equal(parameters(resumed), parameters(whole))
    assert again.plan == method.plan
    assert again.profile == method.profile
    for folder in ("checkpoint-6", "checkpoint-8"):
        for name in ("plan.json", "profile.json"):
            files = [tmp_path / run / folder / name for run in ("whole", "stopped")]
            assert files[0].exists() == files[1].exists() == (name == "plan.json" or "tr" in choice)
            if files[0].exists():
                assert files[0].read_bytes() == files[1].read_bytes(), name
    assert [e for e in second.state.log_history if "loss" in e] == [
        e for e in trainer.state.log_history if "loss" in e
    ]


def test_a_kill_before_the_plan_file_is_mended(tokenizer, dataset, tracing, tmp_path):
    """Trainer's files were whole, ours not written: the next run finds the plan and writes it."""
    chosen = {"policy": TracedGradientPolicy(), "tracing": tracing}
    args = arguments(tmp_path, save_strategy="steps", save_steps=3)
    model, method = model_and_method(tokenizer, **chosen)
    with pytest.raises(KeyboardInterrupt):
        plain_trainer(model, args, dataset, method, callbacks=[StopAt(4)]).train()
    checkpoint = tmp_path / "checkpoint-3"
    files = {name: (checkpoint / name).read_bytes() for name in ("plan.json", "profile.json")}
    for name in files:
        (checkpoint / name).unlink()
    model, again = model_and_method(tokenizer, **chosen)
    trainer = plain_trainer(model, args, dataset, again)
    trainer.train(resume_from_checkpoint=str(last_complete_checkpoint(tmp_path)))
    assert again.plan == method.plan
    assert again.profile == method.profile
    assert {name: (checkpoint / name).read_bytes() for name in files} == files


def test_resuming_what_cannot_be(tokenizer, dataset, plan, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 4}
    model, method = model_and_method(tokenizer, plan=plan)
    plain_trainer(model, arguments(tmp_path, **changes), dataset, method).train()

    other = LayerPlan({name: 1.0 for name in plan.scales}, policy="everything")
    model, method = model_and_method(tokenizer, plan=other)
    trainer = plain_trainer(model, arguments(tmp_path, **changes), dataset, method)
    with pytest.raises(ValueError, match=r"another plan \(by hand\) than the one given \(every"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

    model, method = model_and_method(tokenizer, plan=plan)
    trainer = plain_trainer(model, arguments(tmp_path, **changes), dataset, method)
    with pytest.raises(ValueError, match=r"step 8 is the end of its run .*nothing is left"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_clipping_is_applied_once(tokenizer, dataset, plan, tmp_path, accumulation):
    """With gradients of frozen layers there: Trainer's norm would count them, and clip again."""
    limit = 0.05  # well below the norms
    ends = []
    for kind in ("ours", "theirs"):
        model = make_gpt2(tokenizer)
        args = arguments(
            tmp_path / kind, max_grad_norm=limit, gradient_accumulation_steps=accumulation
        )
        if kind == "ours":
            method = LocalizationCallback(model, plan=plan, freeze_requires_grad=False)
            watch = Watch()
            trainer = plain_trainer(model, args, dataset, method, callbacks=[watch])
            trainer.train()
            assert watch.limits == {limit}
            assert args.max_grad_norm == limit
            assert localized_optimizer(trainer.optimizer).max_grad_norm == limit
        else:
            trainer = reference_trainer(model, args, dataset, lambda step: plan)
            trainer.train()
        norms = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
        ends.append((parameters(model), trainer, norms))
    assert min(ends[1][1].reference.norms) > 4 * limit
    assert_close(ends[0][0], ends[1][0], parameters(make_gpt2(tokenizer)))
    assert ends[0][2] == pytest.approx(ends[1][1].reference.norms, rel=1e-3)
    # Moments show what was clipped even where Adam's quotient hides a common factor.
    sizes = []
    for _, trainer, _ in ends:
        states = trainer.optimizer.state_dict()["state"].values()
        squares = [s["exp_avg_sq"].double().sum() for s in states if "exp_avg_sq" in s]
        sizes.append(sum(squares).item())
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_an_interrupt_leaves_trainers_clipping_for_the_next_run(tokenizer, dataset, plan, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            assert args.max_grad_norm == 0
            raise KeyboardInterrupt

    model, method = model_and_method(tokenizer, plan=plan)
    args = arguments(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        plain_trainer(model, args, dataset, method, callbacks=[Interrupt()]).train()
    _, options = method.optimizer(args)
    assert options["max_grad_norm"] == args.max_grad_norm == 0.5


def test_an_optimizer_of_the_users_own(gpt2, dataset, tmp_path):
    layers = LayerMap.from_model(gpt2)
    policy = Retrace(RandomLayers(count=2), every=2)
    method = LocalizationCallback(gpt2, policy=policy, layers=layers)

    def trainer(**options):
        optimizer = LocalizedAdamW(gpt2.parameters(), lr=1e-3, **options)
        return Trainer(
            model=gpt2,
            args=arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=5),
            train_dataset=dataset,
            data_collator=collate_blocks,
            optimizers=(optimizer, None),
            callbacks=[method],
        )

    with pytest.raises(ValueError, match=r"max_grad_norm=0\.5 and LocalizedAdamW has none"):
        trainer(layers=layers).train()
    with pytest.raises(ValueError, match="other layers than the callback"):
        trainer(max_grad_norm=1.0).train()
    fitting = trainer(layers=layers, max_grad_norm=1.0)
    fitting.train()
    optimizer = localized_optimizer(fitting.optimizer)
    assert optimizer.plan.scales == policy(layers, step=4).scales
    assert LayerPlan.load(tmp_path / "checkpoint-5/plan.json").scales == optimizer.plan.scales
    with pytest.raises(TypeError, match="SGD, not LocalizedAdamW"):
        localized_optimizer(torch.optim.SGD(gpt2.parameters()))


def test_reporters_get_our_norms_if_we_go_first(tokenizer, dataset, plan, tmp_path):
    """Trainer calls those of report_to before the callbacks that it is given."""

    class Reporter(TrainerCallback):
        lines: list

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.lines.append(dict(logs))

    seen = {}
    for first in (False, True):
        model, method = model_and_method(tokenizer, plan=plan, log_layer_norms=True)
        trainer = plain_trainer(model, arguments(tmp_path, max_steps=1), dataset, method)
        reporter = Reporter()
        reporter.lines = seen[first] = []
        trainer.callback_handler.callbacks.insert(0, reporter)
        if first:
            method.log_first(trainer)
        trainer.train()
    name = "grad_norm/transformer.h.0.attn"
    assert name not in seen[False][0]
    assert name in seen[True][0]


def test_norms_are_read_only_when_logging(tokenizer, dataset, plan, tmp_path, monkeypatch):
    """Reading them waits for the device."""
    reads = []
    read = LocalizedAdamW.grad_norms
    monkeypatch.setattr(LocalizedAdamW, "grad_norms", lambda self: reads.append(1) or read(self))
    model, method = model_and_method(tokenizer, plan=plan)
    trainer = plain_trainer(model, arguments(tmp_path, logging_steps=4), dataset, method)
    trainer.train()
    assert len(reads) == 2


def test_what_does_not_train_is_refused_before_training(tokenizer, dataset, plan, tmp_path):
    nothing = LayerPlan(dict.fromkeys(plan.scales, 0.0))
    with pytest.raises(ValueError, match="freezes all 7 layers"):
        model_and_method(tokenizer, plan=nothing)

    def frozen(source, step=0):
        return LayerPlan(dict.fromkeys(source.names, 0.0), policy="mine")

    frozen.needs_profile = False
    model, method = model_and_method(tokenizer, policy=frozen)
    before = parameters(model)
    trainer = plain_trainer(model, arguments(tmp_path), dataset, method)
    with pytest.raises(ValueError, match=r"the plan \(mine\) freezes all 7 layers"):
        trainer.train()
    assert_equal(parameters(model), before)

    # Frozen before Trainer makes its groups, and chosen afterwards: it could never train.
    model, method = model_and_method(tokenizer, plan=plan)
    for _, parameter, layer in method.layers.parameters(model):
        if method.layers.names[layer] == "transformer.h.1.attn":
            parameter.requires_grad_(False)
    trainer = plain_trainer(model, arguments(tmp_path), dataset, method)
    with pytest.raises(ValueError, match=r"h\.1\.attn"):
        trainer.train()


def test_settings_that_cannot_go_with_layers(gpt2, tmp_path, monkeypatch):
    method = LocalizationCallback(gpt2, policy=AllLayers())

    class Given:
        """TrainingArguments with these would need DeepSpeed, or several processes."""

        def __init__(self, **changes):
            self.__dict__.update(arguments(tmp_path).__dict__, **changes)

    cases = [
        (Given(deepspeed={"zero_optimization": {"stage": 3}}), {}, "ZeRO replaces parameters"),
        (Given(fsdp=True, fsdp_config={"version": 1}), {}, "fsdp_version=1"),
        (Given(fsdp="full_shard", fsdp_config=None, fsdp_plugin_args=None), {}, "fsdp_version=1"),
        (Given(gradient_accumulation_steps=2), {"release_gradients": True}, "accumulation_steps=2"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            method.optimizer(args, **options)
    method.optimizer(Given(fsdp=True, fsdp_config={"version": 2}))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp_version=1"):
        method.optimizer(arguments(tmp_path))
    monkeypatch.setenv("FSDP_VERSION", "2")
    usual = arguments(tmp_path)
    method.optimizer(usual)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed"):
        method.optimizer(usual)


def test_localized_trainer_is_a_trainer_with_the_callback(tokenizer, dataset, plan, tmp_path):
    ends = []
    for kind in ("plain", "localized"):
        model, method = model_and_method(tokenizer, plan=plan)
        args = arguments(tmp_path / kind)
        if kind == "plain":
            trainer = plain_trainer(model, args, dataset, method)
        else:
            trainer = LocalizedTrainer(
                localization=method,
                model=model,
                args=args,
                train_dataset=dataset,
                data_collator=collate_blocks,
            )
        trainer.train()
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        ends.append((parameters(model), lines))
    assert_equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
