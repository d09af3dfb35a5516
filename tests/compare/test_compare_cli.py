import compare_fakes
import pytest

from gradloc.cli import main
from gradloc.compare.results import read_records

SMALL = """
world: {kind: toy}
budget_tokens: 2048
seeds: [0]
learning_rates: [0.001]
methods: {vanilla: }
"""


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(autouse=True)
def _fakes(monkeypatch, tmp_path):
    monkeypatch.setattr("gradloc.compare.schedule.RUNNER", compare_fakes.RUNNER)
    monkeypatch.chdir(tmp_path)


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = capsys.readouterr().out
    assert "gradloc compare experiments/tiny.yaml --processes 2" in shown
    assert "goes on with what is missing" in " ".join(shown.split())


def test_a_grid_from_its_plan_to_its_end(config_file, tmp_path, capsys):
    path = config_file(SMALL.replace("{vanilla: }", "{vanilla: , raises: , more: }"))
    assert main(["compare", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "vanilla lr=0.001 seed=0 draw=0  missing" in shown
    assert "missing: 3 runs of 2,048 tokens, 6,144 tokens" in shown
    assert "known once the first run is done" in shown
    assert not (tmp_path / "grid").exists()

    where = ["--model", "base.gguf", "--data", "texts"]
    assert main(["compare", str(path), "--only", "vanilla", "raises", *where]) == 1
    shown = capsys.readouterr().out
    assert "1 of 2 runs are done: grid/results.jsonl" in shown
    assert "1 failed; the same command tries again:" in shown
    assert "raises lr=0.001 seed=0 draw=0: ValueError: no luck" in shown
    assert shown.endswith("tables and charts: gradloc report grid\n")
    records = read_records(tmp_path / "grid/results.jsonl")
    assert records[-1]["places"] == {"model": "base.gguf", "data": "texts"}

    assert main(["compare", str(path), "--dry-run", "--processes", "2"]) == 0
    shown = capsys.readouterr().out
    assert "vanilla lr=0.001 seed=0 draw=0  learn 0." in shown
    assert "raises lr=0.001 seed=0 draw=0   failed: ValueError: no luck" in shown
    assert "they may take 2 s with --processes 2" in shown  # two of 2 s each

    elsewhere = ["--output", str(tmp_path / "other" / "run")]
    assert main(["compare", str(path), "--only", "more", *elsewhere]) == 0
    assert "1 of 1 runs are done" in capsys.readouterr().out


def test_a_mistake_is_one_line(config_file, capsys):
    path = config_file(SMALL.replace("vanilla: ", "vanilla: {lore: }"))
    assert main(["compare", str(path)]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"gradloc: error: {path}: methods: vanilla: unknown key 'lore'")
    assert "\n" not in line
