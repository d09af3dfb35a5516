r"""Claims (a) and (b): has each kind of knowledge its own layer profile, above ordinary text's?

Traces every batch once, keeps each batch's norms (a file a part, so that a run that was stopped
goes on where it was), and hands over to `profiles_report` for tables and charts. Trains nothing.

    python experiments/profiles.py --world real --model SmolLM2-135M-Instruct.Q4_1.gguf \
        --data data --output experiments/results/profiles-real
    python experiments/profiles.py --world english --seeds 0 1 --short-tokens 1 --batch-size 2 \
        --model SmolLM2-135M-Instruct.Q4_1.gguf --data data \
        --output experiments/results/profiles-english
    python experiments/profiles.py --world toy --seeds 0 1 2 3 4 --short-tokens 1 \
        --bases RUN/bases \
        --output experiments/results/profiles-toy
    python experiments/profiles.py --summarize --output experiments/results/profiles-real
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from profiles_analysis import SCHEMA, VERSION
from profiles_report import summarize
from profiles_worlds import World, base_world, english_world, real_world

from gradloc import LayerMap
from gradloc.compare.profiles import (
    first_tokens,
    matched_spans,
    placed_spans,
    surprising_spans,
    trace_each,
)
from gradloc.files import read_json, write_json
from gradloc.matched_spans import IGNORED
from gradloc.probes import Probe, encode_probe, probe_batches
from gradloc.training.corpus import text_batches

# Ordinary text in the place of probes: spans as short as those of these kinds.
CONTROLS = ("updated", "new")
# Texts among which the one as hard to predict as a probe is looked for.
CANDIDATES = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace what is missing, then write tables and charts."""
    given = _parser().parse_args(arguments)
    if not given.summarize:
        torch.set_num_threads(given.threads)
        for seed in given.seeds:
            trace_seed(given, seed)
    for line in summarize(given.output, num_permutations=given.permutations):
        print(line)
    return 0


def trace_seed(given: argparse.Namespace, seed: int) -> None:
    """Trace the parts of one seed that are missing.

    Raises:
        ValueError: the folder holds parts that other settings gave.
    """
    folder = given.output / f"seed-{seed}"
    settings = {
        "world": given.world,
        "model": Path(given.model).name if given.model else "bases",
        "batch_size": given.batch_size,
        "max_probes": given.max_probes,
        "reference_batches": given.reference_batches,
        "max_length": given.max_length,
        "short_tokens": given.short_tokens,
        "seed": seed,
    }
    about = folder / "about.json"
    if about.is_file():
        found = read_json(about, schema=SCHEMA, version=VERSION)
        if found["settings"] != settings:
            raise ValueError(
                f"{about} was made with {json.dumps(found['settings'])}, not "
                f"{json.dumps(settings)}: choose another --output"
            )
        if all((folder / f"{name}.json").is_file() for name in found["parts"]):
            return
    world = read_world(given, seed)
    layers = LayerMap.from_model(world.model)
    parts = make_parts(world, given, seed)
    from gradloc.compare.machine import machine

    content = {
        "settings": settings,
        "parts": list(parts),
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "block": layer.block,
                "num_elements": layer.num_elements,
            }
            for layer in layers
        ],
        "machine": machine(),
    }
    write_json(about, content, schema=SCHEMA, version=VERSION)
    for number, (name, make) in enumerate(parts.items(), 1):
        path = folder / f"{name}.json"
        if path.is_file():
            continue
        batches = make()
        print(
            f"seed {seed}, part {number}/{len(parts)}: {name}, {len(batches)} batches", flush=True
        )
        traced = trace_each(world.model, batches, layers=layers)
        body = {"context_tokens": context_tokens(batches), **traced.to_json()}
        write_json(path, body, schema=SCHEMA, version=VERSION)


def read_world(given: argparse.Namespace, seed: int) -> World:
    """The world that the command names.

    Raises:
        ValueError: an option that it needs is missing.
    """
    if given.world == "toy":
        if given.bases is None:
            raise ValueError("--world toy needs --bases: RUN/bases of a `gradloc compare`")
        return base_world(given.bases / f"seed-{seed}", seed)
    if not given.model or given.data is None:
        raise ValueError(f"--world {given.world} needs --model and --data")
    if given.world == "real":
        return real_world(given.model, given.data, seed)
    return english_world(given.model, given.data, given.output / "known.json", seed)


def make_parts(
    world: World, given: argparse.Namespace, seed: int
) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Name -> what makes its batches, those first whose results say most.

    `probes`: spans whole; `all`: reference text, loss on every token; `matched`: the same text with
    random spans as long as a kind's; `placed`: the same text in a kind's shape, context and span;
    `surprising`: other text in that shape, as hard to predict as the probes; `short`: the first
    tokens of every kind's spans, and of random spans; `control`: other text with random spans, to
    be treated as if it were a kind.
    """
    size, most = given.batch_size, given.max_probes

    def batched(probes: Sequence[Probe]) -> list[dict[str, Any]]:
        return probe_batches(
            probes,
            world.tokenizer,
            batch_size=size,
            max_length=given.max_length,
            whole_batches=True,
        )

    whole, short = {}, {}
    for kind, probes in world.probes.items():
        order = list(probes)
        random.Random(f"profiles {seed} {kind}").shuffle(order)
        whole[kind] = batched(order[:most])
        long_enough = [
            probe
            for probe in order
            if _num_scored(probe, world.tokenizer, given.max_length) >= given.short_tokens
        ]
        short[kind] = first_tokens(batched(long_enough[:most]), given.short_tokens)
    num_control = max(len(batches) for batches in whole.values())
    reference, control, *candidates = text_samples(
        world, given, seed, counts=(given.reference_batches, num_control)
    )
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {}
    for kind in whole:
        parts[f"probes-{kind}"] = lambda kind=kind: whole[kind]
    parts["all"] = lambda: reference
    for kind in whole:
        parts[f"matched-{kind}"] = lambda kind=kind: matched_spans(
            reference, whole[kind], seed=seed, kind=kind
        )
    for kind in whole:
        parts[f"short-{kind}"] = lambda kind=kind: short[kind]
    parts["short-reference"] = lambda: matched_spans(
        reference, next(iter(short.values())), seed=seed, kind="short"
    )
    for kind in CONTROLS:
        if kind in whole:
            parts[f"control-{kind}"] = lambda kind=kind: matched_spans(
                control, whole[kind], seed=seed, kind=f"control {kind}"
            )
    for kind in whole:
        parts[f"placed-{kind}"] = lambda kind=kind: placed_spans(reference, whole[kind])
    if candidates:
        for kind in whole:
            parts[f"surprising-{kind}"] = lambda kind=kind: surprising_spans(
                world.model, candidates, whole[kind]
            )
    return parts


def _num_scored(probe: Probe, tokenizer: Any, max_length: int) -> int:
    labels = encode_probe(probe, tokenizer, max_length)["labels"]
    return sum(label != IGNORED for label in labels)


def context_tokens(batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
    """Mean number of tokens before the first that is scored."""
    counts = [
        int(row.ne(IGNORED)[1:].nonzero()[0]) + 1 for batch in batches for row in batch["labels"]
    ]
    return sum(counts) / len(counts)


def text_samples(
    world: World, given: argparse.Namespace, seed: int, *, counts: tuple[int, int]
) -> list[list[dict[str, Any]]]:
    """Disjoint samples of blocks from all over the text: neighbouring ones are alike.

    Returns:
        As many batches as each of `counts` says, and up to CANDIDATES further lists as long as the
        first, as far as the text goes.
    """
    blocks = text_batches(
        world.text_files, world.tokenizer, block_size=given.max_length, batch_size=1
    )
    random.Random(f"profiles {seed} text").shuffle(blocks)
    size = given.batch_size
    needed = sum(counts) * size
    if len(blocks) < needed:
        raise ValueError(
            f"the text makes {len(blocks)} blocks of {given.max_length} tokens, {needed} are "
            "needed: give more text, or a smaller --reference-batches or --max-probes"
        )
    further = min(CANDIDATES, (len(blocks) - needed) // (counts[0] * size))
    samples, start = [], 0
    for count in (*counts, *[counts[0]] * further):
        rows = torch.cat([block["input_ids"] for block in blocks[start : start + count * size]])
        start += count * size
        samples.append(
            [
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
                for ids in rows.split(size)
            ]
        )
    return samples


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=("real", "toy", "english"), default="real")
    parser.add_argument(
        "--model", metavar="MODEL", help="an id, a folder or a .gguf file (real, english)"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="TempLAMA, ECBD, WikiText (english: WikiText)"
    )
    parser.add_argument("--bases", type=Path, metavar="FOLDER", help="RUN/bases (toy)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--summarize", action="store_true", help="only tables and charts, no model")
    parser.add_argument("--max-probes", type=int, default=96, help="a kind")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a batch")
    parser.add_argument("--reference-batches", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64, help="tokens a sequence")
    parser.add_argument("--permutations", type=int, default=1999, help="of the tests of kinds")
    parser.add_argument(
        "--short-tokens",
        type=int,
        default=2,
        help="scored of every span in the short parts, so that spans differ in nothing but kind",
    )
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
