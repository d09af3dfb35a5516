"""What several processes of one training run must agree on. Sends no tensors; starts no group."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from gradloc.plan import LayerPlan


def is_distributed() -> bool:
    """Whether this process was started to train together with others.

    Also a launch of one process (`torchrun --nproc-per-node 1`): Trainer wraps the model in DDP
    there, which breaks if frozen layers lose requires_grad afterwards.
    """
    return dist.is_available() and dist.is_initialized()


def agreed(plan: LayerPlan) -> LayerPlan:
    """The first process's plan, in all of them: each must call.

    All trace the same batches, but nothing says that two devices round alike, and a layer that
    trains in one process only would never be found out.
    """
    if not is_distributed():
        return plan
    sent: list[Any] = [(dict(plan.scales), plan.policy)]
    dist.broadcast_object_list(sent, src=0)
    return LayerPlan(*sent[0])


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if is_distributed():
        dist.barrier()
