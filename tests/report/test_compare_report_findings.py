"""What the report says in sentences, on records from a law that says what has to come out."""

import re

import compare_records as made
import pytest
from compare_records import analysed, of

from gradloc.report.analysis import RATES, analyse
from gradloc.report.findings import findings
from gradloc.report.matched import matched
from gradloc.report.page import report_html
from gradloc.report.read import results_from
from gradloc.report.rows import row_at
from gradloc.report.summary import markdown, summary
from gradloc.report.verdicts import Standing, clear, standing


@pytest.fixture(scope="module")
def whole():
    return analysed()


def test_the_sentences_find_what_the_law_has_in_it(whole):
    said = findings(whole)
    less = next(s for s in said if s.startswith("Clearly less forgotten"))
    assert re.findall(r"(\w[\w+ ]+) \(−", less.split("seeds): ")[1]) == ["Replay"]
    same = next(s for s in said if s.startswith("Within noise of Vanilla's curve over learning r"))
    assert "TGL+FP (" in same
    assert "Random layers (" in same
    assert "Replay" not in same
    control = next(s for s in said if s.startswith("TGL+FP against random layers"))
    assert "do not show that it matters which layers train" in control
    assert "mean of 2 draws a seed" in control
    text = next(s for s in said if s.startswith("Loss on old ordinary text, against"))
    assert "clearly lower for Replay" in text
    assert any(s.startswith("At the hottest learning rate") and "Replay" in s for s in said)


def test_less_of_both_is_no_result():
    methods = {
        "vanilla": made.METHODS["vanilla"],
        "lazy": ({"title": "Lazy", "localize": "freeze"}, 0.0, 0.7),
    }
    # The law's own noise aside, so that nothing but heat differs.
    config = made.config(methods, seeds=(0, 1, 2, 3, 4), alphas=(1,))
    records = made.records(config, methods, noise=0.004)
    analysis = analyse(results_from(config, records, name="made"))
    row = row_at(analysis.results, analysis.results.methods[1], 1e-3)
    assert clear(analysis.difference(row, "learn")) == 1
    assert clear(analysis.difference(row, "forget")) == -1
    held = matched(row, analysis.curves["vanilla", "forget", RATES], "forget")
    assert standing(held) in (Standing.SAME, Standing.COARSE)
    said = " ".join(findings(analysis))
    assert "Clearly less" not in said


def test_a_curve_out_of_reach_is_no_result():
    methods = {
        "vanilla": made.METHODS["vanilla"],
        "cold": ({"title": "Cold"}, 0.0, 0.1),
        "hot": ({"title": "Hot"}, 0.3, 4.0),
    }
    analysis = analysed(methods)
    said = findings(analysis)
    short = next(s for s in said if s.startswith("Learned less than any point"))
    assert "Cold (the curves share no range, either)" in short
    assert "no result" in short
    assert "Hot" not in short


def test_with_one_seed_nothing_is_judged():
    analysis = analysed(seeds=(0,))
    said = findings(analysis)
    assert not any("learly" in sentence or "ithin noise" in sentence for sentence in said)
    assert "fewer than 3 seeds" in " ".join(said)
    page = report_html(analysis, {})
    assert not re.search(r'class="(better|worse)"', page)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)


def test_chance_is_named_where_many_are_compared():
    methods = {
        "vanilla": made.METHODS["vanilla"],
        **{f"m{n}": ({"title": f"M{n}"}, 0.0, 1.0) for n in range(5)},
    }
    assert any("one 95 % interval in twenty" in s for s in findings(analysed(methods)))
    del methods["m4"]
    assert not any("in twenty" in s for s in findings(analysed(methods)))


def test_without_a_baseline_nothing_is_compared():
    methods = {"replay": made.METHODS["replay"], "scale": made.METHODS["scale"]}
    analysis = analysed(methods, seeds=(0, 1))
    assert findings(analysis) == [
        "No method that the others could be compared with has a finished run, so nothing is "
        "judged here."
    ]
    page = report_html(analysis, {})
    assert "--baseline" in page
    assert "Δ" not in re.sub(r'<p class="note">.*?</p>', "", page)
    summary(analysis)
    markdown(analysis)
    other = analysed(methods, baseline="replay")
    assert next(row.method.name for row in other.rows if other.is_baseline(row)) == "replay"
    assert of(other, "scale").key in {key for key, _, _ in other.matched}
