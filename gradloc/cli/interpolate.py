"""`gradloc interpolate`: go a part of the way from the old weights to the trained ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradloc.cli import arguments as shared

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from gradloc.probes import Probe
    from gradloc.training.interpolation import AlphaChoice

_EXAMPLE = """\
  gradloc interpolate --model run/final --old openai-community/gpt2 --alpha 0.6 --output model
  gradloc interpolate --model run/final --old openai-community/gpt2 --alpha 1 0.8 0.6 0.4 \\
      --probes new=validation.jsonl unchanged=known.jsonl --output model"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands,
        "interpolate",
        run,
        summary="keep only a part of what training changed",
        about="Writes old + alpha * (trained - old), parameter by parameter: much of what was\n"
        "learned stays, and much of what was forgotten comes back, with no more training. Of\n"
        "several alphas it takes the one with the lowest loss on --probes, each kind of which\n"
        "counts the same: give facts to learn and facts to keep, and report on others.",
        example=_EXAMPLE,
    )
    shared.add_model(parser)
    parser.add_argument("--old", required=True, metavar="MODEL", help="what it was trained from")
    parser.add_argument(
        "--alpha",
        type=float,
        nargs="+",
        required=True,
        metavar="X",
        help="in [0, 1]: 1 is the trained model, 0 the old one; several to choose from",
    )
    parser.add_argument("--output", type=Path, required=True, help="the new model's folder")
    shared.add_probes(parser, required=False)
    shared.add_positive(parser, "--batch-size", 8, "probes a forward pass")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the draw of --max-probes (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Load both, choose, write."""
    from gradloc.files import replacing_folder
    from gradloc.models import load_model
    from gradloc.training.interpolation import interpolate, weights_of
    from gradloc.training.model_guard import without_saving_bars

    _check(arguments)
    probes = [probe for group in shared.read_all_probes(arguments).values() for probe in group]
    model, tokenizer = shared.load(arguments)
    with without_saving_bars():
        old_weights = weights_of(load_model(arguments.old)[0])
    alpha = arguments.alpha[0]
    if len(arguments.alpha) > 1:
        choice, table = _chosen(arguments, model, tokenizer, probes, old_weights)
        from rich.console import Console

        Console().print(table)
        alpha = choice.alpha
    interpolate(model, old_weights, alpha)
    with without_saving_bars(), replacing_folder(arguments.output) as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
    print(f"alpha {alpha:g}: {arguments.output}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for what needs no model to be seen."""
    for alpha in arguments.alpha:
        if not 0 <= alpha <= 1:
            raise ValueError(f"--alpha {alpha:g}: a number in [0, 1]; 1 is the trained model")
    several = len(arguments.alpha) > 1
    if several and not arguments.probes:
        raise ValueError(
            f"{len(arguments.alpha)} alphas and nothing to choose by: give --probes, or one --alpha"
        )
    if arguments.probes and not several:
        raise ValueError("--probes choose among alphas, and there is one: give several, or none")
    output = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} is there already: choose a new folder")


def _chosen(
    arguments: argparse.Namespace,
    model: torch.nn.Module,
    tokenizer: Any,
    probes: list[Probe],
    old_weights: dict[str, torch.Tensor],
) -> tuple[AlphaChoice, Table]:
    """The best weight, and a table of what each weight gives."""
    from rich.table import Table

    from gradloc.evaluate import evaluate_probes
    from gradloc.training.interpolation import choose_alpha

    length = shared.sequence_length(arguments.max_length, model, "--max-length")
    nll: list[dict[str, float]] = []

    def objective() -> float:
        scores = evaluate_probes(
            model, tokenizer, probes, batch_size=arguments.batch_size, max_length=length
        )
        nll.append({kind: score.nll for kind, score in scores.items()})
        return sum(nll[-1].values()) / len(nll[-1])

    choice = choose_alpha(model, old_weights, objective, arguments.alpha)
    table = Table(title="loss in nats a token", title_justify="left")
    table.add_column("alpha")
    for kind in (*nll[0], "mean"):
        table.add_column(kind, justify="right")
    for (alpha, mean), scores in zip(choice.values.items(), nll, strict=True):
        mark = " *" if alpha == choice.alpha else ""
        table.add_row(f"{alpha:g}{mark}", *(f"{x:.3f}" for x in (*scores.values(), mean)))
    return choice, table
