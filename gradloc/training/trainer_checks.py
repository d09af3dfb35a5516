"""What of Trainer's settings cannot go with a layer plan, said before training starts.

Changes nothing. Reads TrainingArguments and what Accelerate's launcher puts into the environment.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def check_arguments(args: Any, options: dict[str, Any], *, retraces: bool = False) -> None:
    """Check TrainingArguments, and options for LocalizedAdamW, against one another.

    Args:
        args: TrainingArguments.
        options: keyword arguments of LocalizedAdamW beside Trainer's settings.
        retraces: whether the model will be traced during training.

    Raises:
        ValueError: DeepSpeed; FSDP1; `release_gradients` with gradient accumulation, clipping or
            tracing during training.
    """
    if getattr(args, "deepspeed", None) or _environment("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            f"args.deepspeed={args.deepspeed!r}: DeepSpeed's ZeRO replaces parameters by shards or "
            "flat buffers of many layers (stage 3 leaves empty ones), so no layer can be chosen. "
            "Use DDP, or shard with FSDP2 (args.fsdp='full_shard' and "
            "fsdp_config={'version': 2}, or `accelerate launch` with fsdp_version: 2)"
        )
    version = _fsdp_version(args)
    if version == 1:
        raise ValueError(
            f"args.fsdp={args.fsdp!r} with fsdp_version=1: FSDP1 flattens the parameters of "
            "several layers into one, so no layer can be chosen. Use FSDP2: "
            "fsdp_config={'version': 2}, or fsdp_version: 2 in Accelerate's configuration"
        )
    if options.get("release_gradients"):
        _check_release(args, retraces)


def recomputes_reentrantly(args: Any, model: torch.nn.Module) -> bool:
    """Whether activation checkpointing may be of the reentrant kind.

    That kind gives no gradient to a block whose input needs none, as behind frozen embeddings.
    """
    for module in model.modules():
        recompute = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and recompute is not None:
            return bool(getattr(recompute, "keywords", {}).get("use_reentrant", True))
    new, old = "activation_checkpointing", "gradient_checkpointing"
    if not (getattr(args, new, None) or getattr(args, old, None)):
        return False
    given = getattr(args, f"{new}_kwargs", None) or getattr(args, f"{old}_kwargs", None) or {}
    # Trainers that know the newer name are not reentrant by default; the older ones are.
    return bool(given.get("use_reentrant", not hasattr(args, new)))


def _check_release(args: Any, retraces: bool) -> None:
    steps = args.gradient_accumulation_steps
    if steps > 1:
        raise ValueError(
            f"release_gradients=True with args.gradient_accumulation_steps={steps}: each backward "
            "pass would be a step of its own. Use gradient_accumulation_steps=1 and a larger "
            "batch, or leave release_gradients out"
        )
    if args.max_grad_norm:
        raise ValueError(
            f"release_gradients=True with args.max_grad_norm={args.max_grad_norm!r} (Trainer's "
            "default is 1.0): the norm over all layers is known only when the first ones are "
            "updated already. Set args.max_grad_norm=0, or leave release_gradients out"
        )
    if retraces:
        raise ValueError(
            "release_gradients=True with a policy that traces during training: the backward "
            "passes of the trace would update the model. Use a policy that traces at the start "
            "only, or leave release_gradients out"
        )


def _fsdp_version(args: Any) -> int | None:
    """The version of FSDP that Trainer will use; None without FSDP."""
    if args.fsdp:
        config = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
        # Trainers that know FSDP2 have put their default into the plugin's arguments already.
        plugin = getattr(args, "fsdp_plugin_args", None) or {}
        found = config.get("version", config.get("fsdp_version", plugin.get("fsdp_version")))
        return int(os.environ.get("FSDP_VERSION", 1) if found is None else found)
    if _environment("ACCELERATE_USE_FSDP"):
        return int(os.environ.get("FSDP_VERSION", 1))
    return None


def _environment(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
