"""LocalizationCallback in a plain Trainer on two ranks (DDP): each way to a plan, and resuming.

One process with the same batches is the reference. That plans which change work is also in
test_accelerate.
"""

from pathlib import Path

import pytest
import torch
from numerics import assert_same_bits
from parallel import LENGTH, make_model, whole
from ranks import run_ranks
from torch import Tensor

from gradloc import LayerMap, LayerPlan, RandomLayers, Retrace, TracedGradientPolicy

STEPS, SAVED = 6, 3
CHOICES = ("static", "traced", "chosen early", "retraced")


def token_batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 29, (count, 2, LENGTH), generator=draw)
    return [{"input_ids": rows, "labels": rows} for rows in ids]


def make_choice(choice: str, model) -> dict:
    from gradloc.training.tracing import Tracing

    if choice == "static":
        names = LayerMap.from_model(model).names
        return {"plan": LayerPlan({name: float(name.endswith("mlp")) for name in names})}
    if choice.startswith("random"):
        return {"policy": RandomLayers(count=3, seed=int(choice[-1]))}
    policy = TracedGradientPolicy(threshold=("top_k", 3))
    return {
        "policy": Retrace(policy, every=2) if choice == "retraced" else policy,
        "tracing": Tracing(token_batches(2, seed=5), token_batches(2, seed=6)),
    }


def trained(choice: str, folder: Path, batch_size: int, checkpoint: str | None = None) -> dict:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from gradloc.training.callback import LocalizationCallback

    class Watch(TrainerCallback):
        """Plans and what requires a gradient, of each step."""

        def __init__(self) -> None:
            self.plans, self.trained = [], []

        def on_step_end(self, args, state, control, **kwargs) -> None:
            self.plans.append(dict(method.plan.scales))
            self.trained.append({n for n, p in model.named_parameters() if p.requires_grad})

    model, watch = make_model("gpt2"), Watch()
    args = TrainingArguments(
        output_dir=str(folder / choice.replace(" ", "-")),
        use_cpu=True,
        per_device_train_batch_size=batch_size,
        max_steps=STEPS,
        learning_rate=4e-2,
        adam_epsilon=1e-4,
        max_grad_norm=0.5,
        save_steps=SAVED,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1,
    )
    method = LocalizationCallback(model, **make_choice(choice, model))
    data = [
        {"input_ids": row, "labels": row}
        for batch in token_batches(12, seed=7)
        for row in batch["input_ids"]
    ]
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data,
        optimizer_cls_and_kwargs=method.optimizer(args),
        callbacks=[method, watch],
    )
    if choice == "chosen early":
        method.choose(args)
    trainer.train(resume_from_checkpoint=checkpoint)
    active = {
        name
        for name, _, layer in method.layers.parameters(model)
        if method.layers.names[layer] in method.plan.active
    }
    return {
        "plans": watch.plans,
        "trained": watch.trained,
        "active": active,
        "every": {name for name, _ in model.named_parameters()},
        "params": {name: whole(param) for name, param in model.named_parameters()},
        "profile": method.profile and dict(method.profile.relative),
    }


def all_runs(folder: Path, batch_size: int) -> dict[str, dict]:
    found = {choice: trained(choice, folder, batch_size) for choice in CHOICES}
    checkpoint = str(folder / "retraced" / f"checkpoint-{SAVED}")
    found["resumed"] = trained("retraced", folder, batch_size, checkpoint)
    trained("random 1", folder, batch_size)
    try:
        trained("random 2", folder, batch_size, str(folder / "random-1" / f"checkpoint-{SAVED}"))
    except ValueError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("runs")
    (alone,) = run_ranks(all_runs, 1, folder / "one", 4)
    return alone, run_ranks(all_runs, 2, folder / "two", 2)


@pytest.mark.parametrize("choice", [*CHOICES, "resumed"])
def test_two_ranks_train_as_one(runs, choice):
    alone, together = runs
    expected = alone[choice]
    start = dict(make_model("gpt2").named_parameters())
    moved = {n for n, p in expected["params"].items() if not torch.equal(p, start[n])}
    assert moved >= expected["active"], "nothing shown"
    for rank, results in enumerate(together):
        found = results[choice]
        assert found["plans"] == expected["plans"], f"rank {rank}"
        for name, value in expected["params"].items():
            torch.testing.assert_close(
                *(found["params"][name], value),
                rtol=2e-6,
                atol=1e-5 * (value - start[name]).abs().max().item() + 2e-6,
                msg=lambda m, name=name: f"{name}: {m}",
            )
            assert_same_bits(found["params"][name], together[0][choice]["params"][name], name)
        if found["profile"] is not None:
            assert found["profile"] == pytest.approx(expected["profile"], rel=1e-4)
        # What is known before DDP wraps the model is left out of backward; the rest is a mask.
        early = choice in ("static", "chosen early")
        kept = found["active"] if early else found["every"]
        assert found["trained"] == [kept] * len(found["plans"])


def test_layers_that_ddp_was_not_shown_are_refused(runs):
    """A checkpoint of another policy: what trains then would not be averaged over the ranks."""
    alone, together = runs
    for results in (alone, *together):
        assert "frozen by requires_grad before the model was wrapped" in results["refused"]
        assert "seed 1" in results["refused"]


def test_retraced_plans_change_and_resume_to_the_same_bits(runs):
    _, together = runs
    for rank, results in enumerate(together):
        plans = results["retraced"]["plans"]
        assert plans[0] == plans[1]
        assert any(plan != plans[0] for plan in plans), "the plan never changed"
        assert results["resumed"]["plans"] == plans[SAVED:]
        assert results["resumed"]["profile"] == results["retraced"]["profile"]
        for name, value in results["retraced"]["params"].items():
            assert_same_bits(results["resumed"]["params"][name], value, f"rank {rank}: {name}")
