import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from gradloc import GradientProfile, LayerMap, LayerPlan, __version__
from gradloc.cli import main
from gradloc.cli.arguments import read_all_probes
from gradloc.models import load_model


@pytest.fixture
def train_arguments(model_folder, text_file, tmp_path):
    return [
        *("train", "--model", str(model_folder), "--corpus", str(text_file)),
        *("--output", str(tmp_path / "run"), "--block-size", "16", "--max-steps", "4"),
        *("--batch-size", "2", "--lr", "1e-3", "--save-steps", "2", "--quiet", "--device", "cpu"),
    ]


@pytest.fixture
def trace_arguments(model_folder, text_file, probe_file, tmp_path):
    return [
        *("trace", "--model", str(model_folder), "--probes", str(probe_file), "--device", "cpu"),
        *("--reference", str(text_file), "--reference-batches", "2", "--batch-size", "4"),
        *("--max-length", "32", "--output", str(tmp_path / "profile.json")),
    ]


def error_of(capsys, arguments):
    """The one line of an error, and that nothing else was on stderr but progress."""
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("gradloc: error: ")
    return line.removeprefix("gradloc: error: ")


def test_trace_train_evaluate(
    trace_arguments, train_arguments, model_folder, text_file, probe_file, tmp_path, capsys
):
    """The main job, command by command, each reading what the one before wrote."""
    assert main(trace_arguments) == 0
    shown = capsys.readouterr().out
    assert "transformer.h.1.mlp" in shown
    assert "6 updated, 4 new" in shown
    profile = GradientProfile.load(tmp_path / "profile.json")
    assert profile.kinds == ("updated", "new")
    assert profile.available_reference_losses == ("all", "matched-spans")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")

    choice = ["--profile", str(tmp_path / "profile.json"), "--threshold", "top-k:2"]
    assert main([*train_arguments, *choice]) == 0
    shown = capsys.readouterr().out
    assert "trained 2 of 7 layers" in shown
    run = tmp_path / "run"
    plan = LayerPlan.load(run / "plan.json")
    best = sorted(profile.relative, key=profile.relative.get)[-2:]
    assert set(plan.active) == set(best)
    before, _ = load_model(model_folder)
    after, _ = load_model(run / "final")
    layers = LayerMap.from_model(before)
    old = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        moved = not torch.equal(parameter, old[name])
        assert moved == (layers.names[layers.index(name)] in plan.active), name
    record = json.loads((run / "training.json").read_text())
    assert record["about"]["model"] == str(model_folder)
    assert record["num_steps"] == 4

    scores = []
    for model in (model_folder, run / "final"):
        arguments = ["evaluate", "--model", str(model), "--probes", str(probe_file)]
        arguments += ["--text", str(text_file), "--max-length", "32", "--device", "cpu"]
        assert main([*arguments, "--output", str(tmp_path / "scores.json")]) == 0
        shown = capsys.readouterr().out
        assert "ordinary text" in shown
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
        nll = scores[-1]["probes"]["new"]["nll"]
        assert f"{nll:.3f}" in shown
    assert scores[1]["text"]["nll"] < scores[0]["text"]["nll"], "training did not help"
    assert [score["probes"]["updated"]["num_probes"] for score in scores] == [6, 6]


def test_train_traces_on_the_spot(train_arguments, probe_file, text_file, tmp_path, capsys):
    choice = ["--probes", str(probe_file), "--reference", str(text_file), "--max-length", "32"]
    choice += ["--reference-batches", "2", "--kinds", "new", "--policy", "scale"]
    choice += ["--retrace-every", "3", "--reference-loss", "matched-spans"]
    assert main([*train_arguments, *choice]) == 0
    assert "trained 7 of 7 layers (100%" in capsys.readouterr().out
    profile = GradientProfile.load(tmp_path / "run/profile.json")
    assert profile.step == 3
    relative = profile.relative_by_kind["new"]
    mean = sum(relative.values()) / len(relative)
    plan = LayerPlan.load(tmp_path / "run/plan.json")
    for name, ratio in relative.items():
        assert plan.scales[name] == pytest.approx(ratio / mean, rel=1e-6)


def test_train_by_a_plan_and_at_random(train_arguments, model_folder, tmp_path, capsys):
    names = LayerMap.from_model(load_model(model_folder)[0], granularity="block").names
    plan = LayerPlan({name: float(name.endswith("h.0")) for name in names})
    plan.save(tmp_path / "mine.json")
    by_plan = ["--plan", str(tmp_path / "mine.json"), "--granularity", "block"]
    assert main([*train_arguments, *by_plan]) == 0
    assert LayerPlan.load(tmp_path / "run/plan.json").scales == plan.scales
    drawn = ["--policy", "random", "--random-layers", "3", "--overwrite", "--seed", "4"]
    assert main([*train_arguments, *drawn]) == 0
    assert len(LayerPlan.load(tmp_path / "run/plan.json").active) == 3
    assert "trained 3 of 7 layers" in capsys.readouterr().out


def test_a_run_killed_for_good_resumes_to_the_same_model(train_arguments, tmp_path):
    """SIGKILL, in a process of its own, at some step after a checkpoint: as a cluster does it."""
    common = [*train_arguments, "--policy", "random", "--retrace-every", "50"]
    common += ["--max-steps", "240", "--save-steps", "60", "--output"]
    assert main([*common, str(tmp_path / "whole")]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "gradloc.cli", *common, str(tmp_path / "killed")],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("killed/checkpoint-*/plan.json")):
            assert process.poll() is None, "ended by itself"
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed/checkpoint-240").exists(), "killed too late to show anything"
    assert main([*common, str(tmp_path / "killed"), "--resume"]) == 0
    whole, _ = load_model(tmp_path / "whole/final")
    again, _ = load_model(tmp_path / "killed/final")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_kinds_and_numbers_of_probes(probe_file, tmp_path):
    import argparse

    odd = tmp_path / "a=b.jsonl"
    odd.write_text(probe_file.read_text())

    def read(*files, most=None, seed=0):
        arguments = argparse.Namespace(
            probes=[str(f) for f in files], dates=None, max_probes=most, seed=seed
        )
        return read_all_probes(arguments)

    assert {kind: len(ps) for kind, ps in read(f"other={probe_file}").items()} == {"other": 10}
    assert set(read(odd)) == {"updated", "new"}
    few = read(probe_file, most=3)
    assert {kind: len(ps) for kind, ps in few.items()} == {"updated": 3, "new": 3}
    assert few == read(probe_file, most=3)
    assert any(few != read(probe_file, most=3, seed=seed) for seed in range(1, 5))
    everything = read(probe_file)["updated"]
    assert [p for p in everything if p in few["updated"]] == few["updated"], "order lost"


def test_errors_are_one_line(train_arguments, trace_arguments, model_folder, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty" in error_of(capsys, [*trace_arguments, "--probes", str(empty)])
    assert nowhere in error_of(capsys, [*trace_arguments, "--probes", nowhere])
    assert nowhere in error_of(capsys, [*trace_arguments, "--reference", nowhere])
    message = error_of(capsys, [*trace_arguments, "--max-length", "65"])
    assert message == "--max-length 65: the model reads at most 64 tokens"
    empty_folder = str(tmp_path)
    assert "not a model folder" in error_of(capsys, [*trace_arguments, "--model", empty_folder])
    blocked = str(empty / "deeper" / "profile.json")
    assert "cannot make the folder" in error_of(capsys, [*trace_arguments, "--output", blocked])
    assert "nothing to evaluate" in error_of(capsys, ["evaluate", "--model", str(model_folder)])
    assert "no complete checkpoint" in error_of(
        capsys, [*train_arguments, "--policy", "all", "--resume"]
    )
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


CONTRADICTIONS = {
    "nothing": ([], "nothing says which layers train"),
    "unmade": (["--policy", "freeze"], "--policy freeze needs --profile, or --probes"),
    "half": (["--probes", "p.jsonl"], "needs both --probes and --reference"),
    "plan and policy": (["--plan", "p", "--policy", "all"], "--plan says what trains, so --policy"),
    "both": (
        ["--profile", "p", "--probes", "q", "--reference", "r"],
        "give the profile, or the probes",
    ),
    "threshold": (["--policy", "all", "--threshold", "0"], "--threshold is for --policy freeze"),
    "normaliser": (
        ["--policy", "freeze", "--profile", "p", "--normaliser", "max"],
        "--normaliser is for --policy scale",
    ),
    "profile": (["--policy", "random", "--profile", "p"], "--profile is for --policy freeze or"),
    "quantile": (["--profile", "p", "--threshold", "quantile:2"], "quantile"),
    "steps": (["--policy", "all", "--max-steps", "0"], "max_steps=0: at least 1"),
    "retrace": (["--policy", "random", "--retrace-every", "0"], "every=0"),
    "retrace all": (
        ["--policy", "all", "--retrace-every", "5"],
        "--retrace-every is for --policy freeze or scale or random, not all",
    ),
    "retrace without probes": (
        ["--profile", "p", "--retrace-every", "5"],
        "give --probes and --reference beside --profile, or leave --retrace-every out",
    ),
    "retrace with half": (
        ["--profile", "p", "--retrace-every", "5", "--reference", "r"],
        "needs both --probes and --reference",
    ),
    "plan and two more": (
        ["--plan", "p", "--retrace-every", "0", "--threshold", "0"],
        "so --threshold and --retrace-every cannot",
    ),
    "loss of all": (
        ["--policy", "all", "--reference-loss", "matched-spans"],
        "--reference-loss is for --policy freeze or scale, not all",
    ),
}
IGNORED = {
    "--dates": "2019:2020",
    "--max-probes": "3",
    "--max-length": "32",
    "--reference": "r.txt",
    "--reference-batches": "3",
    "--trace-batch-size": "3",
}
for _flag, _value in IGNORED.items():
    CONTRADICTIONS[f"plan {_flag}"] = (["--plan", "p", _flag, _value], f"so {_flag} cannot")
    for _policy in ("all", "random"):
        CONTRADICTIONS[f"{_policy} {_flag}"] = (
            ["--policy", _policy, _flag, _value],
            f"{_flag} is for --policy freeze or scale, not {_policy}",
        )
    CONTRADICTIONS[f"profile {_flag}"] = (
        ["--profile", "p", _flag, _value],
        f"{_flag}: --profile is traced already",
    )
for _flag, _value in {
    "--threshold": "0",
    "--kinds": "new",
    "--random-layers": "2",
    "--normaliser": "max",
    "--reference-loss": "matched-spans",
    "--probes": "p.jsonl",
    "--profile": "p.json",
}.items():
    CONTRADICTIONS[f"plan {_flag}"] = (["--plan", "p", _flag, _value], f"so {_flag} cannot")


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_cannot_go_together(train_arguments, tmp_path, capsys, monkeypatch, name):
    def load(arguments):
        raise AssertionError("the model must not be loaded")

    monkeypatch.setattr("gradloc.cli.arguments.load", load)
    extra, message = CONTRADICTIONS[name]
    assert message in error_of(capsys, [*train_arguments, *extra])
    assert not (tmp_path / "run").exists()


def test_a_profile_serves_with_another_reference_loss(trace_arguments, train_arguments, tmp_path):
    assert main(trace_arguments) == 0
    choice = ["--profile", str(tmp_path / "profile.json"), "--reference-loss", "matched-spans"]
    assert main([*train_arguments, *choice]) == 0
    profile = GradientProfile.load(tmp_path / "profile.json").with_reference("matched-spans")
    mean = sum(profile.relative.values()) / len(profile.relative)
    above = [name for name, ratio in profile.relative.items() if ratio > mean]
    assert LayerPlan.load(tmp_path / "run/plan.json").active == tuple(above)


def test_a_profile_of_patterns(trace_arguments, train_arguments, tmp_path, capsys):
    assert main(trace_arguments) == 0
    profile = GradientProfile.load(tmp_path / "profile.json")
    dataclasses.replace(profile, granularity="patterns").save(tmp_path / "patterns.json")
    choice = ["--profile", str(tmp_path / "patterns.json")]
    message = error_of(capsys, [*train_arguments, *choice])
    assert "patterns.json was traced with patterns" in message
    assert "gradloc.training.train.train" in message
    assert not (tmp_path / "run/training.json").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--plot", "{}/heat.docx"], "heat.docx: choose a suffix of"),
        (["--output", "{}/x.png"], "x.png: the heatmap would have the same name"),
        (["--output", "{}/x.svg", "--plot", "{}/../{name}/x.svg"], "would have the same name"),
        (["--plot", "{}"], "is a folder: add a file name"),
        (["--output", "{}/taken.json", "--no-plot"], "taken.json' is a folder: add a file name"),
        (["--plot", "{}/x.png", "--no-plot"], "--plot and --no-plot: drop one"),
    ],
)
def test_files_of_a_trace(trace_arguments, tmp_path, capsys, monkeypatch, extra, message):
    def read(arguments):
        raise AssertionError("no work before the check")

    monkeypatch.setattr("gradloc.cli.arguments.read_all_probes", read)
    (tmp_path / "taken.json").mkdir()
    filled = [text.format(tmp_path, name=tmp_path.name) for text in extra]
    assert message in error_of(capsys, [*trace_arguments, *filled])
    assert [path.name for path in tmp_path.iterdir()] == ["taken.json"]


def test_other_formats_of_the_heatmap(trace_arguments, tmp_path):
    assert main([*trace_arguments, "--plot", str(tmp_path / "heat.SVG")]) == 0
    assert "<svg" in (tmp_path / "heat.SVG").read_text()
    assert len(GradientProfile.load(tmp_path / "profile.json").names) == 7


def test_nothing_about_the_loss_type(
    trace_arguments, train_arguments, model_folder, text_file, probe_file
):
    """In a process of its own, as pytest takes the logs; the cache says it once a process."""
    evaluate = ["evaluate", "--model", str(model_folder), "--probes", str(probe_file)]
    evaluate += ["--text", str(text_file), "--max-length", "32", "--device", "cpu"]
    commands = [trace_arguments, [*train_arguments, "--policy", "all"], evaluate]
    # Then under other names, as other versions of transformers may log it.
    code = (
        "import json, sys; from gradloc.cli import main; from transformers.utils import logging\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    logging.warning_once.cache_clear()\n"
        "    assert main(command) == 0\n"
        "for name in ('transformers.modeling_utils', 'transformers.models.gpt2', 'transformers'):\n"
        "    logging.get_logger(name).warning('In here `loss_type=None` was set')\n"
        "    logging.get_logger(name).warning(f'another of {name}')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "loss_type" not in process.stderr + process.stdout
    assert process.stderr.count("another of transformers") == 3, process.stderr


@pytest.mark.parametrize(
    "wrong", [["--threshold", "median"], ["--dates", "2019"], ["--max-probes", "0"], ["--lr", "x"]]
)
def test_wrong_usage(train_arguments, capsys, wrong):
    with pytest.raises(SystemExit, match="2"):
        main([*train_arguments, *wrong])
    assert wrong[1] in capsys.readouterr().err


def test_debug_shows_the_traceback(model_folder):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        main(["evaluate", "--model", str(model_folder), "--debug"])


def test_ctrl_c_is_not_an_error(monkeypatch, capsys, trace_arguments):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gradloc.cli.arguments.load", stop)
    assert main(trace_arguments) == 130
    assert capsys.readouterr().err == "gradloc: stopped\n"


@pytest.mark.parametrize("command", ["demo", "trace", "train", "interpolate", "evaluate", "doctor"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert f"example:\n  gradloc {command}" in shown


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"gradloc {__version__}\n"


def test_doctor_says_what_runs(capsys):
    assert main(["doctor"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    lines = {name: value.strip() for name, value in lines.items()}
    assert lines["torch"] == torch.__version__
    assert lines["gradloc"] == __version__
    assert lines["threads"].startswith(f"{torch.get_num_threads()} ")
    from gradloc import ops

    assert lines["CPU backend"].startswith(ops.build_info()["simd"])
    assert lines["CUDA backend"]
    if not torch.cuda.is_available():
        assert lines["CUDA devices"].startswith("none: ")
