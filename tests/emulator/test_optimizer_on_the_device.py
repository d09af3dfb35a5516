"""The optimizer's own tests, and torch's for optimizers, with CUDA kernels doing all of the work.

A run of its own, in which CPU tensors are those of the emulated device. Left out are the tests of
what differs there on purpose: capturable=True is accepted, and a first step that is skipped on the
device leaves state behind, zeros, since the host does not wait to learn of it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import emulator_build
import pytest

TESTS = Path(__file__).parents[1]
FILES = (
    *("test_torch_optimizer_suite.py", "test_torch_optimizer_suite_hooks.py"),
    *("test_torch_optimizer_suite_state.py", "test_torch_optimizer_suite_training.py"),
    *("test_optim.py", "test_optim_plan.py", "test_optim_state.py", "test_optim_precision.py"),
    *("test_recadam.py", "test_recadam_state.py"),
)
ON_PURPOSE = (
    "not test_refused_options and not (leave_everything_as_it_was and first and skip) "
    "and not a_skipped_step_takes_back_moments"
)


@pytest.fixture(scope="module")
def run() -> subprocess.CompletedProcess[str]:
    emulator_build.build()  # here, where a failure shows as what it is
    command = [sys.executable, "-m", "pytest", "-q", "-p", "emulated_plugin", "-k", ON_PURPOSE]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *FILES],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_pass(run):
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_what_ran(run):
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 200, run.stdout[-500:]
    suite = re.search(r"torch optimizer suite: (\d+) tests in (\d+) cases", run.stdout)
    if suite is None:  # torch's harness cannot be imported: the reason is in the other run
        assert "torch's optimizer test harness" in run.stdout
    else:
        assert int(suite[2]) >= 2500, suite[0]


def test_the_kernels_did_the_work():
    """The plugin does what it says: a step launches, and the CPU core is not asked."""
    script = (
        "import emulated_plugin, torch; from gradloc import LocalizedAdamW, ops\n"
        "core = ops.DEVICE_CORES['cpu']; core.clear_launches()\n"
        "param = torch.nn.Parameter(torch.ones(5)); param.grad = torch.ones(5)\n"
        "LocalizedAdamW([param], max_grad_norm=1.0).step()\n"
        "print(len(core.launches()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["2"]
