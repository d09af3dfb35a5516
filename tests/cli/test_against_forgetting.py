"""`gradloc train --keep` and `gradloc interpolate`, against the functions that they stand for."""

import json
import math

import pytest
import torch

from gradloc.cli import main
from gradloc.models import load_model
from gradloc.plan import LayerPlan
from gradloc.training.config import TrainConfig
from gradloc.training.corpus import packed_corpus
from gradloc.training.mixing import Replay, mixed_rows
from gradloc.training.train import train


@pytest.fixture
def keep_file(tmp_path, text_file):
    """Other lines than the corpus has."""
    path = tmp_path / "keep.txt"
    lines = text_file.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"old {line}\n" for line in reversed(lines[:60])), encoding="utf-8")
    return path


@pytest.fixture
def arguments(model_folder, text_file, keep_file, tmp_path):
    return [
        *("train", "--model", str(model_folder), "--corpus", str(text_file), "--policy", "all"),
        *("--keep", str(keep_file), "--output", str(tmp_path / "run"), "--block-size", "16"),
        *("--batch-size", "2", "--lr", "1e-3", "--save-steps", "50", "--quiet"),
        *("--device", "cpu", "--seed", "3"),
    ]


def error_of(capsys, given):
    assert main(given) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def parameters(folder):
    return dict(load_model(folder)[0].named_parameters())


def test_replay_is_that_of_python(arguments, model_folder, text_file, keep_file, tmp_path, capsys):
    assert main([*arguments, "--max-steps", "5", "--replay-ratio", "0.5"]) == 0
    assert "keep: 60 documents" in capsys.readouterr().out
    record = json.loads((tmp_path / "run/training.json").read_text())
    assert record["about"]["keep"] == [str(keep_file)]
    assert record["about"]["replay_ratio"] == 0.5

    model, tokenizer = load_model(model_folder)
    new, keep = (packed_corpus(path, tokenizer, block_size=16) for path in (text_file, keep_file))
    rows = mixed_rows(new, keep, mix=Replay(0.5), num_rows=10, seed=3)
    assert rows.num_keep_rows == 3
    config = TrainConfig(
        output=tmp_path / "twin",
        max_steps=5,
        learning_rate=1e-3,
        batch_size=2,
        shuffle=False,
        seed=3,
        device="cpu",
        progress=False,
    )
    plan = LayerPlan.load(tmp_path / "run/plan.json")
    train(model, tokenizer, rows, config, plan=plan)
    twin = dict(model.named_parameters())
    for name, value in parameters(tmp_path / "run/final").items():
        assert torch.equal(value, twin[name]), name


def test_epochs_count_new_rows_and_the_old_ones_among_them(
    arguments, model_folder, text_file, tmp_path
):
    assert main([*arguments, "--epochs", "0.5"]) == 0
    record = json.loads((tmp_path / "run/training.json").read_text())
    num_new = len(packed_corpus(text_file, load_model(model_folder)[1], block_size=16))
    assert record["num_steps"] == math.ceil(math.ceil(0.5 * num_new * 2) / 2)
    assert record["about"]["replay_ratio"] == 1


def test_another_ratio_is_another_run(arguments, capsys):
    assert main([*arguments, "--max-steps", "2"]) == 0
    capsys.readouterr()
    message = error_of(
        capsys, [*arguments, "--max-steps", "2", "--resume", "--replay-ratio", "0.25"]
    )
    assert "corpus" in message


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--replay-ratio", "-1"], "ratio=-1.0: old rows for every new row, at least 0"),
        (["--replay-ratio", "nan"], "ratio=nan"),
    ],
)
def test_wrong_ratios(arguments, tmp_path, capsys, extra, message):
    assert message in error_of(capsys, [*arguments, *extra])
    assert not (tmp_path / "run").exists()


def test_a_ratio_without_old_text(arguments, keep_file, tmp_path, capsys):
    at = arguments.index("--keep")
    without = [*arguments[:at], *arguments[at + 2 :], "--replay-ratio", "1"]
    assert "give it with --keep" in error_of(capsys, without)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def trained(model_folder, tmp_path):
    """A folder with a model some way from the old one."""
    model, tokenizer = load_model(model_folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.fixture
def between(trained, model_folder, tmp_path):
    return [
        *("interpolate", "--model", str(trained), "--old", str(model_folder)),
        *("--output", str(tmp_path / "between"), "--device", "cpu"),
    ]


def test_interpolate(between, trained, model_folder, tmp_path, capsys):
    assert main([*between, "--alpha", "0.25"]) == 0
    assert capsys.readouterr().out == f"alpha 0.25: {tmp_path / 'between'}\n"
    old, new = parameters(model_folder), parameters(trained)
    for name, value in parameters(tmp_path / "between").items():
        assert not torch.equal(old[name], new[name])
        torch.testing.assert_close(value, old[name] + 0.25 * (new[name] - old[name]))


@pytest.mark.parametrize("better", ["old", "trained"])
def test_the_lowest_loss_chooses(
    between, trained, model_folder, probe_file, tmp_path, capsys, better
):
    if better == "trained":  # the two change places
        at = between.index(str(trained))
        between[at], between[at + 2] = between[at + 2], between[at]
    assert main([*between, "--alpha", "0.9", "0.1", "--probes", str(probe_file)]) == 0
    shown = capsys.readouterr().out
    alpha = 0.1 if better == "old" else 0.9
    assert f"alpha {alpha}: " in shown
    assert f"{alpha} *" in shown
    assert "updated" in shown
    assert "new" in shown
    first, second = parameters(model_folder), parameters(trained)
    for name, value in parameters(tmp_path / "between").items():
        expected = first[name] + 0.1 * (second[name] - first[name])
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--alpha", "1.5"], "--alpha 1.5: a number in [0, 1]"),
        (["--alpha", "nan"], "--alpha nan: a number in [0, 1]"),
        (["--alpha", "1", "0.5"], "2 alphas and nothing to choose by: give --probes"),
        (["--alpha", "1", "--probes", "p.jsonl"], "there is one: give several, or none"),
    ],
)
def test_what_is_refused_before_loading(between, tmp_path, capsys, monkeypatch, extra, message):
    def load(arguments):
        raise AssertionError("the model must not be loaded")

    monkeypatch.setattr("gradloc.cli.arguments.load", load)
    assert message in error_of(capsys, [*between, *extra])
    assert not (tmp_path / "between").exists()


def test_nothing_is_overwritten(between, trained, model_folder, capsys):
    at = between.index("--output") + 1
    between[at] = str(trained)
    before = (trained / "model.safetensors").read_bytes()
    assert "is there already: choose a new folder" in error_of(capsys, [*between, "--alpha", "1"])
    assert (trained / "model.safetensors").read_bytes() == before


def test_another_architecture(between, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = load_model(between[2])[1]
    other = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2))
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    between[between.index("--old") + 1] = str(tmp_path / "other")
    assert "old_weights" in error_of(capsys, [*between, "--alpha", "0.5"])
    assert not (tmp_path / "between").exists()
