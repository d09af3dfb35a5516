"""What `gradloc trace` and `train` trace: batches of equally many sequences; stderr says how."""

import json

import pytest
import torch
from conftest import fact, sentences

from gradloc import GradientProfile
from gradloc.cli import main
from gradloc.cli import trace as command


@pytest.fixture
def traced(model_folder, tmp_path, capsys):
    """Writes probes and text, traces, and gives the profile and the notes on stderr."""

    def run(counts, *options, num_lines=120):
        probes, text = tmp_path / "probes.jsonl", tmp_path / "text.txt"
        rows = []
        for kind, count in counts.items():
            for index in range(count):
                line, town = fact(index % 10, shift=index // 10)
                start = line.index(town)
                rows.append({"text": line, "spans": [[start, start + len(town)]], "kind": kind})
        probes.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        text.write_text("\n".join(sentences(num_lines, seed=1)) + "\n", encoding="utf-8")
        arguments = ["trace", "--model", str(model_folder), "--device", "cpu", "--no-plot"]
        arguments += ["--probes", str(probes), "--reference", str(text), "--max-length", "32"]
        assert main([*arguments, "--output", str(tmp_path / "profile.json"), *options]) == 0
        said = capsys.readouterr().err.splitlines()
        lines = [line for line in said if line.startswith("tracing: ") and "batch/s" not in line]
        notes = [line.removeprefix("tracing: ") for line in lines]
        return GradientProfile.load(tmp_path / "profile.json"), notes

    return run


def shape(measurement):
    return measurement.num_batches, measurement.num_sequences


def test_an_incomplete_last_batch_changes_nothing(traced):
    profile, notes = traced({"new": 17, "old": 16}, "--reference-batches", "2")
    assert notes == ["left out 1 of the 17 sequences of the 'new' probes: they fill no batch of 8"]
    assert {kind: shape(one) for kind, one in profile.probes.items()} == {
        "new": (2, 16),
        "old": (2, 16),
    }
    assert shape(profile.references["all"]["new"]) == (2, 16)
    # The two kinds are the same 16 probes, but for the one left out.
    for name in profile.names:
        assert profile.probe_norms["new"][name] == profile.probe_norms["old"][name], name


def test_a_reference_that_ends_in_an_incomplete_batch(traced):
    profile, notes = traced({"new": 4}, "--batch-size", "4", "--max-length", "64", num_lines=40)
    batches, sequences = shape(profile.references["all"]["new"])
    assert sequences == 4 * batches
    assert len(notes) == 1
    assert notes[0].startswith("left out ")
    assert notes[0].endswith("sequences of the reference: they fill no batch of 4")


def test_fewer_probes_than_a_batch(traced):
    profile, notes = traced({"new": 9, "old": 3}, "--reference-batches", "2")
    assert notes == ["sequences a batch: 3 and not 8, as there are no more in the 'old' probes"]
    assert {kind: shape(one) for kind, one in profile.probes.items()} == {
        "new": (3, 9),
        "old": (1, 3),
    }
    assert shape(profile.references["matched-spans"]["old"]) == (2, 6)


def test_less_text_than_a_batch(traced):
    profile, notes = traced({"new": 4}, "--batch-size", "4", "--max-length", "64", num_lines=8)
    size = profile.references["all"]["new"].num_sequences
    assert 1 <= size < 4
    assert f"sequences a batch: {size} and not 4, as there are no more in the reference" in notes
    assert profile.probes["new"].num_sequences == 4 // size * size


def test_train_traces_the_same_batches(
    model_folder, text_file, probe_file, tmp_path, capsys, monkeypatch
):
    """Its option is another, and six and four probes make no whole batch of eight."""
    seen = []
    whole = command.tracing_batches

    def keep(*arguments):
        seen.append(whole(*arguments))
        return seen[-1]

    monkeypatch.setattr("gradloc.cli.train.tracing_batches", keep)
    arguments = ["train", "--model", str(model_folder), "--corpus", str(text_file)]
    arguments += ["--output", str(tmp_path / "run"), "--block-size", "16", "--max-steps", "1"]
    arguments += ["--probes", str(probe_file), "--reference", str(text_file), "--device", "cpu"]
    arguments += ["--max-length", "32", "--reference-batches", "2", "--quiet"]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "sequences a batch: 4 and not 8, as there are no more in the 'new' probes" in said
    ((batches, reference),) = seen
    every = [*batches["updated"], *batches["new"], *reference]
    assert [len(batch["labels"]) for batch in every] == [4, 4, 4, 4]
    assert all(isinstance(batch["labels"], torch.Tensor) for batch in every)
