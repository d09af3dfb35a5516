"""The harness itself: results by rank, and failures that say what every rank saw."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RanksFailed, run_ranks


def report(offset: int) -> tuple[int, int, float]:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), torch.get_num_threads(), float(total)


def fail_on_one(rank: int) -> None:
    print("I am", dist.get_rank())
    if dist.get_rank() == rank:
        raise ValueError("lost it")
    dist.barrier()


def die() -> None:
    os._exit(7)


def sleep() -> None:
    time.sleep(60)


def test_results_by_rank():
    assert run_ranks(report, 3, 10) == [(0, 1, 33.0), (1, 1, 33.0), (2, 1, 33.0)]


def test_a_rank_that_raises_stops_all():
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"(?s)rank (0, )?1 failed.*I am 0.*I am 1.*lost it"):
        run_ranks(fail_on_one, 2, 1)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("function", "message"), [(die, "exit code 7"), (sleep, r"not done after 2 s")]
)
def test_death_and_delay_are_told(function, message):
    with pytest.raises(RanksFailed, match=message):
        run_ranks(function, 2, timeout_s=2.0 if function is sleep else 60.0)
