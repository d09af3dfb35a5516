"""The head of report.html: what was compared, on what, how far it is, and warnings.

Everything from the configuration and the records is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from gradloc.report.analysis import Analysis
from gradloc.report.words import number_of, ranges, rate

_SHOWN = 12
"""Names of runs in a row; what is more is counted."""


def head(analysis: Analysis) -> list[str]:
    """The title, the facts of the comparison, and what speaks against reading on."""
    results = analysis.results
    config = results.config
    world = config.get("world", {})
    options = ", ".join(f"{name} {value}" for name, value in world.items() if name != "kind")
    training = config.get("training", {})
    alphas = config.get("alphas", [1])
    done = f"{len(results.runs)} of {number_of(results.num_cells, 'run')} finished"
    facts = {
        "methods": ", ".join(method.title for method in results.methods),
        "world": f"{world.get('kind', 'unknown')}" + (f" ({options})" if options else ""),
        "budget": f"{config.get('budget_tokens', 0):,} tokens a run: every pass counts, those over "
        "old data, traces and generated text, too",
        "steps": f"of {training.get('batch_size')} × {training.get('block_size')} tokens",
        "learning rates": ", ".join(
            rate(value) for value in sorted({r for m in results.methods for r in m.learning_rates})
        ),
        "weights α": ", ".join(f"{alpha:g}" for alpha in alphas)
        + (" (1: as trained)" if len(alphas) > 1 else " (as trained; no interpolation)"),
        "seeds": ranges(sorted({seed for m in results.methods for seed in m.seeds}))
        + "; a seed is a world, a base model and an order of the data, the same for all methods",
        "runs": done,
        **_machines(results.machines()),
    }
    parts = [
        f"<h1>{escape(results.name)}: what was learned, and what was forgotten?</h1>",
        '<p class="lead">Ways of training a language model on new text, compared at equal tokens. '
        "<b>Learn</b> is the loss on facts that changed (<i>updated</i>) or appeared (<i>new</i>), "
        "<b>forget</b> the loss on facts that hold as before and are not mentioned in the new text "
        "(<i>unchanged</i>), <b>text</b> the loss on old ordinary text: all in nats a token, in "
        "sentences that no method trained on, and in all of them lower is better.</p>",
        '<dl class="facts">',
        *(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()),
        "</dl>",
    ]
    if results.missing:
        parts.append(
            f'<p class="warning"><b>Unfinished.</b> {number_of(len(results.missing), "run")} still '
            f"missing: {escape(_first(results.missing))}.</p>"
        )
    if results.failed:
        by_reason: dict[str, list[str]] = {}
        for name, reason in results.failed.items():
            by_reason.setdefault(reason, []).append(name)
        listed = "; ".join(f"{_first(names)} ({reason})" for reason, names in by_reason.items())
        parts.append(
            f'<p class="warning"><b>Failed.</b> The last attempt at '
            f"{number_of(len(results.failed), 'run')} among them, or at the base of their seed, "
            f"ended in an error; failures.jsonl has the traceback: {escape(listed)}.</p>"
        )
    if results.set_aside:
        parts.append(
            f'<p class="warning">{number_of(len(results.set_aside), "finished run")} '
            f"{'is' if len(results.set_aside) == 1 else 'are'} not what the configuration asks for "
            "(other settings, learning rates or seeds). They stand in the list of all runs and "
            "count nowhere else.</p>"
        )
    if results.other_keys:
        parts.append(
            '<p class="warning">The keys of these runs were made by another version of gradloc, so '
            "they were found by method, learning rate, seed and draw: check that the settings in "
            "config.json are those they ran with.</p>"
        )
    if analysis.baseline is None:
        parts.append(
            '<p class="warning">There is no finished run of a method to compare with: name one '
            "with <code>--baseline</code>.</p>"
        )
    return parts


def _first(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _machines(machines: Sequence[Mapping[str, str]]) -> dict[str, str]:
    found = {}
    for index, machine in enumerate(machines):
        name = "machine" if len(machines) == 1 else f"machine {index + 1}"
        found[name] = ", ".join(f"{key} {value}" for key, value in machine.items())
    return found
