"""`gradloc evaluate`: score probes and ordinary text, print a table, save the scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradloc.cli import arguments as shared

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from gradloc.evaluate import ProbeScore, TextScore

_EXAMPLE = """\
  gradloc evaluate --model run/final --probes dynamic_templama.jsonl --dates 2019-Q2:2022-Q2 \\
      --text wikitext.txt --output scores.json"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands,
        "evaluate",
        run,
        summary="score probes and ordinary text",
        about="Perplexity and exact match of the probes' spans by kind, and perplexity on\n"
        "ordinary text. Exact match: greedy decoding would write an acceptable answer.",
        example=_EXAMPLE,
    )
    shared.add_model(parser)
    shared.add_probes(parser, required=False)
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="ordinary text: .txt, .jsonl or .parquet, scored in windows of --max-length",
    )
    parser.add_argument(
        "--max-text-batches", type=int, metavar="N", help="batches of text (default: all)"
    )
    shared.add_text_format(parser)
    shared.add_positive(parser, "--batch-size", 8, "sequences a forward pass")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the scores as JSON")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the draw of --max-probes (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Score, print the table, write the file."""
    from rich.console import Console

    from gradloc.evaluate import evaluate_probes, evaluate_text, save_scores
    from gradloc.files import check_writable
    from gradloc.training.corpus import text_batches

    if not arguments.probes and not arguments.text:
        raise ValueError("nothing to evaluate: give --probes, --text, or both")
    if arguments.output is not None:
        check_writable(arguments.output)
    grouped = shared.read_all_probes(arguments)
    model, tokenizer = shared.load(arguments)
    length = shared.sequence_length(arguments.max_length, model, "--max-length")
    batches = None
    if arguments.text:
        batches = text_batches(
            arguments.text,
            tokenizer,
            block_size=length,
            batch_size=arguments.batch_size,
            max_batches=arguments.max_text_batches,
            text_field=arguments.text_field,
            documents=arguments.documents,
        )
    probes = [probe for members in grouped.values() for probe in members]
    scores: dict[str, ProbeScore] = {}
    if probes:
        scores = evaluate_probes(
            model,
            tokenizer,
            probes,
            batch_size=arguments.batch_size,
            max_length=length,
            progress=True,
        )
    text = None if batches is None else evaluate_text(model, batches, progress=True)
    Console().print(scores_table(scores, text, title=arguments.model))
    if arguments.output is not None:
        save_scores(
            arguments.output,
            scores,
            text,
            model=arguments.model,
            probe_files=arguments.probes,
            text_files=[str(path) for path in arguments.text or ()],
            max_length=length,
        )
        print(f"scores: {arguments.output}")
    return 0


def scores_table(
    probes: Mapping[str, ProbeScore], text: TextScore | None, *, title: str = ""
) -> Table:
    """A rich table: a row a kind of probe, and one for ordinary text."""
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    table.add_column("")
    for heading in ("perplexity", "nll", "exact match", "probes", "tokens"):
        table.add_column(heading, justify="right")
    for kind, score in probes.items():
        table.add_row(
            kind,
            f"{score.perplexity:,.2f}",
            f"{score.nll:.3f}",
            f"{100 * score.exact_match:.1f} %",
            f"{score.num_probes:,}",
            f"{score.num_tokens:,}",
        )
    if text is not None:
        table.add_row(
            "ordinary text",
            f"{text.perplexity:,.2f}",
            f"{text.nll:.3f}",
            "–",
            "–",
            f"{text.num_tokens:,}",
        )
    return table
