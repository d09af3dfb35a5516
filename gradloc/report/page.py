"""Writes report.html: one file that needs no network, with tables, sentences and pictures inside.

Sets what others computed. Which sentences may stand there is decided in `findings`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from gradloc.report.analysis import Analysis
from gradloc.report.cost_tables import cost_table, runs_table
from gradloc.report.findings import findings
from gradloc.report.frontier_points import overview_seeds
from gradloc.report.page_head import head
from gradloc.report.runs import Run, number
from gradloc.report.style import STYLE
from gradloc.report.table import html_table
from gradloc.report.tables import (
    equal_rate_table,
    loss_table,
    matched_table,
    perplexity_table,
)
from gradloc.report.verdicts import RULE
from gradloc.report.words import named, number_of, ranges, rate

_MORE_STYLE = """
main { max-width: 1180px; }
table.grid { font-size: 14px; }
table.grid tbody th { text-align: left; font-weight: 600; border-bottom: 1px solid #e3e5ea; }
table.grid tbody tr:first-child td { color: inherit; }
table.grid tr.reference th, table.grid tr.reference td { background: #f4f5f7; }
table.grid td, table.grid th { padding: 6px 8px; white-space: nowrap; }
table.grid thead th, table.grid small { white-space: normal; }
table.grid th:first-child { padding-left: 4px; }
table.grid thead th { text-align: right; }
table.grid thead th:first-child { text-align: left; }
table.grid small { display: block; font-size: 11.5px; font-weight: 400; color: #7a8292; }
table.grid td.better { background: #e2f3ea; }
table.grid td.worse { background: #fbe7e1; }
table.dense { font-size: 12px; }
table.dense td, table.dense th { padding: 2px 7px; white-space: nowrap; }
details { margin: 14px 0; }
summary { cursor: pointer; font-weight: 600; }
dl.facts { font-size: 15px; }
"""


def report_html(analysis: Analysis, pictures: Mapping[str, bytes]) -> str:
    """The report as an HTML document.

    Args:
        analysis: of the comparison.
        pictures: name -> PNG: "frontier-forget", "frontier-text", "methods-forget",
            "methods-text", "layers", "losses"; those that could not be drawn are absent.
    """
    title = f"gradloc compare: {analysis.results.name}"
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}{_MORE_STYLE}</style></head><body><main>",
            *head(analysis),
            *_findings(analysis),
            *_frontiers(analysis, pictures),
            *_scores(analysis),
            *_matched(analysis),
            *_layers(analysis, pictures),
            *_losses(pictures),
            *_cost(analysis),
            *_runs(analysis),
            "</main></body></html>\n",
        )
    )


def _findings(analysis: Analysis) -> list[str]:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(analysis))
    return [
        "<h2>What the numbers show</h2>",
        f'<ul class="findings">{items}</ul>',
        f'<p class="note">These sentences are made from the numbers. {escape(RULE)}. ± is the '
        "standard deviation over seeds; random layers are averaged over their draws first.</p>",
    ]


def _frontiers(analysis: Analysis, pictures: Mapping[str, bytes]) -> list[str]:
    chosen = overview_seeds(analysis.results)
    apart = [
        f"{method.title} (seed{'s' * (len(seeds) > 1)} {ranges(seeds)})"
        for method in analysis.results.methods
        if (seeds := chosen.of.get(method.name)) and chosen.differs(method.name)
    ]
    baseline = analysis.baseline.title if analysis.baseline else "the baseline"
    parts = ["<h2>Forgetting against learning</h2>"]
    captions = {
        "frontier-forget": f"Each method's mean over seeds {ranges(chosen.common)}. "
        + (
            f"Dashed, as these have not all of them: {named(apart)}; seeds differ, so hold "
            f"them against {baseline} in the picture below, on the same seeds. "
            if apart
            else ""
        )
        + "A point a learning rate, from cold to hot, a ring around the hottest. Shaded: what "
        f"{baseline} beats, as one of its own points learned at least as much and lost no more. A "
        "method whose curve runs inside the shade, or along its edge, does nothing that another "
        f"setting of {baseline} does not do."
        + (
            " Right: learning rates and interpolation weights together."
            if analysis.results.interpolates
            else ""
        ),
        "methods-forget": f"A method each, on all of its seeds; grey: {baseline} on the same "
        "seeds. Small marks: single seeds. "
        + (
            "Thin lines: the same model interpolated towards the old weights."
            if analysis.results.interpolates
            else ""
        ),
    }
    for name in ("frontier-forget", "methods-forget"):
        parts += _picture(pictures, name, captions[name])
    if any(name in pictures for name in ("frontier-text", "methods-text")):
        parts.append("<h3>The same for old ordinary text</h3>")
        for name in ("frontier-text", "methods-text"):
            parts += _picture(pictures, name, "")
    return parts


def _scores(analysis: Analysis) -> list[str]:
    baseline = escape(analysis.baseline.title) if analysis.baseline else "the baseline"
    counts = {len(row.runs) for row in analysis.rows}
    parts = [
        "<h2>Each method at its learning rate</h2>",
        '<p class="note">The learning rate is the one with the least learn + forget on '
        "<i>validation</i> facts, apart from all that is measured here; "
        '"(hottest)" or "(coldest)" says that it was the last of those tried, so that a better one '
        'may lie beyond. "+ α": interpolated with the old weights, α chosen on validation, too. '
        "± is the standard deviation over seeds.</p>",
    ]
    if len(counts) > 1:
        parts.append(
            '<p class="note">Rows have different numbers of seeds, and seeds differ: compare rows '
            "by the paired differences (Δ), which are taken on shared seeds only.</p>"
        )
    parts += [
        "<h3>Perplexity</h3>",
        html_table(perplexity_table(analysis)),
        "<h3>Loss in nats a token</h3>",
        html_table(loss_table(analysis)),
        f'<p class="note">Δ: minus {baseline} at its own learning rate, on the same seeds: mean ± '
        "standard deviation; below it the 95 % interval of the mean by Student's t, and p by "
        "flipping signs, which with n seeds is at least 2/2<sup>n</sup>. Green and red: clearly "
        "better or worse, by the rule above. Less forgetting beside less learning is no gain by "
        "itself: the next section compares at equal learning.</p>",
        "<details><summary>At equal learning rates</summary>",
    ]
    for learning_rate in analysis.equal_rates:
        parts += [
            f"<h3>Learning rate {rate(learning_rate)}</h3>",
            html_table(equal_rate_table(analysis, learning_rate)),
        ]
    return [*parts, "</details>"]


def _matched(analysis: Analysis) -> list[str]:
    if analysis.baseline is None:
        return []
    baseline = escape(analysis.baseline.title)
    both = analysis.results.interpolates
    parts = [
        "<h2>At matched learning</h2>",
        "<p>To learn less and forget less is no result: a lower learning rate does it. So each "
        f"method is held against what {baseline} forgets <i>where it has learned as much</i>, seed "
        f"by seed: on straight lines between those of {baseline}'s points that none of its others "
        "beats"
        + (", over its learning rates and over learning rates × weights" if both else "")
        + ". Below 0 is better. Where the curve does not reach, nothing is extrapolated.</p>",
        "<h3>Forgetting</h3>",
        html_table(matched_table(analysis, "forget")),
        "<h3>Old ordinary text</h3>",
        html_table(matched_table(analysis, "text")),
        '<p class="note"><i>Point</i>: the method at its chosen learning rate. <i>Whole '
        "curves</i>: the mean distance of the method's own curve over the learning that both "
        "reach; it depends on no chosen learning rate. <i>Firm</i>: curves like these bow "
        "downwards, so that straight lines between points that lie far apart run above them and "
        "flatter whatever is held against them. Firm numbers are what is left for the worst curve "
        "through the points that falls and bows, and green and red ask that these, too, be "
        "clearly below or above 0. <i>Area</i>: what the method's points over learning rates beat, "
        f"over what {baseline}'s do, in the box that {baseline}'s points span; it grows with the "
        "number of points, so compare it between methods with as many.</p>",
    ]
    return parts


def _layers(analysis: Analysis, pictures: Mapping[str, bytes]) -> list[str]:
    if "layers" not in pictures:
        return []
    everywhere: list[str] = []
    all_adapted: list[str] = []
    some_adapted: list[str] = []
    for method in analysis.results.methods:
        runs = [run.record for run in analysis.results.runs if run.method == method.name]
        plans = [plan for run in runs if (plan := run.get("plan"))]
        if not plans:
            continue
        every = all(set(plan.values()) == {1.0} for plan in plans)
        if method.has_adapters:
            (all_adapted if every else some_adapted).append(method.title)
        # Where a part of the weights stood still, a plan with all layers does not say it all.
        elif every and not any(number(run, "share_of_parameters") < 1 for run in runs):
            everywhere.append(method.title)
    caption = "Means over seeds. Red: above the mean over layers, blue: below."
    if everywhere:
        caption += f" Trained every layer: {named(everywhere)}."
    if all_adapted:
        caption += (
            f" Trained adapters only, in every layer that can have them: {named(all_adapted)}."
        )
    if some_adapted:
        caption += f" Trained adapters only, in the layers that are shown: {named(some_adapted)}."
    return [
        "<h2>Which layers react, and which were trained</h2>",
        *_picture(pictures, "layers", caption),
    ]


def _losses(pictures: Mapping[str, bytes]) -> list[str]:
    if "losses" not in pictures:
        return []
    return [
        "<h2>Training loss</h2>",
        *_picture(
            pictures,
            "losses",
            "Means over seeds, at each method's chosen learning rate, without runs that diverged; "
            "grey: the baseline. The loss "
            "is that of the rows that were trained on: with old rows mixed in it is another loss.",
        ),
    ]


def _cost(analysis: Analysis) -> list[str]:
    note = (
        "Means over runs. <i>Tokens</i>: all that went through the model in a pass that counts; "
        "<i>optimizer</i>: all that it holds, moments and the anchors of RecAdam; <i>extra</i>: "
        "what a method holds beside it, slow weights. <i>Training</i>: the median step times the "
        "number of steps, or the sum of the steps in records without a median. <i>Whole run</i>: "
        "training, tracing and generating; scoring is no part of it. <i>× baseline</i>: whole runs "
        "on the same seeds, only where both ran on one machine. Times vary with whatever else the "
        "machine did, sums more than medians."
    )
    if len(analysis.results.machines()) > 1:
        note += " <b>There were several machines: seconds compare within one only.</b>"
    return [
        "<h2>Memory and time</h2>",
        html_table(cost_table(analysis)),
        f'<p class="note">{note}</p>',
    ]


def _runs(analysis: Analysis) -> list[str]:
    results = analysis.results
    parts = [
        "<h2>All runs</h2>",
        f"<details><summary>{number_of(len(results.runs), 'run')}, none left out</summary>",
        html_table(runs_table(analysis, results.runs), dense=True),
        "</details>",
    ]
    if results.set_aside:
        aside: Sequence[Run] = results.set_aside
        parts += [
            f"<details><summary>{number_of(len(aside), 'run')} that the configuration does not ask "
            "for</summary>",
            html_table(runs_table(analysis, aside), dense=True),
            "</details>",
        ]
    return parts


def _picture(pictures: Mapping[str, bytes], name: str, caption: str) -> list[str]:
    if name not in pictures:
        return []
    encoded = base64.b64encode(pictures[name]).decode("ascii")
    # A PNG's width stands in bytes 16 to 20; the pictures have more dots than a page needs.
    width = round(int.from_bytes(pictures[name][16:20], "big") / 1.4)
    source = f"data:image/png;base64,{encoded}"
    under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return [f'<figure><img alt="{escape(name)}" width="{width}" src="{source}">{under}</figure>']
