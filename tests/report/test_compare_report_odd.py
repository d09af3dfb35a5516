"""Comparisons that are not as neat as one would like: diverged, uneven, failed, with adapters."""

import json
import math

import compare_records as made
import pytest
from compare_records import analysed, of, runs_of

from gradloc.compare.grid import cells
from gradloc.compare.results import FAILURES_FILE, append_record
from gradloc.report import frontier_chart, loss_chart
from gradloc.report.analysis import RATES, analyse
from gradloc.report.cost_tables import cost_table, time_ratios, whole_run
from gradloc.report.findings import findings
from gradloc.report.frontier_points import mean_points, not_drawn, overview_seeds
from gradloc.report.loss_chart import mean_losses
from gradloc.report.page import report_html
from gradloc.report.read import read_run
from gradloc.report.runs import Method, divergence_limit
from gradloc.report.summary import summary
from gradloc.report.tables import perplexity_table
from gradloc.report.verdicts import Standing, standing
from gradloc.report.words import share_of_weights

TWO = {name: made.METHODS[name] for name in ("vanilla", "replay")}


def figures(monkeypatch, analysis):
    """The overview, the multiples and the training losses, not yet turned into bytes."""
    for module in (frontier_chart, loss_chart):
        monkeypatch.setattr(module, "as_png", lambda figure: figure)
    return (
        frontier_chart.frontier_overview(analysis, "forget"),
        frontier_chart.frontier_multiples(analysis, "forget"),
        loss_chart.loss_curves(analysis),
    )


def diverge(records):
    """Seed 1 of replay, at every rate and weight, with a loss that is finite and means nothing."""
    for record in runs_of(records, "replay"):
        record["losses"][-1][1] = 7e9  # for a moment, in the other seeds
    for record in runs_of(records, "replay", seed=1):
        record["losses"] = [[step, 7e9] for step, _ in record["losses"]]
        for entry in record["scores"].values():
            entry["probes"]["unchanged"].update(nll=5e10, perplexity=None)


def test_a_run_that_diverged_counts_as_one_without_numbers(monkeypatch):
    analysis = analysed(TWO, change=diverge)
    row = of(analysis, "replay")
    assert row.diverged() == [1]
    for measure in ("learn", "forget", "text", "perplexity text old"):
        assert sorted(row.finite(measure)) == [0, 2]
    assert standing(analysis.matched[row.key, "forget", RATES]) is Standing.UNKNOWN
    assert sorted(analysis.curves["replay", "forget", RATES]) == [0, 2]
    assert mean_losses(row) == mean_losses(row, [0, 2]) != []
    for figure in figures(monkeypatch, analysis):
        for axes in figure.axes:
            assert max(map(abs, (*axes.get_xlim(), *axes.get_ylim()))) < 200
    said = findings(analysis)
    sentence = next(s for s in said if s.startswith("Diverged: 3 runs"))
    assert f"above {analysis.results.limit:.1f} nats" in sentence
    assert "replay lr=0.001 seed=1 draw=0" in sentence
    assert "only" not in sentence
    assert not any(s.startswith("Without a finite loss") for s in said)
    page = report_html(analysis, {})
    assert "diverged on 1 of 3 seeds" in page
    assert "no number for" not in page
    assert "5e10<small>diverged</small>" in page.split("none left out</summary>", 1)[1]
    assert "5e10" not in page.split("All runs</h2>", 1)[0]
    content = summary(analysis)
    json.dumps(content, allow_nan=False)
    found = next(r for r in content["rows"] if r["method"] == "replay")
    assert found["seeds_that_diverged"] == [1]
    assert found["values"]["forget"]["1"] is None


def test_all_runs_of_a_method_or_of_the_baseline_diverged(monkeypatch):
    for method in ("replay", "vanilla"):

        def ruin(records, method=method):
            for record in runs_of(records, method):
                for entry in record["scores"].values():
                    entry["text"]["old"]["nll"] = 1e6

        analysis = analysed(TWO, change=ruin)
        overview, _, _ = figures(monkeypatch, analysis)
        labels = {text.get_text() for text in overview.axes[0].texts}
        titles = {"replay": "Replay", "vanilla": "Vanilla"}
        assert titles.pop(method) not in labels
        assert set(titles.values()) <= labels
        assert "diverged on 3 of 3 seeds" in report_html(analysis, {})


def unlearn(records):
    """Replay at its hottest rate knows less of the new facts than before, far from diverging."""
    for record in runs_of(records, "replay"):
        if record["learning_rate"] == made.SWEPT[-1]:
            for entry in record["scores"].values():
                for kind in ("updated", "new"):
                    entry["probes"][kind].update(nll=made.BASE_LEARN + 2)


def test_worse_than_before_training_is_not_drawn_but_said(monkeypatch):
    analysis = analysed(TWO, change=unlearn)
    results, replay = analysis.results, analysis.results.method("replay")
    seeds = (0, 1, 2)
    assert not_drawn(results, replay, "forget", seeds) == [made.SWEPT[-1]]
    assert not_drawn(results, analysis.baseline, "forget", seeds) == []
    assert len(mean_points(results, replay, "forget", seeds)) == len(made.SWEPT) - 1
    overview, multiples, _ = figures(monkeypatch, analysis)
    assert (
        "not drawn, worse than before training: Replay (lr 3e-3)" in overview.axes[0].get_xlabel()
    )
    assert max(overview.axes[0].get_xlim()) < made.BASE_LEARN
    texts = [text.get_text() for text in multiples.axes[0].texts]
    assert "3 seeds, lr 3e-3 not drawn" in texts
    assert "lr 1e-3" in texts, "the ring is at the hottest rate that is drawn"


def test_only_what_lies_beyond_the_limit_diverged():
    def raise_to(value):
        def change(records):
            for record in runs_of(records, "replay", seed=0, learning_rate=1e-3):
                record["scores"]["0.5"]["probes"]["unchanged"]["nll"] = value

        return change

    limit = analysed(TWO).results.limit
    largest = max(
        (base["scores"]["1"]["probes"][kind]["nll"] + sign)
        for base in analysed(TWO).results.bases.values()
        for kind, sign in (("updated", 0.1), ("unchanged", 0.0))
    )
    assert limit == pytest.approx(2 * largest + 10)
    assert divergence_limit([]) == 40
    at_limit = analysed(TWO, change=raise_to(limit))
    assert not any(s.startswith("Diverged") for s in findings(at_limit))
    beyond = analysed(TWO, change=raise_to(limit + 0.01))
    sentence = next(s for s in findings(beyond) if s.startswith("Diverged"))
    assert "1 run, " in sentence
    assert "replay lr=0.001 seed=0 draw=0 (at α 0.5 only)" in sentence
    (run,) = beyond.results.of("replay", 1e-3)[0]
    assert math.isnan(run.value("forget", 0.5))
    assert math.isfinite(run.value("forget", 1.0))


def few_seeds(records):
    """Replay has seed 2 only, and what it has there is not in the way of the others."""
    return [r for r in records if r.get("method") != "replay" or r["seed"] == 2]


def test_a_method_with_fewer_seeds_leaves_the_others_theirs(monkeypatch):
    analysis = analysed(change=few_seeds)
    chosen = overview_seeds(analysis.results)
    assert chosen.common == (0, 1, 2)
    assert chosen.of["replay"] == (2,)
    assert [name for name in chosen.of if chosen.differs(name)] == ["replay"]
    overview, _, _ = figures(monkeypatch, analysis)
    everyone, _, _ = figures(monkeypatch, analysed())

    def lines(figure, style):
        return [
            line.get_xydata().tolist()
            for line in figure.axes[0].lines
            if line.get_linestyle() == style and len(line.get_xydata()) > 1
        ]

    assert len(lines(overview, "--")) == 1
    assert lines(everyone, "--") == []
    assert len(lines(overview, "-")) == 4
    assert all(line in lines(everyone, "-") for line in lines(overview, "-"))
    labels = {text.get_text() for text in overview.axes[0].texts}
    assert {"Replay (1 seed)", "Vanilla"} <= labels


def test_the_caption_names_methods_with_other_seeds():
    picture = {"frontier-forget": made_png()}
    uneven = report_html(analysed(change=few_seeds), picture)
    assert "mean over seeds 0–2. Dashed, as these have not all of them: Replay (seed 2);" in uneven
    assert "Dashed" not in report_html(analysed(), picture)


def made_png() -> bytes:
    """A head that says how wide it is."""
    return b"\x89PNG\r\n\x1a\n" + bytes(8) + (100).to_bytes(4, "big")


def test_seeds_that_few_methods_have_are_in_nobodys_mean():
    def more(records):
        return [r for r in records if r.get("method") in (None, "vanilla") or r["seed"] < 2]

    chosen = overview_seeds(analysed(change=more).results)
    assert chosen.common == (0, 1)
    assert set(chosen.of.values()) == {(0, 1)}

    def apart(records):
        mine = {"vanilla": 0, "replay": 1, "scale": 2}
        return [r for r in records if r["kind"] == "base" or mine.get(r["method"]) == r["seed"]]

    chosen = overview_seeds(analysed(change=apart).results)
    assert chosen.common == (0, 1, 2)
    assert chosen.of == {"vanilla": (0,), "replay": (1,), "scale": (2,)}


def test_time_is_the_median_step_times_the_steps():
    def measure(records, methods=("vanilla", "replay")):
        for name in methods:
            for record in runs_of(records, name):
                # One step of replay waited for long; its sum says so, its median does not.
                record["seconds"] |= {"train": 90.0 if name == "replay" else 10.0, "step": 0.05}
                record["seconds"]["generate"] = 5.0 * (name == "replay")

    analysis = analysed(TWO, change=measure)
    row, baseline = of(analysis, "replay"), of(analysis, "vanilla")
    assert whole_run(row.runs[0][0]) == pytest.approx(10.0)
    assert time_ratios(row, baseline) == pytest.approx([2.0] * 3)
    table = cost_table(analysis)
    cells = {name: cell.main for name, cell in zip(table.columns, table.rows[1], strict=True)}
    assert (cells["training"], cells["whole run"], cells["× baseline"]) == (
        "5.0 s",
        "10 s",
        "× 2.00",
    )
    # A baseline from before the median was noted: sums against sums.
    older = analysed(TWO, change=lambda records: measure(records, ("replay",)))
    assert time_ratios(of(older, "replay"), of(older, "vanilla")) == pytest.approx([9.5] * 3)


def test_the_cost_note_says_where_anchors_are_counted():
    page = report_html(analysed(TWO, seeds=(0,)), {})
    assert "moments and the anchors of RecAdam" in page
    assert "anchors and slow weights" not in page


def test_a_base_that_failed_takes_its_runs_with_it(tmp_path):
    config = made.config(TWO)
    records = [r for r in made.records(config, TWO) if r["seed"] < 1][:-1]
    made.write_run(tmp_path, config, records)
    single = next(cell for cell in cells(config) if cell.seed == 1)
    for key, error in (
        ("base seed=2", "OSError: no such model"),
        ("base seed=0", "OSError: an earlier try"),
        (single.key, "ValueError: lr"),
    ):
        append_record(tmp_path / FAILURES_FILE, {"kind": "failure", "key": key, "error": error})
    analysis = analyse(read_run(tmp_path))
    of_base = [cell.name for cell in cells(config) if cell.seed == 2]
    assert analysis.results.failed == {
        single.name: "ValueError: lr",
        **dict.fromkeys(of_base, "base seed=2 failed: OSError: no such model"),
    }
    page = report_html(analysis, {})
    failed = page.split("<b>Failed.</b>", 1)[1].split("</p>", 1)[0]
    assert "7 runs" in failed
    assert failed.count("base seed=2 failed: OSError: no such model") == 1
    assert all(name in failed for name in of_base)
    assert "earlier try" not in failed
    assert findings(analysis)[0].endswith("7 of the others failed.")
    assert summary(analysis)["failed"][single.name] == "ValueError: lr"


def adapters(records):
    for record in runs_of(records, "lora"):
        record["share_of_parameters"] = 0.00534


LORA = {
    "vanilla": made.METHODS["vanilla"],
    "lora": ({"title": "LoRA", "lora": {"rank": 4}}, 0.0, 0.5),
    "both": ({"title": "LoRA+TGL", "localize": "freeze", "lora": {"rank": 4}}, 0.0, 0.5),
}


def test_adapters_are_not_called_layers_that_trained():
    analysis = analysed(LORA, change=adapters, alphas=(1,))
    page = report_html(analysis, {"layers": made_png()})
    assert "Trained every layer: Vanilla." in page
    assert "Trained adapters only, in every layer that can have them: LoRA." in page
    assert "Trained adapters only, in the layers that are shown: LoRA+TGL." in page
    rows = {row[0].main: row[1] for row in perplexity_table(analysis).rows}
    assert (rows["LoRA"].main, rows["LoRA"].small) == (
        "adapters",
        "in 10 of 10 layers, 0.53 % of weights",
    )
    assert (rows["Vanilla"].main, rows["Vanilla"].small) == ("10 of 10", "100 % of weights")
    assert not Method(name="m", title="M", others={"recadam": {}}).has_adapters


def test_weights_that_stood_still_are_not_every_layer():
    def freeze(records):
        for record in runs_of(records, "replay"):
            record["share_of_parameters"] = 0.7

    page = report_html(analysed(TWO, change=freeze), {"layers": made_png()})
    assert "Trained every layer: Vanilla." in page


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100"), (0.999, "> 99"), (0.4, "40"), (0.0123, "1"), (0.00534, "0.53"),
     (0.0005, "0.05"), (1e-6, "< 0.01"), (0.0, "0")],
)  # fmt: skip
def test_shares_of_weights(share, text):
    assert share_of_weights(share) == f"{text} % of weights"
    assert share_of_weights(math.nan) == ""


def test_ordinary_text_that_got_better_is_said_to_be_adapted_to():
    def better(records):
        bases = {r["seed"]: r for r in records if r["kind"] == "base"}
        for record in runs_of(records, "replay"):
            before = bases[record["seed"]]["scores"]["1"]["text"]["old"]["nll"]
            record["scores"]["1"]["text"]["old"]["nll"] = before - 0.3 - 0.01 * record["seed"]

    start = "Old ordinary text is predicted better after"
    said = next(s for s in findings(analysed(change=better)) if s.startswith(start))
    assert "clearly for Replay (−0.31 ± 0.01, 3 seeds):" in said
    assert "Vanilla" not in said
    assert "too few" not in said
    assert not any(s.startswith(start) for s in findings(analysed()))
    few = next(s for s in findings(analysed(change=better, seeds=(0,))) if s.startswith(start))
    assert "on too few seeds to judge for Replay (−0.30, 1 seed):" in few
