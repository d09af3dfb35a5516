"""Accelerate's launcher, preparation and checkpoints, and the Trainer in two processes."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import assert_same_bits
from parallel import LENGTH, alone, assert_same_run, make_model, whole
from ranks import run_ranks
from torch import Tensor

from gradloc.policies import RandomLayers, Retrace

HERE = Path(__file__).parent


def test_accelerate_launch(tmp_path):
    """DDP and FSDP2, each continued from Accelerate's checkpoint, end as one process does."""
    # `accelerate launch --cpu` would start one process: it counts on mpirun for more.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(HERE / "accelerate_script.py"), str(tmp_path)]
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), str(HERE)])
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    for rank in range(2):
        runs = torch.load(tmp_path / f"result{rank}", weights_only=False)
        for run, kind in zip(runs, ("DDP", "FSDP2"), strict=True):
            expected = copy.copy(alone("gpt2"))
            run.norms, expected.norms = run.norms[1:], expected.norms[-len(run.norms) + 1 :]
            assert_same_run(run, expected, f"{kind}, rank {rank}")


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 29, (LENGTH,), generator=generator)
        return {"input_ids": ids, "labels": ids.clone()}


def trained(folder: Path, batch_size: int) -> tuple[list, list, dict[str, Tensor]]:
    """Plans of every step, logged layer norms, and the weights in the end."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from gradloc.training.callback import LocalizationCallback

    plans = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
            plans.append(dict(method.plan.scales))

    model = make_model("gpt2")
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=batch_size,
        max_steps=6,
        learning_rate=4e-3,
        adam_epsilon=1e-4,
        max_grad_norm=0.5,
        logging_steps=2,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
    policy = Retrace(RandomLayers(count=3, seed=2), every=2)
    method = LocalizationCallback(model, policy=policy, log_layer_norms=True)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Tokens(),
        optimizer_cls_and_kwargs=method.optimizer(args),
        callbacks=[method, Watch()],
    )
    trainer.train()
    logs = [
        {key: value for key, value in entry.items() if key.startswith("grad_norm")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return plans, logs, {name: whole(param) for name, param in model.named_parameters()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trainer_in_two_processes(tmp_path):
    ((plans, logs, params),) = run_ranks(trained, 1, tmp_path / "one", 4)
    results = run_ranks(trained, 2, tmp_path / "two", 2)
    assert len(plans) == 6
    assert plans[0] == plans[1] != plans[2] == plans[3] != plans[4] == plans[5]
    assert logs, "nothing was logged"
    for rank, (our_plans, our_logs, our_params) in enumerate(results):
        assert our_plans == plans, f"rank {rank}"
        for ours, theirs in zip(our_logs, logs if our_logs else [], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3), f"rank {rank}"
        for name, value in params.items():
            torch.testing.assert_close(
                our_params[name], value, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert_same_bits(our_params[name], results[0][2][name], name)
    assert results[0][1], "rank 0 was to log"
    assert any("layer" in key or "attn" in key for key in logs[0]), logs[0]
    assert (tmp_path / "two" / "checkpoint-3" / "plan.json").exists()
