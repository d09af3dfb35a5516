"""`gradloc compare`: run a grid of methods, learning rates and seeds.

The arguments only; the grid is `gradloc.compare`, and tables and charts are `gradloc report`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradloc.cli import arguments as shared

if TYPE_CHECKING:
    from gradloc.compare.config import CompareConfig
    from gradloc.compare.grid import Cell

_EXAMPLE = """\
  gradloc compare experiments/tiny.yaml --processes 2
  gradloc compare experiments/tiny.yaml --processes 2   (after a kill: what is missing)
  gradloc report tiny                                   (tables and charts)"""

_SHOWN_FAILURES = 8


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands,
        "compare",
        run,
        summary="run a grid of methods, learning rates and seeds",
        about="Runs every method of CONFIG at every learning rate and seed with the same budget\n"
        "of tokens, and appends what came out to RUN/results.jsonl. Killed at any moment, the\n"
        "same command goes on with what is missing; started several times, they share the work.",
        example=_EXAMPLE,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file: docs/compare.md")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="RUN",
        help="the folder (default: the name of CONFIG without its suffix, in this folder)",
    )
    shared.add_positive(parser, "--processes", 1, "runs side by side")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="the model that the world 'english' asks and trains: an id, a folder or a .gguf file",
    )
    parser.add_argument(
        "--data", metavar="FOLDER", help="where the world 'english' finds its ordinary text"
    )
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods only")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be run and how long it may take"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the grid, or say what it would be."""
    from gradloc.compare.config_file import read_config
    from gradloc.compare.schedule import check_folder, run_grid
    from gradloc.compare.study import check_places

    config = read_config(arguments.config)
    folder = arguments.output or Path(arguments.config.stem)
    if arguments.dry_run:
        _say_what_would_run(config, folder, arguments.only, arguments.processes)
        return 0
    places = {
        name: place for name in ("model", "data") if (place := getattr(arguments, name)) is not None
    }
    # Another comparison's folder is the first thing to say; only then what this one lacks.
    check_folder(config, folder)
    check_places(config.world.kind, config.world.options, places, folder=folder)
    result = run_grid(
        config,
        folder,
        places=places,
        processes=arguments.processes,
        only=arguments.only,
    )
    print(f"{result.num_done} of {result.num_cells} runs are done: {folder / 'results.jsonl'}")
    if result.failures:
        print(f"{result.num_failed} failed; the same command tries again:")
        for sentence in result.failures[:_SHOWN_FAILURES]:
            print(f"  {sentence}")
        more = len(result.failures) - _SHOWN_FAILURES
        if more > 0:
            print(f"  and {more} more")
        print(f"  tracebacks: {folder / 'failures.jsonl'}")
    print(f"tables and charts: gradloc report {folder}")
    return 1 if result.failures else 0


def _say_what_would_run(
    config: CompareConfig, folder: Path, only: Sequence[str] | None, processes: int
) -> None:
    from gradloc.compare.grid import cells
    from gradloc.compare.progress import duration, result_line, seconds_left
    from gradloc.compare.results import FAILURES_FILE, RESULTS_FILE, read_records
    from gradloc.compare.schedule import check_folder

    wanted = cells(config, only)
    check_folder(config, folder)
    records = {record["key"]: record for record in read_records(folder / RESULTS_FILE)}
    failed = {record["key"]: record for record in read_records(folder / FAILURES_FILE)}
    width = max(len(cell.name) for cell in wanted)
    missing: list[Cell] = []
    for cell in wanted:
        if cell.key in records:
            state = result_line(records[cell.key])
        else:
            missing.append(cell)
            earlier = failed.get(cell.key)
            state = "missing" if earlier is None else f"failed: {earlier.get('error')}"
        print(f"{cell.name:<{width}}  {state}")
    done = [records[cell.key] for cell in wanted if cell.key in records]
    print(f"\n{len(done)} of {len(wanted)} runs are done in {folder}")
    tokens = config.budget_tokens
    print(f"missing: {len(missing)} runs of {tokens:,} tokens, {len(missing) * tokens:,} tokens")
    seconds = seconds_left([cell.method.name for cell in missing], done, processes)
    if missing and seconds is not None:
        print(f"they may take {duration(seconds)} with --processes {processes}")
    elif missing:
        print("how long they take is known once the first run is done")
