"""The demo: everything that gradloc does, on a synthetic world, in a few minutes.

Nothing else in the package uses it.
"""

from gradloc.demo.outcome import DemoResult
from gradloc.demo.run import run_demo

__all__ = ["DemoResult", "run_demo"]
