"""Killed with SIGKILL five times, also while a checkpoint is written: the same bits at the end.

The killed processes are in killed_runs. GRADLOC_KILL_SEED draws other moments.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SEED = int(os.environ.get("GRADLOC_KILL_SEED", "1"))


def load(file):
    # numpy's random state among it, from a file that this test had written.
    return torch.load(file, weights_only=False)


def assert_same(found, expected, where):
    """Equal to the last bit, through dicts and lists of tensors, arrays and plain values."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        worst = (found.double() - expected.double()).abs().max() if expected.numel() else 0
        assert torch.equal(found, expected), f"{where}: off by {worst}"
    elif hasattr(expected, "tobytes"):
        assert found.tobytes() == expected.tobytes(), where
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs, in one process and its children: importing transformers takes seconds."""
    folder = tmp_path_factory.mktemp("runs")
    lives = subprocess.run(
        [sys.executable, HERE / "killed_runs.py", folder, str(SEED)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    told = [line for line in lives.stdout.splitlines() if "from" in line or "seed" in line]
    print("\n".join(told))
    assert lives.returncode == 0, lives.stdout[-2000:] + lives.stderr[-4000:]
    assert sum(", killed" in line for line in told) == 4 * 5
    return folder


@pytest.mark.parametrize("policy", ["random", "traced"])
@pytest.mark.parametrize("api", ["plain", "train"])
def test_killed_five_times_ends_in_the_same_bits(runs, api, policy):
    folder = runs / f"{api}-{policy}"
    lives = json.loads((folder / "lives.json").read_text())
    assert [life["killed"] for life in lives] == [True] * 5 + [False]
    for life in lives:  # one that came after the end of the run takes no step
        assert life["began"] == (life["complete"] if life["complete"] < 32 else None), life
    resumed = [life for life in lives[1:] if life["complete"] > 0]
    assert len(resumed) >= 3, f"too many lives began anew: {lives}"
    whole, killed = (
        sorted((folder / run).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        for run in ("whole", "killed")
    )
    assert whole[-1].name == killed[-1].name == "checkpoint-32"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert_same(load(killed[-1] / name), load(whole[-1] / name), name)
    names = ["model.safetensors", "plan.json"] + ["profile.json"] * (policy == "traced")
    for name in names:
        assert (killed[-1] / name).read_bytes() == (whole[-1] / name).read_bytes(), name
    logs = [
        json.loads((run[-1] / "trainer_state.json").read_text())["log_history"]
        for run in (killed, whole)
    ]
    assert_same(*logs, "log_history")
    plans = {json.dumps(json.loads((p / "plan.json").read_text())["scales"]) for p in whole}
    assert len(plans) > 1, "the plan never changed"
    if api == "train":
        for name in ("plan.json", "final/model.safetensors"):
            files = [folder / run / name for run in ("whole", "killed")]
            assert files[0].read_bytes() == files[1].read_bytes(), name
