"""`gradloc report`: the arguments of a comparison's report; `gradloc.report` makes it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gradloc.cli.arguments import add_command


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "report",
        run,
        summary="tables, charts and findings of a comparison, in one HTML file",
        about="Reads what 'gradloc compare' wrote, finished or not, and writes report.html (one "
        "file\nthat needs no network), its pictures as PNGs, the tables as Markdown (table.md) and "
        "all\nnumbers (summary.json). Needs no model and no data.",
        example="  gradloc report tiny\n"
        "  gradloc report real --output real-report --baseline replay",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the comparison")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where the report goes (default: RUN)"
    )
    parser.add_argument(
        "--baseline",
        default="vanilla",
        metavar="METHOD",
        help="the method that all others are compared with (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the report and say where it is and what it found."""
    from gradloc.report import write_report

    written = write_report(arguments.folder, arguments.output, baseline=arguments.baseline)
    for sentence in written.findings:
        print(f"- {sentence}")
    missing = f" ({written.num_missing} more are not finished)" if written.num_missing else ""
    print(f"\nThe report of {written.num_runs} runs{missing}: {written.page}")
    print("Beside it:", ", ".join(path.name for path in written.others))
    return 0
