"""Which checkpoints are taken for whole: cut short at any file, at any byte, they are not."""

import json
import random
import shutil

import pytest
from conftest import make_gpt2
from small_runs import arguments, attention_plan, make_dataset, model_and_method, plain_trainer
from transformers.trainer_utils import get_last_checkpoint

from gradloc.training.checkpoints import is_finished, last_complete_checkpoint

READ_BY_RESUME = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


@pytest.fixture(scope="module")
def run(tokenizer, text_file, tmp_path_factory):
    """A run of a plain Trainer with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    model, method = model_and_method(tokenizer, plan=attention_plan(make_gpt2(tokenizer)))
    args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
    plain_trainer(model, args, make_dataset(tokenizer, text_file), method).train()
    return folder


def test_whole_ones(run):
    assert last_complete_checkpoint(run) == run / "checkpoint-4"
    assert last_complete_checkpoint(str(run)) == run / "checkpoint-4"
    assert is_finished(run / "checkpoint-4")
    assert not is_finished(run / "checkpoint-2")
    assert last_complete_checkpoint(run / "checkpoint-4") is None
    assert last_complete_checkpoint(run / "nowhere") is None


@pytest.mark.parametrize("name", READ_BY_RESUME)
def test_a_file_cut_short_or_missing(run, tmp_path, name):
    """At the first byte, at the last, and at bytes drawn in between."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    file = folder / "checkpoint-4" / name
    content = file.read_bytes().rstrip()  # a last newline may be missing
    draw = random.Random(name)
    lengths = [0, 1, 8, len(content) - 1]
    lengths += [draw.randrange(len(content)) for _ in range(20)]
    for length in lengths:
        file.write_bytes(content[:length])
        found = last_complete_checkpoint(folder)
        assert found == folder / "checkpoint-2", f"{length} of {len(content)} bytes: taken"
        assert get_last_checkpoint(str(folder)).endswith("checkpoint-4")
    file.unlink()
    assert last_complete_checkpoint(folder) == folder / "checkpoint-2"
    file.write_bytes(content)
    assert last_complete_checkpoint(folder) == folder / "checkpoint-4"


def test_the_plan_file_is_not_needed(run, tmp_path):
    """Trainer's files are all there when a kill comes before ours; the plan is in optimizer.pt."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "checkpoint-4/plan.json").unlink()
    assert last_complete_checkpoint(folder) == folder / "checkpoint-4"


def test_of_several_processes_all_must_have_written(run, tmp_path):
    """Rank 0 may be done with its part before rank 1 has saved its random state."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    last = folder / "checkpoint-4"
    shutil.copy(last / "rng_state.pth", last / "rng_state_1.pth")
    (last / "rng_state.pth").rename(last / "rng_state_0.pth")
    assert last_complete_checkpoint(folder) == last
    (last / "plan.json").unlink()
    assert last_complete_checkpoint(folder) == folder / "checkpoint-2"


def test_a_state_of_another_step_and_weights_in_parts(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-9")
    assert last_complete_checkpoint(folder) == folder / "checkpoint-4"
    weights = folder / "checkpoint-4/model.safetensors"
    parts = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    index = {"metadata": {}, "weight_map": {"a": parts[0], "b": parts[1]}}
    (weights.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(weights, weights.parent / parts[0])
    weights.unlink()
    assert last_complete_checkpoint(folder) == folder / "checkpoint-2"
    shutil.copy(weights.parent / parts[0], weights.parent / parts[1])
    assert last_complete_checkpoint(folder) == folder / "checkpoint-4"
