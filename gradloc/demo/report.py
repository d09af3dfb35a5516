"""Writes report.html: one file that explains itself, with no links to anything outside.

Puts numbers, sentences and pictures into words for someone who has never heard of gradloc. The
numbers come from `outcome`, the conclusions from `findings`.
"""

from __future__ import annotations

import base64
import os
from html import escape
from pathlib import Path

from gradloc.demo.chart import trade_off_svg
from gradloc.demo.findings import RULE, findings
from gradloc.demo.methods import FREEZE, METHODS
from gradloc.demo.outcome import Outcome
from gradloc.demo.page import COMMANDS
from gradloc.demo.table import COLUMNS, table_rows
from gradloc.files import write_text
from gradloc.report.style import STYLE


def write_report(path: str | os.PathLike[str], outcome: Outcome, heatmap: Path) -> None:
    """Write the report, whole or not at all.

    Args:
        path: the HTML file.
        outcome: what came out.
        heatmap: the profile's picture, a PNG, which goes into the file.
    """
    write_text(path, report_html(outcome, heatmap.read_bytes()))


def report_html(outcome: Outcome, heatmap: bytes) -> str:
    """The report as an HTML document."""
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>gradloc demo, seed {outcome.seed}</title><style>{STYLE}</style></head><body>",
            "<main>",
            *_head(outcome),
            *_what_came_out(outcome),
            *_heatmap(outcome, heatmap),
            *_what_was_done(outcome),
            *_limits(outcome),
            *_own_model(),
            *_details(outcome),
            "</main></body></html>\n",
        )
    )


def _head(outcome: Outcome) -> list[str]:
    parts = [
        "<h1>Which layers learn what is new?</h1>",
        '<p class="lead">A language model goes stale: facts change, new people and things appear. '
        "Training it further on recent text teaches it some of that and makes it forget some of "
        "what it knew. <b>gradloc</b> measures which layers of a model react most to new and "
        "changed facts, and trains only those, or those most. This page shows the whole job once, "
        "on a small invented world, and what came of it.</p>",
    ]
    if outcome.quick:
        parts.append(
            '<p class="warning"><b>Quick form.</b> A few steps on a tiny model that knows next to '
            "nothing: it shows that everything runs. The numbers below mean nothing.</p>"
        )
    return parts


def _what_came_out(outcome: Outcome) -> list[str]:
    repeats = outcome.settings["num_repeats"]
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = []
    for row in table_rows(outcome):
        cells = "".join(
            f"<td>{escape(cell.main)}"
            + (f"<small>{escape(cell.small)}</small>" if cell.small else "")
            + "</td>"
            for cell in row
        )
        body.append(f"<tr>{cells}</tr>")
    parts = [
        "<h2>What came out</h2>",
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>',
        *body,
        "</tbody></table></div>",
        '<p class="note"><b>How to read it.</b> <i>Updated</i> facts are those that changed; '
        "<i>new</i> facts are about people who appeared; <i>unchanged</i> facts hold as before and "
        "are not mentioned in the new corpus, so they show forgetting. Large number: the share "
        "of facts that the model completes correctly, in sentences it was never trained on. Below "
        "it: the mean negative log-likelihood of the right answer, in nats a token (lower is "
        f"better), ± the standard deviation over {repeats} runs. <i>Old</i> and <i>new text</i>: "
        "perplexity on ordinary text from before and after the date (lower is better). "
        "<i>Memory</i>: the optimizer's, for AdamW's moments. <i>Time</i>: of the training steps, "
        "median over runs. "
        "All methods saw the same number of tokens, in each run the same text in the same "
        "order.</p>",
    ]
    if not outcome.quick:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(outcome))
        parts += [
            "<h3>In words</h3>",
            f'<ul class="findings">{items}</ul>',
            f'<p class="note">These sentences are made from the numbers. {escape(RULE)}. '
            "± is the standard deviation over runs of the difference within a run.</p>",
        ]
    return [
        *parts,
        "<h3>Learning against keeping</h3>",
        f"<figure>{trade_off_svg(outcome)}<figcaption>Each small dot is a run, each large one a "
        "method's mean; losses in nats a token, as in the table. Up and to the right is better. A "
        "point that lies lower and further right than another has learned more and kept "
        "less.</figcaption></figure>",
    ]


def _heatmap(outcome: Outcome, heatmap: bytes) -> list[str]:
    freeze = outcome.of(FREEZE)[0]
    named = ", ".join(f"<code>{escape(name)}</code>" for name in freeze.active_layers)
    encoded = base64.b64encode(heatmap).decode("ascii")
    return [
        "<h2>Which layers react</h2>",
        '<figure><img alt="Heatmap of relative gradient norms" '
        f'src="data:image/png;base64,{encoded}"></figure>',
        "<p>Each number is a layer's <b>relative gradient norm R</b>: how strongly a fact pulls at "
        "the layer, against how strongly ordinary text does. The pull is the norm of the gradient "
        "of the loss, on the words that complete the fact and on no others. Red is above the mean "
        "of its column, blue below; the attention and the MLP of a block are a layer each.</p>",
        "<p>Two panels, as there are two fair ways to take the ordinary text: with the loss on all "
        "its words, as in the paper, or on random stretches as long as the facts'. A loss over "
        "few words has a larger gradient by itself, so the first ratio is large everywhere; the "
        "pattern is what counts.</p>",
        f"<p>TGL + FP trained the {len(freeze.active_layers)} of {len(outcome.profile.layers)} "
        f"layers whose R, in the first panel's mean column, is above the mean: {named}.</p>",
    ]


def _what_was_done(outcome: Outcome) -> list[str]:
    settings = outcome.settings
    counts = ", ".join(
        f"{score.num_probes} about {kind} facts" for kind, score in outcome.base.probes.items()
    )
    methods = "".join(
        f"<dt>{escape(method.title)}</dt><dd>{escape(method.about)}</dd>" for method in METHODS
    )
    return [
        "<h2>What was done</h2><ol>",
        f"<li><b>A world.</b> {settings['num_entities']} invented people with "
        f"{outcome.num_old_facts} facts (home, trade, employer, animal). At a date some of the "
        f"facts change, and {settings['num_new_entities']} people appear. The old corpus tells "
        "of the old facts, the new one of the changed and new ones, both amid ordinary text whose "
        "topics change too. All of it is in <code>world/</code>, and reads like English.</li>",
        f"<li><b>A model that knows the old world.</b> A GPT-2 with {settings['num_blocks']} "
        f"blocks of width {settings['width']}, trained on the old corpus for {outcome.base_steps} "
        f"steps of {settings['batch_size']} × {settings['block_size']} tokens. It then completed "
        f"{outcome.base_accuracy:.0%} of the old facts.</li>",
        "<li><b>Tracing.</b> The gradient norm of every layer, on sentences that state changed, "
        "new and unchanged facts, and on ordinary old text.</li>",
        f"<li><b>Continuing</b> on the new corpus, {settings['steps']} steps each at learning rate "
        f"{settings['learning_rate']:g}, {settings['num_repeats']} times with other orders of the "
        f"text, in these ways:<dl>{methods}</dl></li>",
        "<li><b>Scoring</b>, on facts that were not traced, in wordings that were not trained on: "
        f"{counts}.</li></ol>",
    ]


def _limits(outcome: Outcome) -> list[str]:
    settings = outcome.settings
    return [
        "<h2>What this does not show</h2><ul>",
        "<li>How a real model behaves. This one has some hundred words and a few blocks; which "
        "layers react, and whether choosing them pays, can differ.</li>",
        "<li>Which method is best. Learning less and forgetting less is what a lower learning rate "
        "does too, so that methods can only be compared along whole curves, each at many learning "
        f"rates. Here full training ran at two ({settings['learning_rate']:g} and half of it), the "
        "others at one.</li>",
        f"<li>The spread over worlds and base models: the {settings['num_repeats']} runs share one "
        "of each. <code>gradloc demo --seed 1</code> makes others.</li>",
        "<li>What works beside choosing layers, such as mixing in old text, which protects old "
        "knowledge well where there is old text to mix in.</li></ul>",
    ]


def _own_model() -> list[str]:
    return [
        "<h2>On your own model</h2>",
        "<p>Three commands: measure, train, score. Probes are files of facts (TempLAMA, ECBD, or "
        'JSON lines <code>{"text": …, "spans": [[start, end]]}</code>); the reference is '
        "ordinary text of the kind that the model knows.</p>",
        f"<pre>{escape(COMMANDS)}</pre>",
        "<p>The same commands work in this demo's folder: the base model is <code>base</code>, the "
        "probes are <code>world/probes-*.jsonl</code>, the new corpus is "
        "<code>world/new.txt</code>, and what each method made is in <code>models/</code>.</p>",
    ]


def _details(outcome: Outcome) -> list[str]:
    facts = {
        "seed": str(outcome.seed),
        "whole demo": f"{outcome.seconds:.0f} s",
        **outcome.machine,
    }
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()
    )
    return [
        "<h2>Seed, machine, method</h2>",
        f'<table class="plain"><tbody>{rows}</tbody></table>',
        '<p class="note">The method is that of Fernandez, Bisk and Strubell, "Gradient '
        'Localization Improves Lifelong Pretraining of Language Models", Findings of EMNLP 2024, '
        "arXiv 2411.04448. All numbers are in <code>results.json</code>, all settings in "
        "<code>demo.json</code>, the plans in <code>plan-*.json</code>.</p>",
    ]
