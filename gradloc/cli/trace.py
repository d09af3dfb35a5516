"""`gradloc trace`: measure which layers react to probes, print the profile and save it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gradloc.cli import arguments as shared

_EXAMPLE = """\
  gradloc trace --model openai-community/gpt2 \\
      --probes dynamic_templama.jsonl entities=ecbd_2021.jsonl popular=ecbd_popular.jsonl \\
      --dates 2019-Q2:2022-Q2 --reference wikitext.txt --max-probes 96 --output profile.json"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands,
        "trace",
        run,
        summary="measure which layers react to probes",
        about="Measures the gradient norm of every layer on probes (loss on the span only) and on\n"
        "ordinary text, and their ratio. Trains nothing.",
        example=_EXAMPLE,
    )
    shared.add_model(parser)
    shared.add_probes(parser, required=True)
    add_tracing(parser, required=True)
    shared.add_text_format(parser)
    shared.add_positive(parser, "--batch-size", 8, "sequences a forward pass")
    add_granularity(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("profile.json"),
        metavar="FILE",
        help="the profile (default: %(default)s)",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="the heatmap (default: --output with .png)"
    )
    parser.add_argument("--no-plot", action="store_true", help="no heatmap")
    parser.add_argument(
        "--seed", type=int, default=0, help="of everything drawn (default: %(default)s)"
    )


def add_tracing(parser: Any, *, required: bool) -> None:
    """--reference, --reference-batches and --reference-loss, which `train` has too."""
    parser.add_argument(
        "--reference",
        nargs="+",
        required=required,
        metavar="FILE",
        help="ordinary text to compare with: .txt, .jsonl or .parquet",
    )
    shared.add_positive(
        parser, "--reference-batches", 16, "batches of reference text, from the start"
    )
    choices = ("both", "all", "matched-spans") if required else ("all", "matched-spans")
    parser.add_argument(
        "--reference-loss",
        choices=choices,
        default=choices[0],
        help="the reference's loss falls on all its tokens, as in the paper, or on random spans as "
        "long as the probes', which takes the effect of fewer tokens out (default: %(default)s)",
    )


def add_granularity(parser: Any, *, default: str | None = "submodule") -> None:
    """--granularity, which `train` has too."""
    parser.add_argument(
        "--granularity",
        default=default,
        choices=("submodule", "block", "tensor"),
        help="what one layer is: attention and MLP of a block apart, a block, or a tensor "
        f"(default: {default or 'as in the profile, else submodule'})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Trace, print the table, write the files."""
    from gradloc.files import check_writable
    from gradloc.layers import LayerMap
    from gradloc.trace import trace_gradients

    plot = _plot_path(arguments)
    # What cannot be written or read should show before minutes of work.
    for path in (arguments.output, plot):
        if path is not None:
            check_writable(path)
    probes = shared.read_all_probes(arguments)
    model, tokenizer = shared.load(arguments)
    layers = LayerMap.from_model(model, granularity=arguments.granularity)
    batches, reference = tracing_batches(arguments, probes, model, tokenizer, arguments.batch_size)
    wanted = arguments.reference_loss
    profile = trace_gradients(
        model,
        batches,
        reference,
        layers=layers,
        reference_loss=("all", "matched-spans") if wanted == "both" else wanted,
        seed=arguments.seed,
    )
    profile.save(arguments.output)
    if plot is not None:
        profile.plot(plot)
    print(profile.table())
    print(f"\nprobes: {', '.join(f'{len(ps)} {kind}' for kind, ps in probes.items())}")
    print(f"profile: {arguments.output}" + ("" if plot is None else f"   heatmap: {plot}"))
    return 0


def _plot_path(arguments: argparse.Namespace) -> Path | None:
    """Where the heatmap goes, if anywhere.

    Raises:
        ValueError: a suffix that matplotlib cannot write, the profile's own name, or --no-plot too.
    """
    if arguments.no_plot:
        if arguments.plot is not None:
            raise ValueError("--plot and --no-plot: drop one")
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    plot: Path = arguments.plot or arguments.output.with_suffix(".png")
    known = FigureCanvasAgg.get_supported_filetypes()
    # Without a suffix it is a PNG, as in `GradientProfile.plot`.
    if (plot.suffix[1:].lower() or "png") not in known:
        raise ValueError(f"--plot {plot}: choose a suffix of {', '.join(known)}")
    if plot.resolve() == arguments.output.resolve():
        raise ValueError(
            f"--output {arguments.output}: the heatmap would have the same name: end the profile's "
            "in .json, give --plot another, or use --no-plot"
        )
    return plot


def tracing_batches(
    arguments: argparse.Namespace, probes: Any, model: Any, tokenizer: Any, batch_size: int
) -> tuple[dict[str, Any], list[Any]]:
    """Batches of the probes by kind, and of the reference text, of equally many sequences.

    Says on stderr what was left out, or that batches are smaller than `batch_size`.
    """
    import sys

    from gradloc.probes import even_batches
    from gradloc.training.corpus import text_batches

    length = shared.sequence_length(arguments.max_length, model, "--max-length")
    batches, reference, notes = even_batches(
        probes,
        lambda size: text_batches(
            arguments.reference,
            tokenizer,
            block_size=length,
            batch_size=size,
            max_batches=arguments.reference_batches,
            text_field=arguments.text_field,
            documents=arguments.documents,
        ),
        tokenizer,
        batch_size=batch_size,
        max_length=length,
    )
    for note in notes:
        print(f"tracing: {note}", file=sys.stderr)
    return batches, reference
