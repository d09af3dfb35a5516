"""The command line: `gradloc demo`, `trace`, `select`, `train`, `compare` and the others.

Parses arguments, calls the package, prints. What a command does is in the module named after it;
heavy libraries are imported when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from gradloc.cli import (
    compare,
    demo,
    doctor,
    evaluate,
    export,
    interpolate,
    report,
    select,
    trace,
    train,
)

_COMMANDS = (demo, trace, select, train, interpolate, evaluate, compare, report, export, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; None: the process's own.

    Returns:
        The exit code: 0, or 2 after an error in what was asked (one line on stderr), or 130 after
        Ctrl-C. argparse exits by itself for `--help` and wrong usage.
    """
    arguments = build_parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return int(code)
    except BrokenPipeError:
        # The reader (head, less) has gone; without this, flushing at exit would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        print(f"gradloc: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        print("gradloc: stopped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `parse_args` leaves the command's function in `run`."""
    from gradloc import __version__

    parser = argparse.ArgumentParser(
        prog="gradloc",
        description="Find the layers of a language model that react to new and changed knowledge, "
        "and train just those.",
        epilog="'gradloc COMMAND --help' explains a command. To see it all at work: gradloc demo",
    )
    parser.add_argument("--version", action="version", version=f"gradloc {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser
