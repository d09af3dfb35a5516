"""gradloc.training.train: what a run trains, logs and saves. Resuming is in test_train_resume."""

import json

import pytest
import torch
from conftest import make_gpt2
from small_runs import (
    assert_equal,
    attention_plan,
    parameters,
    settings,
    without_dropout,
)
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gradloc import (
    AllLayers,
    GradientProfile,
    LayerMap,
    LayerPlan,
    RandomLayers,
    Retrace,
    TracedGradientPolicy,
    layer_grad_norms,
)
from gradloc.training.localized_trainer import collate_blocks, training_arguments, use_one_device
from gradloc.training.train import train


def test_training_all_layers_is_trainer_with_adamw(tokenizer, dataset, tmp_path):
    """Groups, decay, clipping, schedule, order of the data: as Trainer has them."""
    ours = make_gpt2(tokenizer)
    train(ours, None, dataset, settings(tmp_path / "a", max_grad_norm=0.5), policy=AllLayers())
    theirs = make_gpt2(tokenizer)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "b"),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        seed=0,
        optim="adamw_torch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(
        model=theirs, args=arguments, train_dataset=dataset, data_collator=collate_blocks
    ).train()
    start = parameters(make_gpt2(tokenizer))
    expected = parameters(theirs)
    for name, found in parameters(ours).items():
        moved = (expected[name] - start[name]).abs().max()
        worst = (found - expected[name]).abs().max()
        assert moved > 1e-3
        assert worst < 1e-3 * moved, f"{name}: off by {worst}, moved by {moved}"


def test_frozen_layers_stay_and_the_others_move(gpt2, tokenizer, dataset, tmp_path):
    class Watch(TrainerCallback):
        def __init__(self):
            self.frozen_grads, self.requires = [], None

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            named = dict(model.named_parameters())
            self.requires = {name for name, p in named.items() if p.requires_grad}

    before = parameters(gpt2)
    gpt2.transformer.h[0].mlp.c_fc.bias.requires_grad_(False)
    watch = Watch()
    plan = attention_plan(gpt2)
    result = train(
        gpt2, tokenizer, dataset, settings(tmp_path / "run"), plan=plan, callbacks=[watch]
    )
    layers = LayerMap.from_model(gpt2)
    active = {n for n, _, layer in layers.parameters(gpt2) if layers.names[layer] in plan.active}
    assert watch.requires == active
    for name, parameter in gpt2.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in active), name
        assert parameter.requires_grad == (name != "transformer.h.0.mlp.c_fc.bias"), name
    assert result.optimizer_bytes == 8 * sum(p.numel() for n, p in before.items() if n in active)
    assert not gpt2.training


def test_requires_grad_freezing_changes_nothing_but_the_cost(tokenizer, dataset, tmp_path):
    found = []
    for freeze in (True, False):
        model = make_gpt2(tokenizer)
        config = settings(tmp_path / str(freeze), freeze_requires_grad=freeze)
        train(model, None, dataset, config, plan=attention_plan(model))
        found.append(parameters(model))
    assert_equal(found[0], found[1])


def test_the_logged_norm_is_over_active_layers_and_before_clipping(gpt2, dataset, tmp_path):
    without_dropout(gpt2)
    rows = dataset.select(range(2))
    ids = torch.tensor(rows["input_ids"][:])
    layers, plan = LayerMap.from_model(gpt2), attention_plan(gpt2)
    gpt2(input_ids=ids, labels=ids).loss.backward()
    by_layer = dict(zip(layers.names, layer_grad_norms(gpt2, layers).tolist(), strict=True))
    gpt2.zero_grad()
    expected = sum(by_layer[name] ** 2 for name in plan.active) ** 0.5
    config = settings(
        tmp_path / "run", max_steps=1, max_grad_norm=expected / 10, log_layer_norms=True
    )
    train(gpt2, None, rows, config, plan=plan)
    (line,) = json.loads((tmp_path / "run" / "training.json").read_text())["log"]
    assert line["grad_norm"] == pytest.approx(expected, rel=1e-5)
    for name in layers.names:
        if name in plan.active:
            assert line[f"grad_norm/{name}"] == pytest.approx(by_layer[name], rel=1e-5)
        else:
            assert f"grad_norm/{name}" not in line


def test_plans_change_during_the_run_and_are_kept(gpt2, tokenizer, dataset, tracing, tmp_path):
    config = settings(tmp_path / "run", save_total_limit=None)
    policy = Retrace(TracedGradientPolicy(), every=3)
    result = train(gpt2, None, dataset, config, policy=policy, tracing=tracing)
    profiles = [
        GradientProfile.load(tmp_path / "run" / f"checkpoint-{step}" / "profile.json")
        for step in (3, 6, 8)
    ]
    # The profile in a checkpoint is the one that led to it: traced at its beginning.
    assert [profile.step for profile in profiles] == [0, 3, 6]
    assert GradientProfile.load(tmp_path / "run/profile.json").step == 6
    for step, profile in zip((3, 6, 8), profiles, strict=True):
        plan = LayerPlan.load(tmp_path / "run" / f"checkpoint-{step}" / "plan.json")
        assert plan.scales == policy(profile).scales
    assert LayerPlan.load(tmp_path / "run/plan.json").scales == result.plan.scales
    assert all(p.requires_grad for p in gpt2.parameters())


def test_what_is_saved_loads(gpt2, tokenizer, dataset, tmp_path):
    gpt2.config.use_cache = True
    about = {"model": "tiny"}
    result = train(
        gpt2, tokenizer, dataset, settings(tmp_path / "run"), policy=AllLayers(), about=about
    )
    loaded = AutoModelForCausalLM.from_pretrained(result.folder)
    assert_equal(parameters(loaded), parameters(gpt2))
    assert loaded.config.use_cache, "the saved model would generate without a cache"
    record = json.loads((tmp_path / "run/training.json").read_text())
    assert record["status"] == "finished"
    assert record["about"] == about
    assert len(record["log"]) == 8
    assert record["num_layers"] == len(record["active_layers"]) == 7
    for folder in ("final", "checkpoint-8"):
        assert (tmp_path / "run" / folder / "tokenizer.json").is_file()


def test_bf16_keeps_float32_parameters(gpt2, dataset, tracing, tmp_path):
    before = parameters(gpt2)
    config = settings(tmp_path / "run", bf16=True)
    result = train(gpt2, None, dataset, config, policy=TracedGradientPolicy(), tracing=tracing)
    assert {p.dtype for p in gpt2.parameters()} == {torch.float32}
    assert any(not torch.equal(p, before[name]) for name, p in gpt2.named_parameters())
    assert 0 < result.final_loss < 10


def test_a_policy_of_the_users_own(gpt2, dataset, tracing, tmp_path):
    def mlps(profile, step=0):
        return LayerPlan({name: 0.5 * name.endswith("mlp") for name in profile.names})

    result = train(gpt2, None, dataset, settings(tmp_path / "run"), policy=mlps, tracing=tracing)
    assert result.plan.active == ("transformer.h.0.mlp", "transformer.h.1.mlp")


@pytest.mark.parametrize(
    ("option", "check"),
    [
        ({"on_freeze": "drop"}, lambda b, half, full: b == full),
        ({"on_freeze": "keep"}, lambda b, half, full: b > full),
        ({"state_dtype": "bfloat16", "on_freeze": "drop"}, lambda b, half, full: b == half),
    ],
    ids=["drop", "keep", "bfloat16"],
)
def test_options_of_the_optimizer_reach_it(gpt2, dataset, tmp_path, option, check):
    """By the bytes of moments after several plans."""
    config = settings(tmp_path / "run", **option)
    policy = Retrace(RandomLayers(count=2, seed=1), every=2)
    result = train(gpt2, None, dataset, config, policy=policy)
    layers = LayerMap.from_model(gpt2)
    active = sum(layer.num_elements for layer in layers if layer.name in result.plan.active)
    assert check(result.optimizer_bytes, 4 * active, 8 * active), (result.optimizer_bytes, active)


def test_stochastic_rounding_reaches_the_optimizer(tokenizer, dataset, tmp_path):
    """Updates far below half a step of bfloat16 move a tenth of the weights, and none without."""
    moved = []
    for rounding in (False, True):
        model = make_gpt2(tokenizer).to(torch.bfloat16)
        start = parameters(model)
        config = settings(
            tmp_path / str(rounding),
            learning_rate=1e-7,
            stochastic_rounding=rounding,
            weight_decay=0.0,
        )
        train(model, None, dataset, config, policy=AllLayers())
        # Away from 0, where bfloat16 is fine enough for such steps.
        large = {name: value.abs() > 1e-2 for name, value in start.items()}
        moved.append(
            sum(
                ((p != start[name]) & large[name]).sum().item()
                for name, p in model.named_parameters()
            )
        )
    assert moved[0] == 0
    assert moved[1] > 10


def test_one_device_a_process(tmp_path, caplog):
    """With several GPUs and a plain launch, Trainer would fall into DataParallel."""
    arguments = training_arguments(settings(tmp_path))
    arguments._n_gpu = 4
    assert arguments.train_batch_size == 8
    use_one_device(arguments)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 2
    assert "torchrun --nproc-per-node 4 -m gradloc.cli train" in caplog.text
