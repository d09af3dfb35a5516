import json
import shutil

import pytest
import torch
from conftest import make_gpt2
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gradloc import (
    AllLayers,
    GradientProfile,
    LayerMap,
    LayerPlan,
    LocalizedAdamW,
    RandomLayers,
    Retrace,
    TracedGradientPolicy,
    layer_grad_norms,
)
from gradloc.probes import by_kind, probe_batches, read_probes
from gradloc.training.callback import LocalizationCallback, localized_optimizer
from gradloc.training.config import TrainConfig
from gradloc.training.corpus import packed_corpus, text_batches
from gradloc.training.localized_trainer import (
    LocalizedTrainer,
    collate_blocks,
    training_arguments,
)
from gradloc.training.train import Tracing, train

BLOCK = 16


@pytest.fixture(scope="module")
def dataset(tokenizer, text_file):
    return packed_corpus(text_file, tokenizer, block_size=BLOCK)


@pytest.fixture(scope="module")
def tracing(tokenizer, text_file, probe_file):
    probes = by_kind(read_probes(probe_file))
    return Tracing(
        probes={kind: probe_batches(ps, tokenizer, batch_size=2) for kind, ps in probes.items()},
        reference=text_batches(text_file, tokenizer, block_size=16, batch_size=2, max_batches=4),
    )


def settings(output, **changes):
    usual = {
        "max_steps": 8,
        "batch_size": 2,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "save_steps": 3,
        "logging_steps": 1,
        "progress": False,
    }
    return TrainConfig(output=output, **{**usual, **changes})


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def attention_plan(model):
    names = LayerMap.from_model(model).names
    return LayerPlan({name: float(name.endswith("attn")) for name in names})


def assert_equal(found, expected):
    worst = max(((found[name] - expected[name]).abs().max().item(), name) for name in expected)
    same = all(torch.equal(found[name], expected[name]) for name in expected)
    assert same, f"largest difference {worst}"


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


class StopAt(TrainerCallback):
    """A kill: raises in the middle of the run."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


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
    (tmp_path / "killed/checkpoint-4/plan.json").unlink()

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


def test_the_callback_serves_a_plain_trainer(gpt2, dataset, tmp_path):
    layers = LayerMap.from_model(gpt2)
    policy = Retrace(RandomLayers(count=2), every=2)
    callback = LocalizationCallback(layers, policy(layers), policy=policy)
    optimizer = LocalizedAdamW(
        gpt2.parameters(), lr=1e-3, layers=layers, plan=callback.plan, max_grad_norm=1.0
    )
    trainer = Trainer(
        model=gpt2,
        args=training_arguments(settings(tmp_path, max_steps=5, save_steps=5)),
        train_dataset=dataset,
        optimizers=(optimizer, None),
        callbacks=[callback],
    )
    trainer.train()
    assert optimizer.plan.scales == policy(layers, step=4).scales
    assert LayerPlan.load(tmp_path / "checkpoint-5/plan.json").scales == optimizer.plan.scales
    assert localized_optimizer(trainer.optimizer) is optimizer
    with pytest.raises(TypeError, match="SGD, not LocalizedAdamW"):
        localized_optimizer(torch.optim.SGD(gpt2.parameters()))


def test_trainer_must_not_clip_too(gpt2, dataset, tmp_path):
    layers = LayerMap.from_model(gpt2)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"args\.max_grad_norm=1\.0: set it to 0"):
        LocalizedTrainer(
            localization=LocalizationCallback(layers, AllLayers()(layers)),
            model=gpt2,
            args=arguments,
            train_dataset=dataset,
        )


def test_choices_that_cannot_be(gpt2, tokenizer, dataset, tracing, tmp_path):
    def run(**choice):
        return train(gpt2, None, dataset, settings(tmp_path / "run"), **choice)

    layers = LayerMap.from_model(gpt2)
    everything = AllLayers()(layers)
    with pytest.raises(ValueError, match="either plan or policy"):
        run()
    with pytest.raises(ValueError, match="either plan or policy"):
        run(plan=everything, policy=AllLayers())
    with pytest.raises(ValueError, match="needs a profile"):
        run(policy=TracedGradientPolicy())
    with pytest.raises(ValueError, match="traces again during the run"):
        run(policy=Retrace(TracedGradientPolicy(), every=2))
    with pytest.raises(ValueError, match="does not fit the model"):
        run(plan=LayerPlan({"somewhere": 1.0}))
    with pytest.raises(ValueError, match="freezes all 7 layers"):
        run(plan=LayerPlan(dict.fromkeys(layers.names, 0.0)))
    by_block = LayerMap.from_model(gpt2, granularity="block")
    profile = GradientProfile.from_norms(
        {"probe": dict.fromkeys(by_block.names, 1.0)}, dict.fromkeys(by_block.names, 1.0)
    )
    with pytest.raises(ValueError, match="layers"):
        run(policy=TracedGradientPolicy(), profile=profile)
    assert not list(tmp_path.rglob("*.json")), "an error left files behind"


def test_a_run_is_not_overwritten_by_mistake(gpt2, tokenizer, dataset, tmp_path):
    def run(model, **changes):
        flags = {name: changes.pop(name) for name in ("resume", "overwrite") if name in changes}
        config = settings(tmp_path / "run", **changes)
        return train(model, None, dataset, config, policy=AllLayers(), **flags)

    with pytest.raises(ValueError, match="no complete checkpoint to resume from"):
        run(gpt2, resume=True)
    run(gpt2)
    with pytest.raises(ValueError, match=r"holds a run already.*--resume.*--overwrite"):
        run(gpt2)
    with pytest.raises(ValueError, match="resume and overwrite"):
        run(gpt2, resume=True, overwrite=True)
    with pytest.raises(ValueError, match=r"learning_rate=0.1 \(was 0.003\), max_steps=9 \(was 8\)"):
        run(gpt2, resume=True, learning_rate=0.1, max_steps=9)
    config = settings(tmp_path / "run")
    with pytest.raises(ValueError, match="choice="):
        train(gpt2, None, dataset, config, policy=RandomLayers(), resume=True)
    other = dataset.select(range(3, len(dataset)))
    with pytest.raises(ValueError, match="corpus="):
        train(gpt2, None, other, config, policy=AllLayers(), resume=True)
    (tmp_path / "run/notes.txt").write_text("mine")
    run(make_gpt2(tokenizer), overwrite=True, max_steps=2)
    kept = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert kept == ["checkpoint-2", "final", "notes.txt", "plan.json", "training.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0: above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"max_steps": 0}, "max_steps=0: at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
        ({"save_total_limit": 1}, "save_total_limit=1: keep at least 2"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"lr_scheduler": "zigzag"}, "zigzag"),
    ],
)
def test_settings_out_of_range(gpt2, dataset, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(gpt2, None, dataset, settings(tmp_path / "run", **change), policy=AllLayers())
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
