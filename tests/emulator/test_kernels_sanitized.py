"""Every kernel variant under AddressSanitizer and UndefinedBehaviorSanitizer.

The core's own code runs there with torch's allocations. That the sanitizers see what threads of the
emulator do is shown in test_emulator_defects.py.
"""

from pathlib import Path

import emulator_build
import pytest

SCRIPT = Path(__file__).with_name("sanitized_cases.py")


@pytest.mark.parametrize("case", ["steps", "anchors", "many", "norms"])
def test_clean(case):
    done = emulator_build.run_sanitized(SCRIPT, emulator_build.build(sanitize=True), case)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == "done\n"


def test_a_gradient_that_is_too_short_is_seen():
    path = emulator_build.build(sanitize=True)
    done = emulator_build.run_sanitized(SCRIPT, path, "short gradient")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "adamw_kernel" in done.stderr
