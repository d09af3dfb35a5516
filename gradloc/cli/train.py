"""`gradloc train`: continue the training of a model on chosen layers of it."""

from __future__ import annotations

import argparse
import functools
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradloc.cli import arguments as shared
from gradloc.cli.trace import add_granularity, add_tracing, tracing_batches

if TYPE_CHECKING:
    from gradloc.layers import LayerMap
    from gradloc.policies import Policy
    from gradloc.training.config import TrainConfig
    from gradloc.training.corpus import PackedCorpus
    from gradloc.training.mixing import MixedRows, Replay
    from gradloc.training.train import Tracing, TrainResult

_EXAMPLE = """\
  gradloc train --model openai-community/gpt2 --corpus news-2024.jsonl --profile profile.json \\
      --policy freeze --output run --max-steps 1000
  gradloc train ... --output run --resume      (the same command, after an interruption)"""

# Options (as attributes) that only tracing reads. --reference-loss also chooses what of a --profile
# is used.
_TRACING = (
    *("probes", "dates", "max_probes", "max_length", "reference", "reference_batches"),
    "trace_batch_size",
)
# Which policies read an option.
_OWNERS = {
    **shared.POLICY_OWNERS,
    "retrace_every": ("freeze", "scale", "random"),
    **dict.fromkeys(("profile", *_TRACING), ("freeze", "scale")),
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands,
        "train",
        run,
        summary="continue training on chosen layers",
        about="Continues the training of a model on new text, in the layers that a profile, a plan "
        "or a\npolicy chooses. Hugging Face Trainer runs it; the model ends in OUTPUT/final.",
        example=_EXAMPLE,
    )
    shared.add_model(parser)
    parser.add_argument(
        "--corpus",
        nargs="+",
        required=True,
        metavar="FILE",
        help="the new text: .txt, .jsonl or .parquet",
    )
    parser.add_argument("--output", type=Path, required=True, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a run in OUTPUT")
    _add_choice(parser.add_argument_group("which layers train"))
    _add_replay(parser.add_argument_group("against forgetting"))
    tracing = parser.add_argument_group("tracing, where there is no --profile")
    shared.add_probes(tracing, required=False)
    add_tracing(tracing, required=False)
    shared.add_positive(tracing, "--trace-batch-size", 8, "sequences a pass")
    shared.add_text_format(parser)
    _add_settings(parser.add_argument_group("training"))
    shared.remember_defaults(parser, _OWNERS)


def _add_choice(group: Any) -> None:
    group.add_argument("--profile", type=Path, metavar="FILE", help="a profile of gradloc trace")
    group.add_argument("--plan", type=Path, metavar="FILE", help="a plan, in place of a policy")
    group.add_argument(
        "--policy",
        choices=("freeze", "scale", "all", "random"),
        help="freeze: train where the relative gradient norm is above --threshold; scale: learning "
        "rates in proportion to it; all: every layer; random: a control (default: freeze, if there "
        "is a profile or something to trace)",
    )
    shared.add_policy_options(group)
    group.add_argument(
        "--retrace-every", type=int, metavar="STEPS", help="choose again every so many steps"
    )
    add_granularity(group, default=None)


def _add_replay(group: Any) -> None:
    group.add_argument(
        "--keep",
        nargs="+",
        metavar="FILE",
        help="old text whose blocks are mixed among those of the corpus, evenly",
    )
    group.add_argument(
        "--replay-ratio",
        type=float,
        metavar="X",
        help="old blocks for each block of the corpus (default: 1)",
    )


def _add_settings(group: Any) -> None:
    def number(flag: str, kind: type, default: float | None, what: str) -> None:
        shown = "" if default is None else f" (default: {default})"
        metavar = "N" if kind is int else "X"
        group.add_argument(flag, type=kind, default=default, metavar=metavar, help=what + shown)

    number("--max-steps", int, None, "optimizer steps; without it --epochs says how long")
    number("--epochs", float, 1.0, "passes over the corpus")
    number("--lr", float, 3e-5, "learning rate of a layer with scale 1")
    number("--warmup-steps", int, 0, "steps in which the learning rate rises")
    group.add_argument(
        "--schedule",
        default="linear",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
        help="of the learning rate (default: %(default)s)",
    )
    number("--weight-decay", float, 0.01, "decoupled weight decay")
    number("--max-grad-norm", float, 1.0, "clip the active layers' gradient norm; 0: don't")
    number("--batch-size", int, 8, "blocks a forward pass")
    number("--gradient-accumulation", int, 1, "forward passes a step")
    number("--block-size", int, None, "tokens a block (512, or the model's context if shorter)")
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    group.add_argument(
        "--keep-gradients",
        action="store_true",
        help="compute gradients of frozen layers too (costs time and memory; same result)",
    )
    group.add_argument(
        "--on-freeze",
        choices=("keep", "offload", "drop"),
        default="keep",
        help="moments of a layer that freezes: keep them, move them off the device, or drop them "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--state-dtype", choices=("float32", "bfloat16"), help="of the moments (default: float32)"
    )
    group.add_argument(
        "--stochastic-rounding",
        action="store_true",
        help="round what is stored in bfloat16 stochastically, so that small updates are not lost",
    )
    number("--save-steps", int, 500, "steps between checkpoints")
    number("--keep-checkpoints", int, 2, "how many to keep, at least 2")
    number("--logging-steps", int, 10, "steps between log lines")
    group.add_argument(
        "--log-layer-norms", action="store_true", help="log the gradient norm of every layer"
    )
    number("--seed", int, 0, "of the order of the text, dropout, and what is drawn")
    group.add_argument("--quiet", action="store_true", help="no progress and no log lines")


def run(arguments: argparse.Namespace) -> int:
    """Read everything, train, say where the model is."""
    from gradloc.layers import LayerMap
    from gradloc.plan import LayerPlan
    from gradloc.profile import GradientProfile
    from gradloc.training.config import TrainConfig
    from gradloc.training.corpus import pack_corpus
    from gradloc.training.run_folder import open_run_folder
    from gradloc.training.train import train

    policy = read_policy(arguments)
    mix = _read_mix(arguments)
    config = TrainConfig(
        output=arguments.output,
        max_steps=arguments.max_steps,
        epochs=arguments.epochs,
        learning_rate=arguments.lr,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm or None,
        warmup_steps=arguments.warmup_steps,
        lr_scheduler=arguments.schedule,
        batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation,
        bf16=arguments.bf16,
        seed=arguments.seed,
        freeze_requires_grad=not arguments.keep_gradients,
        on_freeze=arguments.on_freeze,
        state_dtype=arguments.state_dtype,
        stochastic_rounding=arguments.stochastic_rounding,
        save_steps=arguments.save_steps,
        save_total_limit=arguments.keep_checkpoints,
        logging_steps=arguments.logging_steps,
        log_layer_norms=arguments.log_layer_norms,
        device=arguments.device,
        progress=not arguments.quiet,
    )
    # Again in `train`; here before a model is loaded.
    open_run_folder(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    plan = None if arguments.plan is None else LayerPlan.load(arguments.plan)
    profile = None if arguments.profile is None else GradientProfile.load(arguments.profile)
    if profile is not None and profile.granularity == "patterns":
        raise ValueError(
            f"--profile {arguments.profile} was traced with patterns, which cannot be given here: "
            "use gradloc.training.train.train from Python, with "
            "layers=LayerMap.from_model(model, patterns=...)"
        )
    granularity = arguments.granularity or (profile.granularity if profile else "submodule")
    probes = shared.read_all_probes(arguments)
    model, tokenizer = shared.load(arguments)
    layers = LayerMap.from_model(model, granularity=granularity)
    pack = functools.partial(
        pack_corpus,
        tokenizer=tokenizer,
        block_size=shared.sequence_length(arguments.block_size, model, "--block-size"),
        text_field=arguments.text_field,
        documents=arguments.documents,
    )
    corpus = pack(arguments.corpus)
    rows = corpus.dataset
    first = os.environ.get("RANK", "0") == "0"  # of torchrun: the others would say the same
    if first:
        _report_corpus("corpus", corpus)
    if mix is not None:
        keep = pack(arguments.keep)
        if first:
            _report_corpus("keep", keep)
        rows = _mixed(rows, keep.dataset, mix, config)
        # The rows are all that is to be trained on, in the order of the training.
        config = replace(config, epochs=1.0, shuffle=False)
    with _showing_plan_changes(shown=first and not arguments.quiet):
        result = train(
            model,
            tokenizer,
            rows,
            config,
            layers=layers,
            plan=plan,
            policy=policy,
            profile=profile,
            tracing=_tracing(arguments, probes, model, tokenizer),
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            about={
                "model": arguments.model,
                "corpus": [str(path) for path in arguments.corpus],
                "num_documents": corpus.num_documents,
                "num_tokens": corpus.num_tokens,
                **({} if mix is None else {"keep": arguments.keep, "replay_ratio": mix.ratio}),
            },
        )
    if first:
        _report(result, layers)
    return 0


def read_policy(arguments: argparse.Namespace) -> Policy | None:
    """The policy that the arguments ask for; None where there is a plan.

    Raises:
        ValueError: arguments that contradict one another, or nothing says what to train.
    """
    from gradloc.policies import Retrace

    name = arguments.policy
    if arguments.plan is not None:
        ignored = shared.given(arguments, _OWNERS)
        if name or ignored:
            flags = " and ".join(["--policy"] * bool(name) + ignored)
            raise ValueError(f"--plan says what trains, so {flags} cannot: drop one")
        return None
    if name is None:
        if arguments.profile is None and not arguments.probes and not arguments.reference:
            raise ValueError(
                "nothing says which layers train: give --profile, or --probes and --reference, or "
                "--plan, or --policy all"
            )
        name = "freeze"
    shared.check_owners(arguments, name, _OWNERS)
    if arguments.profile is not None and arguments.retrace_every is None:
        if arguments.probes:
            raise ValueError("--profile and --probes: give the profile, or the probes to trace one")
        if ignored := shared.given(arguments, _TRACING):
            raise ValueError(
                f"{' and '.join(ignored)}: --profile is traced already, so nothing reads this: "
                "leave it out"
            )
    if bool(arguments.probes) != bool(arguments.reference):
        raise ValueError("tracing needs both --probes and --reference")
    if arguments.profile and arguments.retrace_every and not arguments.probes:
        raise ValueError(
            "--retrace-every traces again during the run: give --probes and --reference beside "
            "--profile, or leave --retrace-every out"
        )
    if name in ("freeze", "scale") and arguments.profile is None and not arguments.probes:
        raise ValueError(f"--policy {name} needs --profile, or --probes and --reference")
    policy = shared.make_policy(arguments, name)
    return policy if arguments.retrace_every is None else Retrace(policy, arguments.retrace_every)


def _read_mix(arguments: argparse.Namespace) -> Replay | None:
    """What --keep and --replay-ratio ask for."""
    from gradloc.training.mixing import Replay

    if arguments.keep is None:
        if arguments.replay_ratio is not None:
            raise ValueError("--replay-ratio mixes old text in: give it with --keep")
        return None
    return Replay(1.0 if arguments.replay_ratio is None else arguments.replay_ratio)


def _mixed(new: Any, keep: Any, mix: Replay, config: TrainConfig) -> MixedRows:
    """The rows of a whole run: its steps, or its epochs over the new rows and old ones for each."""
    from gradloc.training.mixing import mixed_rows

    if config.max_steps is not None:
        num_processes = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
        rows_a_step = config.batch_size * config.gradient_accumulation_steps * num_processes
        num_rows = config.max_steps * rows_a_step
    else:
        num_rows = math.ceil(config.epochs * len(new) * (1 + mix.ratio))
    return mixed_rows(new, keep, mix=mix, num_rows=num_rows, seed=config.seed)


def _tracing(
    arguments: argparse.Namespace, probes: Any, model: Any, tokenizer: Any
) -> Tracing | None:
    from gradloc.training.train import Tracing

    if not probes:
        return None
    batches, reference = tracing_batches(
        arguments, probes, model, tokenizer, arguments.trace_batch_size
    )
    return Tracing(batches, reference, arguments.reference_loss)


@contextmanager
def _showing_plan_changes(*, shown: bool) -> Iterator[None]:
    """Print on stderr what the package logs: a line for each plan that comes into force."""
    from tqdm.auto import tqdm

    class AboveTheBar(logging.Handler):
        """A line of its own, where a plain handler would write into Trainer's progress bar."""

        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stderr)

    logger = logging.getLogger("gradloc")
    before = logger.level
    handler = AboveTheBar()
    handler.setFormatter(logging.Formatter("gradloc: %(message)s"))
    logger.setLevel(logging.INFO if shown else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _report_corpus(name: str, corpus: PackedCorpus) -> None:
    print(
        f"{name}: {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens in "
        f"{len(corpus.dataset):,} blocks ({corpus.num_dropped_tokens} tokens at the end dropped)"
    )


def _report(result: TrainResult, layers: LayerMap) -> None:
    active = set(result.plan.active)
    sizes = {layer.name: layer.num_elements for layer in layers}
    share = sum(sizes[name] for name in active) / sum(sizes.values())
    loss = "" if result.final_loss is None else f", loss {result.final_loss:.3f}"
    print(
        f"trained {len(active)} of {len(layers)} layers ({share:.0%} of the parameters), "
        f"{result.num_steps:,} steps in {result.seconds:,.0f} s{loss}"
    )
    if result.num_skipped_steps:
        print(f"{result.num_skipped_steps} steps were skipped: a gradient was not finite")
    print(f"optimizer moments: {result.optimizer_bytes / 2**20:,.1f} MiB")
    print(f"model: {result.folder}   plan: {result.folder.parent / 'plan.json'}")
