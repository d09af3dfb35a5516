"""`gradloc train`: the optimizer's options, and what it says of plan changes."""

import json
import logging

import pytest

from gradloc.cli import main


@pytest.fixture
def command(model_folder, text_file, tmp_path):
    return [
        *("train", "--model", str(model_folder), "--corpus", str(text_file), "--device", "cpu"),
        *("--output", str(tmp_path / "run"), "--block-size", "16", "--max-steps", "4"),
        *("--batch-size", "2", "--policy", "random", "--random-layers", "2"),
        *("--retrace-every", "2"),
    ]


def test_options_of_the_optimizer(command, tmp_path, capsys):
    options = ["--on-freeze", "drop", "--state-dtype", "bfloat16", "--stochastic-rounding"]
    assert main([*command, *options]) == 0
    said = capsys.readouterr()
    record = json.loads((tmp_path / "run/training.json").read_text())
    settings = record["settings"]
    assert settings["on_freeze"] == "drop"
    assert settings["state_dtype"] == "bfloat16"
    assert settings["stochastic_rounding"] is True
    # Two bytes for each of two moments, of the layers of the last plan only.
    from gradloc import LayerMap
    from gradloc.models import load_model

    model, _ = load_model(tmp_path / "run/final")
    sizes = {layer.name: layer.num_elements for layer in LayerMap.from_model(model)}
    assert record["optimizer_bytes"] == 4 * sum(sizes[name] for name in record["active_layers"])
    # One line for each plan that came into force, at steps 0 and 2.
    shown = said.err.replace("\r", "\n").splitlines()  # the progress bar overwrites its line
    lines = [line for line in shown if line.startswith("gradloc: ")]
    assert len(lines) == 2, said.err
    assert all("2 of 7 layers" in line for line in lines), lines
    assert not logging.getLogger("gradloc").handlers


def test_quiet_says_nothing_of_plans(command, capsys):
    assert main([*command, "--quiet"]) == 0
    assert "gradloc: " not in capsys.readouterr().err


def test_resuming_with_another_option_is_refused(command, capsys):
    assert main([*command, "--quiet", "--on-freeze", "keep"]) == 0
    assert main([*command, "--quiet", "--on-freeze", "drop", "--resume"]) == 2
    assert "on_freeze='drop' (was 'keep')" in capsys.readouterr().err
