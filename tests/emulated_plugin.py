"""A pytest plugin that sends all CPU tensors of a run to the CUDA kernels on the emulated device.

Used by tests/emulator/test_optimizer_on_the_device.py, as `pytest -p emulated_plugin`.
"""

import emulator_build
import torch  # noqa: F401  (before the compiled module)

from gradloc import ops

ops.DEVICE_CORES["cpu"] = emulator_build.load(emulator_build.build())
