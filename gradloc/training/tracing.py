"""What a training run traces with, and the trace itself under the run's mixed precision.

Chooses no layer and knows no Trainer loop; `LocalizationCallback` says when.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from gradloc.layers import LayerMap
from gradloc.plan import LayerPlan
from gradloc.policies import Policy, needs_profile, retrace_every
from gradloc.profile import GradientProfile
from gradloc.trace import trace_gradients


@dataclass(frozen=True)
class Tracing:
    """What to trace with: the arguments of `trace_gradients` that a run repeats.

    Args:
        probes: batches, or {kind: batches}; lists, as re-tracing reads them again.
        reference: batches of ordinary text.
        reference_loss: "all", "matched-spans", or both.
    """

    probes: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]]
    reference: Sequence[Mapping[str, Any]]
    reference_loss: str | Sequence[str] = "all"

    def trace(
        self, model: torch.nn.Module, layers: LayerMap, args: Any, step: int
    ) -> GradientProfile:
        """Trace now; the model stays as it is.

        Args:
            model: the model itself, not what DDP or a compiler wraps around it.
            layers: its layers.
            args: Trainer's; gives precision, seed and whether a bar is shown.
            step: the optimizer step that the profile is of.
        """
        # The same precision before Trainer has wrapped the model and after.
        with _autocast(args):
            return trace_gradients(
                model,
                self.probes,
                self.reference,
                layers=layers,
                reference_loss=self.reference_loss,
                seed=args.seed,
                progress=not args.disable_tqdm,
                step=step,
            )


def check_choice(
    layers: LayerMap,
    plan: LayerPlan | None,
    policy: Policy | None,
    profile: GradientProfile | None,
    tracing: Tracing | None,
) -> None:
    """Check that it is clear what trains, and that what the policy needs is there.

    Raises:
        ValueError: neither plan nor policy or both; a plan or profile of other layers; a plan that
            trains nothing; a policy that needs a profile where none is and none can be traced.
    """
    if (plan is None) == (policy is None):
        raise ValueError(
            "give either plan or policy: a plan by hand, or a policy that chooses the layers "
            "(AllLayers() trains everything)"
        )
    if plan is not None:
        checked_plan(plan, layers)
    if profile is not None:
        profile.check(layers)
    if policy is not None and needs_profile(policy) and tracing is None:
        every = retrace_every(policy)
        if every is not None:
            raise ValueError(
                f"the policy traces again during the run, every {every} steps: give probes and "
                "reference batches (tracing)"
            )
        if profile is None:
            raise ValueError(
                "the policy needs a profile: give one, or probes and reference batches (tracing); "
                f"or set `{_said(policy)}.needs_profile = False` if it reads only layer names"
            )


def _said(policy: Policy) -> str:
    """The name of a function of the user's own; of anything else, the word."""
    name = getattr(policy, "__name__", "policy")
    return name if name.isidentifier() else "policy"


def checked_plan(plan: LayerPlan, layers: LayerMap) -> LayerPlan:
    """The plan, if it fits the layers and trains some of them.

    Raises:
        ValueError: it does not.
    """
    plan.check(layers.names)
    if not plan.active:
        raise ValueError(
            f"the plan ({plan.policy}) freezes all {len(plan.scales)} layers: nothing would "
            "train; lower the threshold or choose another policy"
        )
    return plan


def _autocast(args: Any) -> AbstractContextManager[Any]:
    kind = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    # Of `accelerate launch --mixed_precision`, which Trainer follows where args say nothing.
    kind = kind or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind)
    return nullcontext() if dtype is None else torch.autocast(args.device.type, dtype)
