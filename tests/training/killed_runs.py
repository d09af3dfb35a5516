"""The process that test_sigkill starts: runs trainings in children of its own and has them killed.

    python killed_runs.py FOLDER SEED

For each API and policy trains once undisturbed in FOLDER/API-POLICY/whole, and in .../killed with
five kills, each followed by a start from the last complete checkpoint. A child is a process of its
own (a fork, so that imports are paid for once) and always ends by SIGKILL, its own or this
process's, or by finishing. Prints a line a life and writes FOLDER/API-POLICY/lives.json, a list of
{place, killed, complete: step of the last complete checkpoint before the life, began: global step
of its first step, or null if it took none}. The comparisons are the test's.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from gradloc import RandomLayers, Retrace, TracedGradientPolicy
from gradloc.training.callback import LocalizationCallback
from gradloc.training.checkpoints import is_finished, last_complete_checkpoint
from gradloc.training.config import TrainConfig
from gradloc.training.localized_trainer import collate_blocks
from gradloc.training.tracing import Tracing
from gradloc.training.train import train

STEPS = 32
KILLS = 5
LONGEST_LIFE_S = 60
# Where a life ends: in the middle of a step, or of the writing of a file (cut at a random length)
# of its second or third checkpoint, or whenever a new checkpoint's folder is seen from outside. So
# each life but for the last kind leaves a checkpoint of its own, and the next begins above step 0.
PLACES = ("step", "model", "optimizer.pt", "scheduler.pt", "rng_state.pth", "state", "plan")


def blocks(count, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 60, (count, 12), generator=draw).tolist()


def make_model():
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, bos_token_id=0, eos_token_id=0, **size))


def make_choice(policy):
    if policy == "random":
        return {"policy": Retrace(RandomLayers(count=3, seed=2), every=3)}
    ids = torch.tensor(blocks(4, seed=7))
    probes = [{"input_ids": ids, "labels": ids.where(torch.arange(12) > 8, -100)}]
    return {
        "policy": Retrace(TracedGradientPolicy(threshold=("top_k", 3)), every=5),
        "tracing": Tracing(probes, [{"input_ids": ids.flip(0), "labels": ids.flip(0)}]),
    }


def run(api, policy, output, callbacks):
    """Start, or go on from the last complete checkpoint, in the way that the docs say."""
    data = [{"input_ids": row, "labels": row} for row in blocks(30, seed=1)]
    checkpoint = last_complete_checkpoint(output)
    limit = None if output.name == "whole" else 2  # the test looks at all plans of the whole run
    if api == "train":
        config = TrainConfig(
            output=output,
            max_steps=STEPS,
            batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            save_steps=2,
            save_total_limit=limit,
            logging_steps=1,
            device="cpu",
            progress=False,
        )
        started = {"resume": True} if checkpoint else {"overwrite": True}
        train(make_model(), None, data, config, **make_choice(policy), **started,
              callbacks=callbacks)  # fmt: skip
        return
    if checkpoint and is_finished(checkpoint):
        return
    model = make_model()
    method = LocalizationCallback(model, **make_choice(policy))
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=limit,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=collate_blocks,
        optimizer_cls_and_kwargs=method.optimizer(args),
        callbacks=[method, *callbacks],
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class TellStart(TrainerCallback):
    """Writes down the step that a life began with, as the training itself has it."""

    def __init__(self, file):
        self.file = file

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.file.exists():
            self.file.write_text(str(state.global_step))


class DieInStep(TrainerCallback):
    """Between the backward pass and the update, some steps after the start of this life."""

    def __init__(self, after):
        self.after = after

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.after -= 1
        if self.after < 0:
            die()


def cut_and_die(file, draw):
    """What is on the disk when a write is cut short: the beginning of the file."""
    os.truncate(file, draw.randrange(os.path.getsize(file)))
    die()


def arm(place, draw):
    """Let this process die at the place; callbacks for the run."""
    if place == "step":
        return [DieInStep(draw.randrange(2, 6))]
    left = [draw.randrange(1, 3)]  # checkpoints that are written before

    def is_time():
        left[0] -= 1
        return left[0] < 0

    if place == "model":
        save = GPT2LMHeadModel.save_pretrained

        def save_pretrained(self, folder, *args, **kwargs):
            save(self, folder, *args, **kwargs)
            if is_time():
                cut_and_die(Path(folder) / "model.safetensors", draw)

        GPT2LMHeadModel.save_pretrained = save_pretrained
    elif place == "state":
        save_to_json = TrainerState.save_to_json

        def cut(self, path):
            save_to_json(self, path)
            if is_time():
                cut_and_die(path, draw)

        TrainerState.save_to_json = cut
    elif place == "plan":
        save_choice = LocalizationCallback._save_choice

        def save_and_die(self, folder):
            if is_time():
                die()
            save_choice(self, folder)

        LocalizationCallback._save_choice = save_and_die
    else:
        save_any = torch.save

        def save_and_cut(value, file, *args, **kwargs):
            save_any(value, file, *args, **kwargs)
            if str(file).endswith(place) and is_time():
                cut_and_die(file, draw)

        torch.save = save_and_cut
    return []


def live(api, policy, output, place=None, draw=None):
    """One life of the training, and what lives.json says of it."""
    before = set(output.glob("checkpoint-*"))
    complete = last_complete_checkpoint(output)
    start = output.parent / "began"
    start.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            armed = arm(place, draw) if place not in (None, "outside") else []
            run(api, policy, output, [TellStart(start), *armed])
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    deadline = time.monotonic() + LONGEST_LIFE_S
    ended, status = 0, 0
    while not ended:
        late = time.monotonic() > deadline
        if late or (place == "outside" and set(output.glob("checkpoint-*")) - before):
            time.sleep(draw.random() * 0.01 if not late else 0)
            os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0)
            assert not late, "a training hung"
            break
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.0005)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, f"a life ended with status {status}"
    found = last_complete_checkpoint(output)
    names = sorted(path.name for path in output.glob("checkpoint-*"))
    began = int(start.read_text()) if start.exists() else None
    print(
        f"{place}: from {began}, {'killed' if killed else 'finished'}, "
        f"{found and found.name} of {names}"
    )
    step = int(complete.name.removeprefix("checkpoint-")) if complete else 0
    return {"place": place, "killed": killed, "complete": step, "began": began}


def scenario(folder, api, policy, seed):
    draw = random.Random(seed)
    # Two from outside, the others where the seed says; no place twice.
    places = ["outside", "outside", *draw.sample(PLACES, KILLS - 2)]
    draw.shuffle(places)
    print(f"{api}, {policy}, seed {seed}: {places}")
    (folder / "killed").mkdir(parents=True)
    live(api, policy, folder / "whole")
    lives = [live(api, policy, folder / "killed", place, draw) for place in places]
    kills = sum(life["killed"] for life in lives)
    assert kills == KILLS, f"only {kills} kills before the run was over"
    lives.append(live(api, policy, folder / "killed"))
    assert not lives[-1]["killed"]
    (folder / "lives.json").write_text(json.dumps(lives))


def main(folder, seed):
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for number, api in enumerate(("plain", "train")):
        for other, policy in enumerate(("random", "traced")):
            scenario(folder / f"{api}-{policy}", api, policy, seed + 10 * number + other)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
