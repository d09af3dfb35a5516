"""What the report computes: choices, pairs, matched learning, and how it writes numbers."""

import math
from dataclasses import replace
from itertools import pairwise

import compare_records as made
import numpy as np
import pytest
from compare_records import SWEPT, analysed, of, runs_of

from gradloc.compare.statistics import difference_from_zero
from gradloc.report.analysis import RATES
from gradloc.report.chart_style import spread_out
from gradloc.report.cost_tables import time_ratios
from gradloc.report.layer_chart import layer_bands
from gradloc.report.loss_chart import mean_losses
from gradloc.report.matched import curves, matched, whole_curve
from gradloc.report.page import report_html
from gradloc.report.rows import best_row, difference, row_at
from gradloc.report.runs import CHOSEN, Method
from gradloc.report.table import Cell, Table, html_table, markdown_table
from gradloc.report.verdicts import Standing, clear, standing, whole_standing
from gradloc.report.words import fixed, ranges, rate, signed, three_digits


@pytest.fixture(scope="module")
def whole():
    return analysed()


def test_the_learning_rate_is_chosen_on_validation_only(whole):
    before = of(whole, "replay").learning_rate

    def flatter(records):
        for record in runs_of(records, "replay"):
            measured = record["scores"]["1"]["probes"]
            hot = record["learning_rate"] == max(SWEPT)
            measured["updated"]["nll"] = measured["unchanged"]["nll"] = 0.0 if hot else 9.0

    assert of(analysed(change=flatter), "replay").learning_rate == before
    for wanted in SWEPT:

        def prefer(records, wanted=wanted):
            for record in runs_of(records, "replay"):
                loss = 0.0 if record["learning_rate"] == wanted else 5.0
                record["validation"]["1"] = {"learn": loss, "forget": loss}

        row = of(analysed(change=prefer), "replay")
        assert row.learning_rate == wanted
        assert row.at_edge == {4e-4: -1, 1e-3: 0, 3e-3: 1}[wanted]


def test_rates_are_compared_on_seeds_that_all_have():
    hottest = max(SWEPT)

    def unfinished(records):
        # Seed 2 is easy, and only the hottest rate has it; on the others 1e-3 is best.
        for record in runs_of(records, "replay"):
            easy = record["seed"] == 2
            loss = 0.0 if easy else 1.0 if record["learning_rate"] == 1e-3 else 1.2
            record["validation"]["1"] = {"learn": loss, "forget": loss}
        easy = runs_of(records, "replay", seed=2)
        return [r for r in records if r not in easy or r["learning_rate"] == hottest]

    def apart(records):
        # No seed at all is shared: then only the rate with the most seeds counts.
        unfinished(records)
        replay = runs_of(records, "replay")
        keep = {(1e-3, 0), (hottest, 1), (hottest, 2)}
        return [r for r in records if r not in replay or (r["learning_rate"], r["seed"]) in keep]

    assert of(analysed(change=unfinished), "replay").learning_rate == 1e-3
    assert of(analysed(change=apart), "replay").learning_rate == hottest


def test_draws_are_averaged_within_a_seed_first(whole):
    row = of(whole, "random")
    assert {len(runs) for runs in row.runs.values()} == {2}
    for seed, runs in row.runs.items():
        nll = [run.record["scores"]["1"]["probes"]["unchanged"]["nll"] for run in runs]
        assert row.values("forget")[seed] == pytest.approx(np.mean(nll))
    found = whole.difference(row, "forget")
    assert len(found.differences) == 3
    means = np.asarray([row.values("forget")[seed] for seed in (0, 1, 2)])
    assert row.spread("forget") == pytest.approx((means.mean(), means.std(ddof=1)))


def test_differences_pair_seeds():
    def shift(records):
        for record in [*runs_of(records, "vanilla"), *runs_of(records, "replay")]:
            for entry in record["scores"].values():
                entry["probes"]["unchanged"]["nll"] = 10.0 * record["seed"] + (
                    record["method"] == "replay"
                ) * (1 + record["seed"])
        return [r for r in records if r not in runs_of(records, "replay", seed=1)]

    analysis = analysed(change=shift)
    found = analysis.difference(of(analysis, "replay"), "forget")
    assert found.differences == (1.0, 3.0)
    assert found.mean == 2.0
    own = of(analysis, "vanilla")
    assert analysis.difference(own, "forget") is None
    assert difference(own, own, "forget").differences == (0.0, 0.0, 0.0)


def test_the_chosen_weight_is_each_runs_own(whole):
    rows = [row for row in whole.rows if row.weight is CHOSEN]
    assert rows
    for row in rows:
        assert row.title.endswith(" + α")
        for seed, runs in row.runs.items():
            scores = [run.record["scores"][f"{run.record['alpha']:g}"] for run in runs]
            expected = np.mean([entry["probes"]["unchanged"]["nll"] for entry in scores])
            assert row.values("forget")[seed] == pytest.approx(expected)
    assert not [row for row in analysed(alphas=(1,)).rows if row.weight is CHOSEN]


def test_equal_rates_compare_with_the_baseline_at_that_rate(whole):
    assert list(whole.equal_rates) == list(SWEPT)
    for learning_rate, rows in whole.equal_rates.items():
        assert [row.method for row in rows] == list(whole.results.methods)
        row = next(row for row in rows if row.method.name == "replay")
        vanilla = whole.results.of("vanilla", learning_rate)
        found = whole.at_equal_rate(row, "learn").differences
        expected = [row.values("learn")[s] - vanilla[s][0].value("learn") for s in vanilla]
        assert found == pytest.approx(expected)


def points(*pairs):
    """A comparison's analysis whose vanilla has these (learn, forget) points on every seed."""

    def place(records):
        for record in runs_of(records, "vanilla"):
            learn, forget = pairs[SWEPT.index(record["learning_rate"])]
            probes = record["scores"]["1"]["probes"]
            probes["updated"]["nll"] = probes["new"]["nll"] = learn
            probes["unchanged"]["nll"] = forget

    return place


def test_matched_learning_by_hand():
    def change(records):
        points((4.0, 1.0), (3.0, 2.0), (2.0, 6.0))(records)
        for record in runs_of(records, "replay"):
            learn, forget = [(2.5, 3.0), (1.5, 5.0), (4.5, 0.1)][record["seed"]]
            probes = record["scores"]["1"]["probes"]
            probes["updated"]["nll"], probes["new"]["nll"] = learn - 1, learn + 1
            probes["unchanged"]["nll"] = forget

    analysis = analysed(change=change, alphas=(1,))
    held = analysis.matched[of(analysis, "replay").key, "forget", RATES]
    assert held.gaps == {0: pytest.approx(-1.0)}  # 3 beside the line's 4 at 2.5
    assert held.firm == {0: pytest.approx(0.5)}  # the line through the colder points gives 2.5
    assert held.beyond == {1: pytest.approx(-1.0)}
    assert held.short == (2,)
    assert standing(held) is Standing.MIXED
    assert held.num_seeds == 3
    assert (of(analysis, "vanilla").key, "forget", RATES) not in analysis.matched


def test_a_beaten_point_of_the_baseline_is_no_part_of_its_curve():
    # Past its useful heat: learned less than at the middle rate and forgot more.
    analysis = analysed(change=points((4.0, 1.0), (2.0, 3.0), (2.5, 9.0)), alphas=(1,))
    row = replace(of(analysis, "replay"))
    other = analysis.curves["vanilla", "forget", RATES]
    assert len(other[0]) == 3
    for seed, learned in row.values("learn").items():
        held = matched(row, other, "forget")
        if 2.0 <= learned <= 4.0:
            line = 1.0 + (4.0 - learned)
            assert held.gaps[seed] == pytest.approx(row.values("forget")[seed] - line)


def test_whole_curves_need_no_chosen_rate(whole):
    ours, theirs = (whole.curves[name, "forget", RATES] for name in ("replay", "vanilla"))
    found = whole_curve(ours, theirs)
    assert whole_standing(found) is Standing.LESS
    assert found.lowest.mean <= found.gap.mean <= found.highest.mean < 0
    assert whole_standing(whole_curve(theirs, theirs)) is Standing.SAME
    assert found.area[0] > 1
    one_seed = {0: ours[0]}
    assert whole_standing(whole_curve(one_seed, theirs)) is Standing.FEW


def test_a_curve_averages_draws_and_runs_over_weights(whole):
    alone = curves(whole.results, "random", "text")
    both = curves(whole.results, "random", "text", None)
    assert {len(of_seed) for of_seed in alone.values()} == {3}
    assert {len(of_seed) for of_seed in both.values()} == {6}
    runs = whole.results.of("random", 1e-3)[1]
    expected = tuple(np.mean([run.value(what) for run in runs]) for what in ("learn", "text"))
    assert any(point == pytest.approx(expected) for point in alone[1])


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((-0.3, -0.31, -0.29), -1),
        ((0.3, 0.31, 0.29), 1),
        ((-0.3, -0.31), 0),  # two seeds
        ((-0.3, -0.31, 0.01), 0),  # they do not agree
        ((-0.9, -0.1, -0.2), 0),  # the interval holds 0
        ((-0.019, -0.0191, -0.0189), 0),  # not worth a word
    ],
)
def test_when_a_difference_counts(differences, verdict):
    assert clear(difference_from_zero(differences)) == verdict
    assert clear(None) == 0


def test_times_compare_on_one_machine_only(whole):
    row, other = of(whole, "tgl-fp"), of(whole, "vanilla")
    # 8.8 + 1.5 s, beside 10 s.
    assert time_ratios(row, other) == pytest.approx([1.03] * 3)

    def move(records):
        for record in runs_of(records, "tgl-fp", seed=1):
            record["machine"] = {"processor": "another"}

    moved = analysed(change=move)
    assert len(time_ratios(of(moved, "tgl-fp"), of(moved, "vanilla"))) == 2
    assert "several machines" in report_html(moved, {})


def test_losses_are_means_over_steps_that_all_have():
    def cut(records):
        for record in runs_of(records, "vanilla"):
            record["losses"] = [[10, 4.0 + record["seed"]], [20, 2.0]][: 1 + (record["seed"] > 0)]

    row = of(analysed(change=cut), "vanilla")
    assert mean_losses(row) == [(10, 5.0)]
    assert mean_losses(row, [1, 2]) == [(10, 5.5), (20, 2.0)]


def test_the_layers_that_each_method_trained(whole):
    bands = layer_bands(whole.results)
    titles = [band.title for band in bands]
    assert len(titles) == 4
    scale, share = bands[2], bands[3]
    assert list(scale.rows) == ["TGL+ALR"]
    assert list(share.rows) == ["TGL+FP", "Random layers"]
    assert share.rows["TGL+FP"] == {name: float(name in made.LAYERS[:4]) for name in made.LAYERS}
    assert sum(share.rows["Random layers"].values()) == pytest.approx(4)
    first = made.LAYERS[0]
    expected = np.mean(
        [base["relative"]["all"]["new"][first] for base in whole.results.bases.values()]
    )
    assert bands[0].rows["new"][first] == pytest.approx(expected)
    assert layer_bands(replace(whole.results, runs=(), bases={})) == []


def test_numbers_in_words():
    assert [fixed(v) for v in (-0.001, 1.234, math.nan, -2.0)] == ["0.00", "1.23", "–", "−2.00"]
    assert [signed(v) for v in (0.001, 0.5, -0.5)] == ["0.00", "+0.50", "−0.50"]
    assert [rate(v) for v in (1e-3, 3e-05, 0.00025, 1.0)] == ["1e-3", "3e-5", "2.5e-4", "1e0"]
    assert three_digits(12.345, 0.5) == ("12.3", "± 0.5")
    assert three_digits(2521.3, math.nan) == ("2,521", "")
    assert three_digits(4.2e9, 1e8) == ("4.2e9", "± 1e8")
    assert three_digits(math.nan) == ("–", "")
    assert ranges([5, 0, 1, 2]) == "0–2, 5"


def test_a_table_in_both_forms():
    table = Table(
        columns=("a", "b|c"), rows=[[Cell("<x>"), Cell("1", "± 2", "better")]], reference=0
    )
    html = html_table(table)
    assert '<tr class="reference"><th scope="row">&lt;x&gt;</th>' in html
    assert '<td class="better">1<small>±\u00a02</small></td>' in html
    assert markdown_table(table) == "| a | b\\|c |\n|---|---|\n| \\<x> | 1 (± 2) |\n"


@pytest.mark.parametrize("places", [[0.5] * 4, [0.1, 0.9, 0.12, 0.11], [0.0, 1.0], [0.3], []])
def test_labels_are_spread_out(places):
    moved = spread_out(places, 0.1, 0.0, 1.0)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in moved)
    ordered = sorted(moved)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(ordered))
    apart = [0.1, 0.9]
    assert spread_out(apart, 0.1, 0.0, 1.0) == pytest.approx(apart)


def test_a_method_without_runs_has_no_row(whole):
    assert best_row(whole.results, Method(name="none", title="None")) is None
    assert row_at(whole.results, whole.results.methods[0], 0.5) is None
