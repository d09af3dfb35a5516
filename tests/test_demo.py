"""The demo: its quick form from end to end, the rules of its folder, and what its words say."""

import base64
import io
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from gradloc import GradientProfile, LayerMap, LayerPlan
from gradloc.cli import main
from gradloc.compare.material import split_by_source
from gradloc.demo import chart, findings, report, run_demo, table
from gradloc.demo.methods import FREEZE, FULL, GENTLE, METHODS, RANDOM, SCALE
from gradloc.demo.outcome import KINDS, PERIODS, Outcome, Run, Scores
from gradloc.demo.settings import QUICK
from gradloc.evaluate import ProbeScore, TextScore, evaluate_probes
from gradloc.models import load_model
from gradloc.probes import Probe, TemporalWorld, read_probes


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "out", seed=3, quick=True)


def test_every_file_is_there_and_nothing_else(demo):
    names = {path.name for path in demo.folder.iterdir()}
    plans = {f"plan-{method.name}.json" for method in METHODS}
    assert names == plans | {
        *("demo.json", "world", "base", "models"),
        *("profile.json", "profile.png", "results.json", "report.html"),
    }
    assert {path.name for path in (demo.folder / "models").iterdir()} == {
        method.name for method in METHODS
    }
    world = {path.name for path in (demo.folder / "world").iterdir()}
    assert {"old.txt", "new.txt", "reference.txt", "text_old.txt", "text_new.txt"} < world
    assert json.loads((demo.folder / "demo.json").read_text())["status"] == "finished"


def test_each_plan_is_what_its_run_trained(demo):
    base, _ = load_model(demo.folder / "base")
    before = base.state_dict()
    profile = GradientProfile.load(demo.folder / "profile.json")
    layers = LayerMap.from_model(base)
    profile.check(layers)
    for method in METHODS:
        plan = LayerPlan.load(demo.folder / f"plan-{method.name}.json")
        plan.check(layers.names)
        first = demo.outcome.of(method)[0]
        assert first.active_layers == plan.active
        trained, _ = load_model(demo.folder / "models" / method.name)
        moved = {
            layers.names[layer]
            for name, parameter, layer in layers.parameters(trained)
            if not torch.equal(parameter, before[name])
        }
        assert moved == set(plan.active)
        elements = sum(layer.num_elements for layer in layers if layer.name in plan.active)
        assert first.optimizer_bytes == 2 * 4 * elements
    freeze, control = demo.outcome.of(FREEZE), demo.outcome.of(RANDOM)
    assert set(freeze[0].active_layers) == set(profile.above_mean)
    assert 0 < len(profile.above_mean) < len(layers)
    assert {len(run.active_layers) for run in control} == {len(profile.above_mean)}
    scales = LayerPlan.load(demo.folder / "plan-tgl-alr.json").scales
    for name, ratio in profile.relative.items():
        assert scales[name] == pytest.approx(ratio / profile.mean_relative)


def test_results_hold_every_run_and_its_scores(demo):
    saved = json.loads((demo.folder / "results.json").read_text())
    assert saved["schema"] == "gradloc.results"
    assert [(run["method"], run["repeat"]) for run in saved["runs"]] == [
        (method.name, repeat) for repeat in range(QUICK.num_repeats) for method in METHODS
    ]
    # Scored again from the files: the model that was saved is the one that was scored.
    model, tokenizer = load_model(demo.folder / "models" / "full")
    probes = [
        probe for kind in KINDS for probe in split_by_source(world_of(demo).probes()[kind], 2)[1]
    ]
    again = evaluate_probes(model, tokenizer, probes, max_length=64)
    for kind in KINDS:
        stored = saved["runs"][0]["scores"]["probes"][kind]
        assert stored["nll"] == pytest.approx(again[kind].nll, rel=1e-4)
        assert stored["num_probes"] == again[kind].num_probes


def world_of(demo):
    return TemporalWorld(
        demo.outcome.seed,
        num_entities=QUICK.num_entities,
        num_new_entities=QUICK.num_new_entities,
        num_objects=QUICK.num_objects,
    )


def test_what_is_traced_is_not_what_is_scored(demo):
    for kind, probes in world_of(demo).probes().items():
        traced, scored = split_by_source(probes, 2)
        assert len(traced) + len(scored) == len(probes)
        assert not {p.source for p in traced} & {p.source for p in scored}
        assert abs(len(traced) - len(scored)) <= 2, kind
    traced_text = (demo.folder / "world/reference.txt").read_text()
    scored_text = (demo.folder / "world/text_old.txt").read_text()
    assert not set(traced_text.splitlines()) & set(scored_text.splitlines())


def test_every_traced_batch_is_whole(demo):
    profile = demo.outcome.profile
    traced = {kind: len(split_by_source(world_of(demo).probes()[kind], 2)[0]) for kind in KINDS}
    assert any(min(count, QUICK.max_probes) % QUICK.trace_batch_size for count in traced.values())
    measured = [*profile.probes.values()]
    measured += [one for by_kind in profile.references.values() for one in by_kind.values()]
    for one in measured:
        assert one.num_sequences == one.num_batches * QUICK.trace_batch_size
    for kind, count in traced.items():
        whole = min(count, QUICK.max_probes) // QUICK.trace_batch_size
        assert profile.probes[kind].num_batches == whole, kind


def test_world_files_hold_all_probes(demo):
    world = world_of(demo)
    for kind in KINDS:
        read = read_probes(demo.folder / f"world/probes-{kind}.jsonl")
        assert [p.text for p in read] == [p.text for p in world.probes()[kind]]


def test_report_is_one_whole_file(demo):
    page = demo.report.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|url\(", page)
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == 1
    encoded = sources[0].removeprefix("data:image/png;base64,")
    assert base64.b64decode(encoded) == (demo.folder / "profile.png").read_bytes()
    for row in table.table_rows(demo.outcome):
        for cell in row:
            assert cell.main in page
    for words in ("Quick form", "seed", "gradloc trace", "does not show", str(torch.__version__)):
        assert words in page
    assert "/tmp" not in page
    for tag in ("table", "section", "ul", "ol", "dl", "figure", "svg", "main", "pre", "li"):
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == page.count(f"</{tag}>"), tag


def test_a_second_demo_gives_the_same_numbers_and_leaves_other_files(demo, capsys):
    (demo.folder / "mine.txt").write_text("keep")
    (demo.folder / "models" / "mine").mkdir()
    (demo.folder / "plan-mine.json").write_text("keep")
    try:
        assert main(["demo", "--quick", "--seed", "3", "--output", str(demo.folder)]) == 0
        results = json.loads((demo.folder / "results.json").read_text())
        for run, stored in zip(demo.outcome.runs, results["runs"], strict=True):
            assert stored["scores"]["probes"]["new"]["nll"] == run.scores.nll("new")
            assert stored["scores"]["text"]["old"]["nll"] == run.scores.nll("old text")
        assert (demo.folder / "mine.txt").read_text() == "keep"
        assert (demo.folder / "plan-mine.json").read_text() == "keep"
        assert (demo.folder / "models" / "mine").is_dir()
    finally:
        (demo.folder / "mine.txt").unlink()
        (demo.folder / "plan-mine.json").unlink()
        (demo.folder / "models" / "mine").rmdir()
    shown = capsys.readouterr().out
    for method in METHODS:
        assert method.title in shown
    assert re.search(r"\[5/5\]", shown)


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="no earlier demo"):
        run_demo(tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("gradloc: error: output=")
    with pytest.raises(OSError, match="is a file"):
        run_demo(tmp_path / "thesis.tex", quick=True)
    with pytest.raises(ValueError, match="seed=-1"):
        run_demo(tmp_path / "new", seed=-1, quick=True)
    assert not (tmp_path / "new").exists()


def test_a_base_model_that_does_not_know_its_facts_stops_the_demo(tmp_path, monkeypatch):
    strict = replace(QUICK, required=0.9, base_steps=2)
    monkeypatch.setattr("gradloc.demo.run.QUICK", strict)
    with pytest.raises(ValueError, match=r"after 2 steps the base model completes only .*90%"):
        run_demo(tmp_path / "out", quick=True)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"demo.json", "world"}
    assert json.loads((tmp_path / "out/demo.json").read_text())["status"] == "running"


# What the words say, on made-up numbers.


def made_up(changes, repeats=3):
    """An outcome in which method m's losses lie `changes[m]` = (learned, forgot) above full's."""
    names = [f"layer.{number}" for number in range(12)]
    profile = GradientProfile.from_norms(
        {kind: {name: 1.0 + index for index, name in enumerate(names)} for kind in KINDS},
        dict.fromkeys(names, 1.0),
    )

    def scores(learned, forgot, repeat):
        wobble = 0.001 * repeat
        losses = {"updated": learned, "new": learned, "unchanged": forgot}
        probes = {
            kind: ProbeScore(math.exp(loss), loss + wobble, math.exp(-loss), 10, 20)
            for kind, loss in losses.items()
        }
        text = {period: TextScore(math.e, 1.0, 100) for period in PERIODS}
        return Scores(probes, text)

    runs = []
    for repeat in range(repeats):
        for method in METHODS:
            learned, forgot = changes.get(method, (0.0, 0.0))
            # Beside full's own wobble, differences within a run wobble a little too.
            shift = 0.0 if method == FULL else 0.004 * (repeat - 1)
            measured = scores(1.0 + learned + shift, 1.0 + forgot + shift, repeat)
            runs.append(Run(method.name, repeat, tuple(names), 1.0, 800_000, 14.4, measured))
    return Outcome(
        seed=0,
        quick=False,
        base=scores(4.0, 0.1, 0),
        base_accuracy=0.97,
        base_steps=900,
        num_old_facts=240,
        runs=tuple(runs),
        profile=profile,
        settings={**vars(QUICK), "num_repeats": repeats},
        machine={"torch": "2.6"},
        seconds=100.0,
    )


def sentence(outcome, begin):
    return next(words for words in findings.findings(outcome) if words.startswith(begin))


@pytest.mark.parametrize(
    ("learned", "forgot", "expected"),
    [
        (0.5, -0.4, ("learned less", "forgot less", "A trade: less learned")),
        (-0.5, 0.4, ("learned more", "forgot more", "A trade: more learned")),
        (-0.5, -0.4, ("learned more", "forgot less", "Better on facts, here.")),
        (0.0, -0.4, ("learned about as much", "forgot less", "Better on facts, here.")),
        (0.5, 0.4, ("learned less", "forgot more", "Worse on facts, here.")),
        (0.5, 0.0, ("learned less", "forgot about as much", "Worse on facts, here.")),
        (0.0, 0.0, ("learned about as much", "forgot about as much", "No clear difference")),
    ],
)
def test_sentences_follow_from_the_numbers(learned, forgot, expected):
    words = sentence(made_up({FREEZE: (learned, forgot)}), "TGL + FP against full AdamW:")
    for part in expected:
        assert part in words
    assert f"{learned:+.2f} ± 0.00".replace("-", "−") in words or learned == 0


def test_cost_is_said_in_numbers():
    outcome = made_up({})
    less = [replace(run, optimizer_bytes=400_000, seconds=7.2) for run in outcome.of(FREEZE)]
    others = [run for run in outcome.runs if run.method != FREEZE.name]
    words = sentence(replace(outcome, runs=(*less, *others)), "TGL + FP needed")
    assert "needed 0.40 MB of optimizer memory, full AdamW 0.80 MB" in words
    assert "took 0.50 times as long" in words
    assert "TGL + ALR needed as much optimizer memory as full AdamW" in words


def test_the_control_decides_whether_the_choice_mattered():
    same = made_up({FREEZE: (0.5, -0.4), RANDOM: (0.5, -0.4)})
    assert "do not show that it matters" in sentence(same, "TGL + FP against as many random layers")
    better = made_up({FREEZE: (0.5, -0.4), RANDOM: (0.9, 0.1)})
    words = sentence(better, "TGL + FP against as many random layers")
    assert "Better on facts, here." in words
    assert "do not show" not in words


def test_half_the_learning_rate_is_a_control():
    words = sentence(
        made_up({FREEZE: (0.5, -0.4), GENTLE: (0.6, 0.1)}),
        "TGL + FP against full AdamW at half the learning rate",
    )
    assert "Better on facts, here." in words
    assert "−0.10 ± 0.00" in words
    assert "−0.50 ± 0.00" in words


def test_scale_is_compared_too():
    words = sentence(made_up({SCALE: (-0.3, -0.2)}), "TGL + ALR against full")
    assert "learned more" in words
    assert "−0.30 ± 0.00" in words


def test_one_run_is_not_judged():
    words = findings.findings(made_up({FREEZE: (0.5, -0.4)}, repeats=1))
    assert len(words) == 2
    assert "not judged" in words[1]


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.1, 0.1, 0.1], 1),
        ([-0.1, -0.2, -0.15], -1),
        ([0.1, -0.1, 0.4], 0),  # the runs disagree
        ([0.01, 0.8, 0.02], 0),  # one run alone
        ([0.01, 0.01, 0.01], 0),  # too small to matter
    ],
)
def test_verdict(differences, expected):
    assert findings.verdict(differences) == expected


def test_table_shows_means_over_runs():
    outcome = made_up({FREEZE: (0.5, -0.4)})
    rows = {row[0].main: row for row in table.table_rows(outcome)}
    assert rows["Before"][2].main == f"{math.exp(-4):.0%}"
    # Three runs: 1.5 + (−0.004, 0.001, 0.006).
    assert rows["TGL + FP"][2].small == "1.50 ± 0.01"
    assert rows["TGL + FP"][4].main == f"{math.exp(-0.6):.0%}"
    assert rows["Full AdamW"][5].main == "2.72"
    assert rows["Full AdamW"][7].main == "0.80 MB"
    assert rows["Full AdamW"][8].main == "14 s"


def test_table_fits_a_terminal():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table.rich_table(made_up({})))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert any(line.startswith("Random ") for line in lines)


def test_numbers_that_are_not_finite_become_null():
    outcome = made_up({})
    bad = replace(outcome.base, text={p: TextScore(math.inf, math.nan, 1) for p in PERIODS})
    content = replace(outcome, base=bad).to_json()
    assert json.dumps(content, allow_nan=False)
    assert content["base"]["scores"]["text"]["old"]["nll"] is None
    assert table.table_rows(replace(outcome, base=bad))[0][5].main == "n/a"


def test_chart_without_a_finite_loss():
    lost = made_up({method: (math.nan, math.inf) for method in METHODS})
    runs = [run for run in lost.runs if run.method != FULL.name]
    full = [run for run in made_up({}).runs if run.method == FULL.name]
    drawn = chart.trade_off_svg(replace(lost, runs=(*runs, *full)))
    assert FULL.title in drawn
    assert FREEZE.title not in drawn
    assert "nan" not in drawn
    assert "nothing to draw" in chart.trade_off_svg(replace(lost, runs=tuple(runs)))


def test_chart_places_better_points_up_and_to_the_right():
    drawn = chart.trade_off_svg(made_up({FREEZE: (-0.5, -0.4)}))
    places = {
        colour: (float(x), float(y))
        for x, y, colour in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="6.5" fill="(#\w+)"', drawn)
    }
    better, full = places[chart.COLOURS[FREEZE.name]], places[chart.COLOURS[FULL.name]]
    assert better[0] > full[0]
    assert better[1] < full[1]  # SVG counts from the top


def test_report_says_what_the_findings_say():
    outcome = made_up({FREEZE: (0.5, -0.4)})
    page = report.report_html(outcome, b"\x89PNG")
    for words in findings.findings(outcome):
        assert words in page
    assert "Quick form" not in page
    assert "97% of the old facts" in page


def test_split_keeps_the_probes_of_a_fact_together():
    probes = [Probe("a b", ((2, 3),), "new", source) for source in "xxyyzz"]
    traced, scored = split_by_source(probes, 2)
    assert [p.source for p in traced] == list("xxzz")
    assert [p.source for p in scored] == list("yy")
