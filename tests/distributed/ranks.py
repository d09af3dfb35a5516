"""Runs a function in several processes that are joined by gloo, and gives back what each returned.

Processes come from a fork server that has imported the heavy packages once, so that a launch takes
a fraction of a second. It says nothing about models or optimizers.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "transformers.trainer",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "gradloc.optim",
        "pytest",
    ]
)
_GRACE_SECONDS = 3.0  # for the other ranks to say what they saw when one has failed


class RanksFailed(AssertionError):
    """Some rank failed or none came to an end; the message holds every rank's output."""


def run_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Call `function(*args)` in `num_ranks` processes of one gloo group; the results by rank.

    Args:
        function: a function at the top level of a module; its result is passed by `torch.save`.
        num_ranks: number of processes.
        args: arguments, pickled.
        timeout_s: after so many seconds all processes are killed.

    Raises:
        RanksFailed: a process raised, died, or was not done in time.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            _CONTEXT.Process(target=_rank, args=(function, rank, num_ranks, folder, args))
            for rank in range(num_ranks)
        ]
        before = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
        os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # the fork server inherits it
        try:
            for process in processes:
                process.start()
            reason = _join(processes, timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        if reason:
            raise RanksFailed(f"{reason}\n{_outputs(folder, processes)}")
        return [torch.load(folder / f"result{r}", weights_only=False) for r in range(num_ranks)]


def _join(processes: list[Any], timeout_s: float) -> str | None:
    """Wait for all; why it went wrong, if it did."""
    end = time.monotonic() + timeout_s
    reason = None
    while alive := [p for p in processes if p.is_alive()]:
        failed = [rank for rank, p in enumerate(processes) if p.exitcode not in (None, 0)]
        if failed and reason is None:
            reason = _failed(failed)
            end = min(end, time.monotonic() + _GRACE_SECONDS)
        left = end - time.monotonic()
        if left <= 0:
            return reason or f"not done after {timeout_s:g} s"
        wait([p.sentinel for p in alive], timeout=min(left, 0.5))
    failed = [rank for rank, p in enumerate(processes) if p.exitcode != 0]
    return reason or (_failed(failed) if failed else None)


def _failed(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))} failed"


def _outputs(folder: Path, processes: list[Any]) -> str:
    parts = []
    for rank, process in enumerate(processes):
        path = folder / f"output{rank}"
        text = path.read_text(errors="replace")[-3000:] if path.exists() else "(no output)"
        parts.append(f"--- rank {rank}, exit code {process.exitcode} ---\n{text}")
    return "\n".join(parts)


def _rank(
    function: Callable[..., Any], rank: int, num_ranks: int, folder: Path, args: tuple[Any, ...]
) -> None:
    output = os.open(folder / f"output{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    # As torchrun sets them, for Accelerate; the rendezvous is a file all the same.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
    # Only what our own lines cause: torch's distributed code warns of its own plans.
    warnings.filterwarnings("error", module=r"gradloc(\.|$)")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
        )
        result = function(*args)
        dist.barrier()
        dist.destroy_process_group()
        torch.save(result, folder / f"result{rank}")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the others may wait in a collective: no orderly end
    sys.stdout.flush()
