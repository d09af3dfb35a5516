"""The report of a comparison: its files, its page, what it makes of results cut short or odd."""

import base64
import io
import json
import re

import compare_records as made
import numpy as np
import pytest
from compare_records import analysed, of, runs_of
from PIL import Image

from gradloc.cli import main
from gradloc.compare.grid import cells
from gradloc.compare.results import FAILURES_FILE, RESULTS_FILE, append_record
from gradloc.report import write_report
from gradloc.report.analysis import BOTH, RATES, analyse
from gradloc.report.findings import findings
from gradloc.report.page import report_html
from gradloc.report.read import read_run, results_from
from gradloc.report.summary import markdown, summary
from gradloc.report.verdicts import Standing, standing


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report as the command writes it."""
    folder = tmp_path_factory.mktemp("compare") / "tiny"
    config = made.config(seeds=(0, 1, 2), rates=(1e-3, 3e-3))
    made.write_run(folder, config, made.records(config))
    assert main(["report", str(folder), "--output", str(folder / "report")]) == 0
    return folder / "report"


def test_every_file_is_written(written):
    pictures = {
        f"{kind}-{loss}.png" for kind in ("frontier", "methods") for loss in ("forget", "text")
    }
    assert {path.name for path in written.iterdir()} == pictures | {
        *("layers.png", "losses.png", "report.html", "table.md", "summary.json")
    }


def test_the_page_needs_nothing_from_outside(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|url\(|@import", page)
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == 6
    for source in sources:
        head, _, content = source.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    for tag in ("table", "tr", "td", "th", "p", "h2", "figure", "details", "ul", "li"):
        opened = len(re.findall(rf"<{tag}[ >]", page))
        assert opened == page.count(f"</{tag}>") > 0, tag


def test_the_page_names_every_method_and_lists_every_run(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    config = made.config(rates=(1e-3, 3e-3))
    listed = page.split("none left out</summary>", 1)[1]
    for method in config.methods:
        assert f">{method.title}<" in page
        count = sum(cell.method == method for cell in cells(config))
        assert listed.count(f'<th scope="row">{method.title}</th>') == count
    assert "Unfinished" not in page
    assert "102,400 tokens a run" in page
    assert "an imagined one" in page


def test_the_summary_and_the_table_say_what_the_page_says(written):
    content = json.loads((written / "summary.json").read_text(encoding="utf-8"))
    page = (written / "report.html").read_text(encoding="utf-8")
    table = (written / "table.md").read_text(encoding="utf-8")
    assert content["num_runs"] == content["num_cells"] == 36
    for sentence in content["findings"]:
        assert sentence.replace("'", "&#x27;") in page
        assert f"- {sentence}" in table
    row = next(row for row in content["rows"] if row["method"] == "replay")
    mean, sd = row["mean_sd"]["forget"]
    assert f"{mean:.2f}<small>± {sd:.2f}".replace("± ", "±\u00a0") in page
    assert f"{mean:.2f} (± {sd:.2f})" in table


def test_the_command_says_where_the_report_is(tmp_path, capsys):
    config = made.config({"vanilla": made.METHODS["vanilla"]}, seeds=(0,), rates=(1e-3,))
    made.write_run(tmp_path, config, made.records(config))
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "report.html") in said
    assert "- Vanilla (learning rate 1e-3" in said
    assert (tmp_path / "report.html").is_file()


def test_what_the_command_refuses(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "config.json" in capsys.readouterr().err
    config = made.config(seeds=(0,))
    made.write_run(tmp_path, config, [made.base_record(config, 0)])
    assert main(["report", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err
    append_record(tmp_path / RESULTS_FILE, made.records(config)[1])
    assert main(["report", str(tmp_path), "--baseline", "vanila"]) == 2
    assert "baseline='vanila': the comparison has vanilla, tgl-fp" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(SystemExit) as ended:
        main(["report", "--help"])
    assert ended.value.code == 0
    assert "gradloc report" in capsys.readouterr().out


def test_an_unfinished_grid_says_what_is_missing(tmp_path):
    config = made.config(alphas=(1,))
    records = made.records(config)
    cut = [record for record in records if record["kind"] == "base"] + [
        record for record in records if record["kind"] == "run"
    ][:25]
    made.write_run(tmp_path, config, cut)
    missing = [cell for cell in cells(config) if cell.key not in {r["key"] for r in cut}]
    append_record(tmp_path / FAILURES_FILE, {"key": missing[3].key, "traceback": "…"})
    append_record(tmp_path / FAILURES_FILE, {"key": records[-40]["key"], "traceback": "…"})
    analysis = analyse(read_run(tmp_path))
    assert analysis.results.num_cells == 54
    assert analysis.results.missing == tuple(cell.name for cell in missing)
    assert findings(analysis)[0].startswith("25 of 54 runs are finished")
    page = report_html(analysis, {})
    assert missing[0].name in page
    failed = re.search(r"<b>Failed\.</b>(.*?)</p>", page).group(1)
    assert missing[3].name in failed
    assert failed.count("lr=") == 1


def test_a_line_that_was_cut_short_costs_its_run_only(tmp_path):
    config = made.config({"vanilla": made.METHODS["vanilla"]}, seeds=(0, 1), rates=(1e-3,))
    made.write_run(tmp_path, config, made.records(config))
    path = tmp_path / RESULTS_FILE
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.warns(UserWarning, match="line 4"):
        results = read_run(tmp_path)
    assert (len(results.runs), len(results.missing)) == (1, 1)


def test_runs_without_numbers_are_left_out_and_named():
    def break_some(records):
        for record in runs_of(records, "replay", seed=1):
            record["scores"]["1"]["probes"]["unchanged"] = {"nll": None, "perplexity": None}
        for record in runs_of(records, "scale", learning_rate=3e-3):
            record["validation"]["1"]["learn"] = None

    analysis = analysed(change=break_some)
    row = of(analysis, "replay")
    assert sorted(row.finite("forget")) == [0, 2]
    assert len(analysis.difference(row, "forget").differences) == 2
    assert len(analysis.difference(row, "learn").differences) == 3
    assert standing(analysis.matched[row.key, "forget", RATES]) is Standing.UNKNOWN
    assert of(analysis, "scale").learning_rate != 3e-3
    said = findings(analysis)
    assert said[0].startswith("Without a finite loss ended 3 runs: replay lr=0.0004 seed=1 draw=0")
    assert any(
        s.startswith("Not judged, as a run has no finite loss") and "Replay" in s for s in said
    )
    page = report_html(analysis, {})
    assert "no number for 1 of 3 seeds" in page
    content = summary(analysis)
    json.dumps(content, allow_nan=False)


def test_a_weight_that_some_runs_lack():
    def drop(records):
        for record in runs_of(records, "replay", seed=2):
            del record["scores"]["0.5"], record["validation"]["0.5"]
            record["alpha"] = 1.0

    analysis = analysed(change=drop)
    assert len(analysis.curves["replay", "forget", BOTH][0]) == 6
    assert len(analysis.curves["replay", "forget", BOTH][2]) == 3
    report_html(analysis, {})
    markdown(analysis)


def test_titles_are_escaped_everywhere(tmp_path):
    title = 'A<b>&"$x_1$ | `y` *z*'
    methods = {
        "vanilla": made.METHODS["vanilla"],
        "odd": ({"title": title, "localize": "freeze"}, 0.0, 1.0),
    }
    config = made.config(methods, seeds=(0,), rates=(1e-3, 3e-3))
    records = made.records(config, methods)
    for entry in runs_of(records, "odd", learning_rate=3e-3)[0]["scores"].values():
        entry["probes"]["updated"]["nll"] = None  # and the charts are drawn without it
    made.write_run(tmp_path, config, records)
    report = write_report(tmp_path)
    page = report.page.read_text(encoding="utf-8")
    assert "<b>&" not in page
    assert "A&lt;b&gt;&amp;&quot;$x_1$ | `y` *z*" in page
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| A")]
    assert rows
    for line in rows:
        assert r"A\<b>&\"$x\_1$ \| \`y\` \*z\*".replace(r"\"", '"') in line
    for block in re.findall(r"(?:^\|.*\n)+", table, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_results_of_other_settings_are_set_aside():
    config = made.config()
    other = {**made.METHODS, "replay": ({"title": "Replay", "replay": {"ratio": 3.0}}, 0.9, 1.0)}
    changed = made.config(other)
    records = made.records(config) + [
        record for record in made.records(changed, other) if record.get("method") == "replay"
    ]
    results = results_from(config, records, name="made")
    assert len(results.runs) == results.num_cells == 54
    assert len(results.set_aside) == 9
    page = report_html(analyse(results), {})
    assert "9 finished runs are not what the configuration asks for" in page
    assert "9 runs that the configuration does not ask for" in page
    found = {run.record["key"] for run in results.runs if run.method == "replay"}
    assert not found & {run.record["key"] for run in results.set_aside}


def test_keys_of_another_version_are_found_by_place():
    config = made.config()
    records = [{**record, "key": f"x{n}"} for n, record in enumerate(made.records(config))]
    results = results_from(config, records, name="made")
    assert (len(results.runs), results.missing, results.set_aside) == (54, (), ())
    assert results.other_keys
    assert "another version of gradloc" in report_html(analyse(results), {})
    assert sorted(results.bases) == [0, 1, 2]
