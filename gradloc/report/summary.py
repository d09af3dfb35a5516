"""Writes what the report says for machines and documents: summary.json and table.md.

The numbers are those of the report; nothing is computed here that is not shown there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradloc.compare.statistics import PairedDifference
from gradloc.report.analysis import LOSSES, Analysis
from gradloc.report.cost_tables import cost_table, time_ratios
from gradloc.report.findings import findings
from gradloc.report.matched import Matched
from gradloc.report.rows import Row
from gradloc.report.runs import CHOSEN, MEASURES
from gradloc.report.table import markdown_table
from gradloc.report.tables import loss_table, matched_table, perplexity_table
from gradloc.report.verdicts import RULE, standing

SCHEMA, VERSION = "gradloc.report", 1


def summary(analysis: Analysis) -> dict[str, Any]:
    """The numbers of the main tables, ready for `write_json`."""
    results = analysis.results
    content = {
        "name": results.name,
        "num_runs": len(results.runs),
        "num_cells": results.num_cells,
        "missing": list(results.missing),
        "failed": dict(results.failed),
        "divergence_limit": results.limit,
        "num_set_aside": len(results.set_aside),
        "baseline": None if analysis.baseline is None else analysis.baseline.name,
        "rule": RULE,
        "findings": findings(analysis),
        "rows": [_row(analysis, row) for row in analysis.rows],
        "whole_curves": [
            {
                "method": method,
                "loss": loss,
                "over": span,
                "gap": _difference(whole.gap),
                "width": whole.width,
                "area_ratio": dict(whole.area),
            }
            for (method, loss, span), whole in analysis.whole.items()
        ],
    }
    return dict(_finite(content))


def markdown(analysis: Analysis) -> str:
    """The main tables as Markdown, for copying into a document."""
    results = analysis.results
    parts = [
        f"# {results.name}\n\n{len(results.runs)} of {results.num_cells} runs. "
        "Learning rates are chosen on validation facts; mean (± standard deviation over seeds).\n",
        "## Perplexity\n",
        markdown_table(perplexity_table(analysis)),
        "## Loss, nats a token\n",
        markdown_table(loss_table(analysis)),
    ]
    if analysis.baseline is not None:
        for loss in LOSSES:
            parts += [
                f"## At matched learning: {loss}\n",
                markdown_table(matched_table(analysis, loss)),
            ]
    parts += ["## Memory and time\n", markdown_table(cost_table(analysis)), "## In words\n"]
    parts.append("".join(f"- {sentence}\n" for sentence in findings(analysis)))
    return "\n".join(parts)


def _row(analysis: Analysis, row: Row) -> dict[str, Any]:
    values = {measure: row.values(measure) for measure in MEASURES}
    found: dict[str, Any] = {
        "method": row.method.name,
        "title": row.method.title,
        "alpha": "chosen on validation" if row.weight is CHOSEN else row.weight,
        "alphas": row.alphas(),
        "learning_rate": row.learning_rate,
        "at_edge_of_sweep": row.at_edge,
        "seeds": list(row.runs),
        "seeds_that_diverged": row.diverged(),
        "values": {
            name: {str(seed): value for seed, value in of.items()} for name, of in values.items()
        },
        "mean_sd": {measure: list(row.spread(measure)) for measure in MEASURES},
        "difference": {m: _difference(analysis.difference(row, m)) for m in ("learn", *LOSSES)},
        "matched": {
            f"{loss} over {span}": _matched(held)
            for (key, loss, span), held in analysis.matched.items()
            if key == row.key
        },
    }
    if analysis.baseline_row is not None and row.weight is not CHOSEN:
        found["time_ratios"] = time_ratios(row, analysis.baseline_row)
    return found


def _matched(held: Matched) -> dict[str, Any]:
    return {
        "standing": standing(held).value,
        "gaps": {str(seed): gap for seed, gap in held.gaps.items()},
        "from_last_point_where_beyond": {str(s): gap for s, gap in held.beyond.items()},
        "seeds_that_learned_less": list(held.short),
        "seeds_without_numbers": list(held.unknown),
        "difference": _difference(held.difference),
    }


def _difference(found: PairedDifference | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "mean": found.mean,
        "sd": found.sd,
        "ci95": list(found.ci95),
        "sign_flip_p": found.sign_flip_p,
        "num_pairs": len(found.differences),
    }


def _finite(value: Any) -> Any:
    """JSON has neither inf nor nan: null; and keys are text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
