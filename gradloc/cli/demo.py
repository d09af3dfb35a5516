"""`gradloc demo`: the arguments of the demo; `gradloc.demo` is the demo."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gradloc.cli.arguments import add_command


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        run,
        summary="the whole job on a synthetic world, in a few minutes",
        about="Makes a small world whose facts change, trains a small model on the old world, "
        "traces\nit, goes on with the new one in several ways, and writes a report. Needs no "
        "download.",
        example="  gradloc demo --output gradloc-demo",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("gradloc-demo"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the world (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny version, to see that everything works"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    from gradloc.demo import run_demo

    run_demo(arguments.output, arguments.seed, arguments.quick)
    return 0
