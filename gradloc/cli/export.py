"""`gradloc export`: write a plan for another trainer. Trains nothing and loads no weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gradloc.cli import arguments as shared

_EXAMPLE = """\
  gradloc export plan.json --model openai-community/gpt2 --to axolotl --output unfrozen.yaml
  gradloc export plan.json --model openai-community/gpt2 --to peft
  gradloc export plan.json --model openai-community/gpt2 --to regex | grep -E -f - names.txt"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands,
        "export",
        run,
        summary="write a plan for another trainer",
        about="Writes the layers of a plan as axolotl's unfrozen_parameters (YAML), as arguments\n"
        "of peft's LoraConfig (JSON), as param groups by name (JSON), or as regular expressions,\n"
        "one a line. What the format cannot say is told on stderr.",
        example=_EXAMPLE,
    )
    parser.add_argument(
        "plan", type=Path, metavar="PLAN", help="a plan of gradloc select or gradloc train"
    )
    parser.add_argument(
        "--model",
        required=True,
        help="the model (id, folder or .gguf) that gives the names; weights are not loaded",
    )
    parser.add_argument(
        "--to", required=True, choices=("axolotl", "peft", "param-groups", "regex"), help="for whom"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write here (default: print it)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Read, translate, write."""
    from gradloc.export import export_plan
    from gradloc.files import check_writable, write_text
    from gradloc.plan import LayerPlan

    plan = LayerPlan.load(arguments.plan)
    if arguments.output is not None:
        check_writable(arguments.output)
        if arguments.output.resolve() == arguments.plan.resolve():
            raise ValueError(f"--output {arguments.output} is the plan itself: choose another name")
    export = export_plan(plan, shared.load_outline(arguments.model), arguments.to)
    if arguments.output is None:
        print(export.text, end="")
    else:
        write_text(arguments.output, export.text)
        print(f"{arguments.to}: {arguments.output}")
    for note in export.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0
