"""Reads a comparison's folder: which of its records the configuration asks for, what is missing.

Computes no statistics, and needs neither the models nor the data that made the records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradloc.compare.config import CompareConfig, method_settings
from gradloc.compare.config_file import load_config
from gradloc.compare.grid import Cell, base_key, cells
from gradloc.compare.messages import Base
from gradloc.compare.results import FAILURES_FILE, RESULTS_FILE, read_records
from gradloc.report.runs import Method, Results, Run, divergence_limit


def read_run(folder: Path) -> Results:
    """Read config.json, results.jsonl and failures.jsonl.

    Args:
        folder: of a comparison, finished or not.

    Raises:
        FileNotFoundError: the folder is no comparison's, or nothing in it is finished.
        ValueError: a file is not what `gradloc compare` writes.
    """
    config = load_config(folder)
    records = read_records(folder / RESULTS_FILE)
    if not any(record.get("kind") == "run" for record in records):
        raise FileNotFoundError(
            f"no run in {str(folder / RESULTS_FILE)!r} is finished: run "
            f"'gradloc compare' on {str(folder)!r} first"
        )
    failures = read_records(folder / FAILURES_FILE) if (folder / FAILURES_FILE).exists() else []
    return results_from(config, records, failures, name=folder.resolve().name)


def results_from(
    config: CompareConfig,
    records: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]] = (),
    *,
    name: str,
) -> Results:
    """Sort records by what the configuration asks for.

    Args:
        config: of the comparison.
        records: of runs and bases; of two with the same key the last counts.
        failures: of cells and bases that ended in an error.
        name: of the folder.
    """
    expected = {cell.key: cell for cell in cells(config)}
    bases = _bases(config, records)
    limit = divergence_limit(bases.values())
    runs = {str(r["key"]): Run(r, limit) for r in records if r.get("kind") == "run"}
    other_keys = bool(runs) and not expected.keys() & runs.keys()
    if other_keys:
        # Another version of gradloc counts other things into a key. Its results are still results.
        by_place = {_place(run): run for run in runs.values()}
        found = {
            cell.key: by_place[place]
            for cell in expected.values()
            if (place := _place(cell)) in by_place
        }
    else:
        found = {key: runs[key] for key in expected if key in runs}
    used = {id(run) for run in found.values()}
    missing = [cell for key, cell in expected.items() if key not in found]
    return Results(
        name=name,
        config=config.to_json(),
        methods=tuple(_method(config, method.name) for method in config.methods),
        runs=tuple(found.values()),
        bases=bases,
        missing=tuple(cell.name for cell in missing),
        failed=_failed(missing, bases, failures),
        set_aside=tuple(run for run in runs.values() if id(run) not in used),
        other_keys=other_keys,
        limit=limit,
    )


def _failed(
    missing: Sequence[Cell],
    bases: Mapping[int, Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """Names of missing cells that failed, or whose base did and has not been made since."""
    reasons = {
        str(failure.get("key")): str(failure.get("error") or "no reason noted")
        for failure in failures
    }
    found = {}
    for cell in missing:
        base = Base(cell.seed)
        if cell.seed not in bases and base.key in reasons:
            found[cell.name] = f"{base.name} failed: {reasons[base.key]}"
        elif cell.key in reasons:
            found[cell.name] = reasons[cell.key]
    return found


def _place(run: Run | Cell) -> tuple[str, str, int, int]:
    name = run.method if isinstance(run, Run) else run.method.name
    return name, f"{run.learning_rate:g}", run.seed, run.draw


def _method(config: CompareConfig, name: str) -> Method:
    method = config.method(name)
    others = method_settings(method)
    del others["localize"]
    return Method(
        name=name,
        title=method.title,
        policy=method.localize.policy,
        others=others,
        learning_rates=method.learning_rates,
        seeds=method.seeds,
    )


def _bases(
    config: CompareConfig, records: Sequence[Mapping[str, Any]]
) -> dict[int, Mapping[str, Any]]:
    found: dict[int, Mapping[str, Any]] = {}
    for record in records:
        if record.get("kind") == "base":
            seed = int(record["seed"])
            known = found.get(seed)
            if known is None or known["key"] != base_key(config, seed):
                found[seed] = record
    return dict(sorted(found.items()))
