"""Arguments that several commands share, and what they stand for. No command of its own.

Parsing says what the user wrote; the functions that read models, probes and text run later and
raise ValueError or OSError with the remedy.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from gradloc.policies import Policy
    from gradloc.probes import Probe

_KIND = re.compile(r"([A-Za-z][\w.-]*)=(.+)")
_LONGEST = 512
# Which policies read an option that `add_policy_options` or --reference-loss adds.
POLICY_OWNERS = {
    "threshold": ("freeze",),
    "normaliser": ("scale",),
    "random_layers": ("random",),
    **dict.fromkeys(("kinds", "reference_loss"), ("freeze", "scale")),
}


def add_command(
    commands: Any, name: str, run: Any, *, summary: str, about: str, example: str
) -> argparse.ArgumentParser:
    """Add a command with the options that all have."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=about,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def add_model(parser: Any) -> None:
    """--model and --device."""
    parser.add_argument(
        "--model", required=True, help="a Hugging Face id, a model folder, or a .gguf file"
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu"),
        help="auto: a CUDA device where there is one (default: %(default)s)",
    )


def add_probes(parser: Any, *, required: bool) -> None:
    """--probes, --dates, --max-probes and --max-length."""
    parser.add_argument(
        "--probes",
        nargs="+",
        required=required,
        default=[],
        metavar="[KIND=]FILE",
        help="probe files: TempLAMA, ECBD, or JSON lines with text and spans; KIND= names the "
        "kind of the file's probes (for TempLAMA: keeps the probes of that kind)",
    )
    parser.add_argument(
        "--dates",
        type=_dates,
        metavar="OLD:NEW",
        help="the two dates to compare in TempLAMA files, such as 2019-Q2:2022-Q2",
    )
    parser.add_argument(
        "--max-probes",
        type=_positive,
        metavar="N",
        help="at most N probes of each kind, drawn by --seed (default: all)",
    )
    parser.add_argument(
        "--max-length",
        type=_positive,
        metavar="TOKENS",
        help=f"tokens a sequence (default: {_LONGEST}, or the model's context if shorter)",
    )


def add_text_format(parser: Any) -> None:
    """--text-field and --documents."""
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field that holds the text in .jsonl and .parquet files (default: %(default)s)",
    )
    parser.add_argument(
        "--documents",
        default="line",
        choices=("line", "paragraph", "file"),
        help="what a document of a .txt file is (default: %(default)s)",
    )


def add_policy_options(group: Any) -> None:
    """--threshold, --normaliser, --random-layers and --kinds; --policy is each command's own."""
    group.add_argument(
        "--threshold",
        type=_threshold,
        metavar="T",
        help="of freeze: mean, quantile:0.5, top-k:8, bottom-k:8, or a number (default: mean)",
    )
    group.add_argument(
        "--normaliser", choices=("mean", "max"), help="of scale: what counts as 1 (default: mean)"
    )
    group.add_argument(
        "--random-layers", type=int, metavar="N", help="of random: how many (default: half)"
    )
    group.add_argument("--kinds", nargs="+", metavar="KIND", help="use these kinds of probes only")


def remember_defaults(parser: argparse.ArgumentParser, options: Iterable[str]) -> None:
    """Keep the defaults of these options (as attributes), for `given`."""
    parser.set_defaults(untouched={name: parser.get_default(name) for name in options})


def given(arguments: argparse.Namespace, options: Iterable[str]) -> list[str]:
    """Flags of the options that are not at their defaults."""
    return [
        "--" + option.replace("_", "-")
        for option in options
        if getattr(arguments, option) != arguments.untouched[option]
    ]


def check_owners(
    arguments: argparse.Namespace, policy: str, owners: Mapping[str, tuple[str, ...]]
) -> None:
    """Refuse options that the policy does not read: ignoring them would be a silent surprise.

    Raises:
        ValueError: names the first such option and the policies that read it.
    """
    for option, readers in owners.items():
        for flag in given(arguments, [option]):
            if policy not in readers:
                raise ValueError(f"{flag} is for --policy {' or '.join(readers)}, not {policy}")


def make_policy(arguments: argparse.Namespace, name: str) -> Policy:
    """The policy of this name with the options that were given.

    Raises:
        ValueError: an option out of range.
    """
    from gradloc.policies import AllLayers, RandomLayers, TracedGradientPolicy

    if name == "all":
        return AllLayers()
    if name == "random":
        return RandomLayers(count=arguments.random_layers, seed=arguments.seed)
    return TracedGradientPolicy(
        mode=name,
        threshold="mean" if arguments.threshold is None else arguments.threshold,
        normaliser=arguments.normaliser or "mean",
        reference_loss=arguments.reference_loss,
        kinds=arguments.kinds,
    )


def add_positive(parser: Any, flag: str, default: int, what: str) -> None:
    """A whole number of at least 1."""
    parser.add_argument(
        flag, type=_positive, default=default, metavar="N", help=f"{what} (default: %(default)s)"
    )


def load(arguments: argparse.Namespace) -> tuple[torch.nn.Module, Any]:
    """The model, on its device, and the tokenizer."""
    import torch

    from gradloc.models import load_model
    from gradloc.training.model_guard import without_saving_bars

    _drop_loss_type_warning()
    print(f"loading {arguments.model}", file=sys.stderr)
    with without_saving_bars():
        model, tokenizer = load_model(arguments.model)
    if arguments.device == "auto" and torch.cuda.is_available():
        model = model.to("cuda")
    return model, tokenizer


def load_outline(name: str) -> torch.nn.Module:
    """The model's modules, parameter names and shapes, in float32 as `load` gives them.

    Made from its configuration on the meta device, which reads no weights. Where that cannot be
    done the model is loaded.

    Raises:
        OSError, ValueError: as `gradloc.models.load_model`.
    """
    import torch
    import transformers

    from gradloc.models import load_model
    from gradloc.training.model_guard import without_saving_bars

    _drop_loss_type_warning()
    path = Path(name).expanduser()
    gguf = path.suffix.lower() == ".gguf"
    with without_saving_bars():
        try:
            config = transformers.AutoConfig.from_pretrained(
                str(path.parent) if gguf else str(path) if path.is_dir() else name,
                **({"gguf_file": path.name} if gguf else {}),
            )
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")  # advice for generating text
                model = transformers.AutoModelForCausalLM.from_config(config)
            outline: torch.nn.Module = model.float()
            return outline
        except Exception:  # of any kind, for a broken file or a model that needs real weights
            print(f"loading {name}", file=sys.stderr)
            return load_model(name)[0]


def _drop_loss_type_warning() -> None:
    """Some versions of transformers warn of every GPT-2 that its loss is the default one.

    A logger's filter sees only what is logged under its own name; a handler's, what any module of
    transformers logs.
    """
    from transformers.utils import logging as theirs

    # Asking for the logger makes transformers' handler, if it is not there yet.
    library = theirs.get_logger("transformers")
    for place in (theirs.get_logger("transformers.modeling_utils"), *library.handlers):
        place.addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return "`loss_type=None`" not in record.getMessage()


def sequence_length(wanted: int | None, model: torch.nn.Module, flag: str) -> int:
    """Tokens a sequence: what was asked for, if the model can read it.

    Raises:
        ValueError: more than the model's context.
    """
    from gradloc.models import context_length

    context = context_length(model)
    if wanted is None:
        return _LONGEST if context is None else min(_LONGEST, context)
    if context is not None and wanted > context:
        raise ValueError(f"{flag} {wanted}: the model reads at most {context} tokens")
    return wanted


def read_all_probes(arguments: argparse.Namespace) -> dict[str, list[Probe]]:
    """The probes of all files by kind, with at most --max-probes of each.

    Raises:
        ValueError, OSError: as `gradloc.probes.read_probes`.
    """
    from gradloc.probes import by_kind, read_probes

    found: list[Probe] = []
    for given in arguments.probes:
        match = _KIND.fullmatch(given)
        # A file may have "=" in its name; what exists is meant.
        kind, path = (None, given) if match is None or Path(given).exists() else match.groups()
        found += read_probes(path, kind=kind, dates=arguments.dates)
    grouped = by_kind(found)
    most = arguments.max_probes
    for kind, probes in grouped.items():
        if most is not None and len(probes) > most:
            # A string mixes seed and kind (sha512); the order of the file is kept.
            drawn = random.Random(f"gradloc {arguments.seed} {kind}").sample(
                range(len(probes)), most
            )
            grouped[kind] = [probes[index] for index in sorted(drawn)]
    return grouped


def _dates(text: str) -> tuple[str, str]:
    old, colon, new = text.partition(":")
    if not (old and colon and new):
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD:NEW, such as 2019-Q2:2022-Q2")
    return old, new


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _threshold(text: str) -> Any:
    """What `TracedGradientPolicy` takes; it checks the ranges."""
    name, colon, value = text.replace("_", "-").partition(":")
    try:
        if text == "mean":
            return "mean"
        if name == "quantile" and colon:
            return ("quantile", float(value))
        if name in ("top-k", "bottom-k") and colon:
            return (name.replace("-", "_"), int(value))
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of mean, quantile:0.5, top-k:8, bottom-k:8, or a number such as 1.2"
        ) from None
