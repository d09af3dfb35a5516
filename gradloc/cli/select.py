"""`gradloc select`: make a plan file from a profile, and show what it chooses. Trains nothing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradloc.cli import arguments as shared

if TYPE_CHECKING:
    from gradloc.plan import LayerPlan
    from gradloc.profile import GradientProfile

_EXAMPLE = """\
  gradloc select profile.json --threshold top-k:8 --output plan.json
  gradloc select profile.json --policy scale --model openai-community/gpt2   (and its memory)"""
_OWNERS = {**shared.POLICY_OWNERS, "seed": ("random",)}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands,
        "select",
        run,
        summary="make a plan file from a profile",
        about="Chooses layers by a profile of gradloc trace and writes them as a plan, which\n"
        "gradloc train --plan takes and gradloc export writes for other trainers.",
        example=_EXAMPLE,
    )
    parser.add_argument("profile", type=Path, metavar="PROFILE", help="a profile of gradloc trace")
    parser.add_argument(
        "--policy",
        default="freeze",
        choices=("freeze", "scale", "all", "random"),
        help="freeze: train where the relative gradient norm is above --threshold; scale: learning "
        "rates in proportion to it; all: every layer; random: a control (default: %(default)s)",
    )
    shared.add_policy_options(parser)
    parser.add_argument(
        "--reference-loss",
        default="all",
        choices=("all", "matched-spans"),
        help="of freeze and scale: the reference that the norms are taken against "
        "(default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random (default: %(default)s)")
    parser.add_argument(
        "--model",
        help="the model (id, folder or .gguf): check that the plan fits, and show what memory it "
        "takes to train in float32; weights are not loaded",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("plan.json"),
        metavar="FILE",
        help="the plan (default: %(default)s)",
    )
    shared.remember_defaults(parser, _OWNERS)


def run(arguments: argparse.Namespace) -> int:
    """Choose, show, write."""
    from gradloc.files import check_writable
    from gradloc.profile import GradientProfile

    shared.check_owners(arguments, arguments.policy, _OWNERS)
    policy = shared.make_policy(arguments, arguments.policy)
    check_writable(arguments.output)
    profile = GradientProfile.load(arguments.profile)
    if arguments.output.resolve() == arguments.profile.resolve():
        raise ValueError(f"--output {arguments.output} is the profile itself: choose another name")
    plan = policy(profile)
    memory = None if arguments.model is None else _memory(plan, profile, arguments.model)
    plan.save(arguments.output)
    used = profile.with_reference(arguments.reference_loss) if _traced(arguments) else profile
    if arguments.kinds is not None:
        used = used.with_kinds(arguments.kinds)
    print(_table(plan, used.relative))
    print(f"\n{_summary(plan, profile)}")
    if memory is not None:
        print(f"\n{memory}\n")
    print(f"plan: {arguments.output}")
    return 0


def _traced(arguments: argparse.Namespace) -> bool:
    """Whether the policy reads the profile's norms, and so chose their reference."""
    return arguments.policy in ("freeze", "scale")


def _memory(plan: LayerPlan, profile: GradientProfile, name: str) -> Any:
    from gradloc.layers import LayerMap

    model = shared.load_outline(name)
    if profile.granularity == "patterns":
        raise ValueError(
            "--model with a profile that was traced with patterns, which cannot be given here: use "
            "LayerPlan.memory from Python, with layers=LayerMap.from_model(model, patterns=...)"
        )
    layers = LayerMap.from_model(model, granularity=profile.granularity)
    profile.check(layers)
    return plan.memory(model, layers=layers)


def _table(plan: LayerPlan, ratios: Mapping[str, float]) -> str:
    width = max(map(len, ("layer", *plan.scales)))
    lines = [f"{'layer':<{width}}  {'R':>8}  {'scale':>8}"]
    lines.append("-" * len(lines[0]))
    for name, scale in plan.scales.items():
        # A dash is seen where a column of numbers would have to be read.
        shown = f"{scale:.4g}" if scale > 0 else "-"
        lines.append(f"{name:<{width}}  {ratios[name]:>8.4g}  {shown:>8}")
    return "\n".join(lines)


def _summary(plan: LayerPlan, profile: GradientProfile) -> str:
    sizes = {layer.name: layer.num_elements for layer in profile.layers}
    active = plan.active
    share = ""
    if all(sizes.values()):  # 0 where the profile does not know
        trained, total = sum(sizes[name] for name in active), sum(sizes.values())
        share = f", {trained:,} of {total:,} parameters ({trained / total:.1%})"
    return f"{len(active)} of {len(plan.scales)} layers train{share}: {plan.policy}"
