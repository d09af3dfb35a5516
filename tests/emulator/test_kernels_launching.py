"""Steps launch on the device's current stream and never ask for a value that a kernel makes.

On the emulated device, where everything is CPU memory, reading a value costs nothing: what would
wait on a GPU is told by the operation. That a GPU does not wait is in test_cuda_device.py.
"""

from types import SimpleNamespace

import pytest
import torch
from device_twins import Twins
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradloc import LayerMap, layer_grad_norms
from gradloc.ops_cuda import CudaTables, Stream

pytestmark = pytest.mark.parametrize("device", ["emulator"], indirect=True)

# Operations whose result, or its shape, the processor has to know.
WAITING = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "unique")
# Methods that read memory of the host without an operation, so that no dispatcher sees them.
READING = ("tolist", "numpy", "cpu", "item", "__array__", "__bool__", "__float__", "__int__")


class NoOperationWaits(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(WAITING) or (name in ("index", "index_put_") and _has_mask(args)):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def _has_mask(args):
    """An index of booleans: how many elements it chooses, the host has to ask."""
    return any(index is not None and index.dtype == torch.bool for index in args[1])


class NoMethodReads(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READING:
            raise AssertionError(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def scaler_values():
    """What torch.amp.GradScaler sets on an optimizer before its step."""
    return {"found_inf": torch.zeros(1), "grad_scale": torch.full((1,), 8.0)}


@pytest.mark.parametrize("read", ["bool", "float", "item", "tolist", "cpu", "equal", "mask"])
def test_waiting_is_found(device, read):
    """The two modes see each way that a step could ask."""
    values = torch.arange(3.0)
    reads = {
        "bool": lambda: bool(values[1]),
        "float": lambda: float(values.sum()),
        "item": lambda: values[2].item(),
        "tolist": values.tolist,
        "cpu": values.cpu,
        "equal": lambda: torch.equal(values, values),
        "mask": lambda: values[values > 1],
    }
    with NoOperationWaits(), NoMethodReads(), pytest.raises(AssertionError, match="waits"):
        reads[read]()


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.1},
        {"on_nonfinite": "skip"},
        {"max_grad_norm": 0.1, "on_nonfinite": "skip", "groups": True},
        {"stochastic_rounding": True, "amsgrad": True},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_no_step_waits(device, scaler_values, options, scaled):
    """From the first on, with finite gradients or not, whether one is missing or not."""
    twins = Twins(device, torch.bfloat16, **options)
    if scaled:
        for name, value in scaler_values.items():
            setattr(twins.opt, name, value)
    for number in range(4):
        twins.give_gradients(without={"b.weight"} if number == 2 else ())
        if number == 1:
            twins.model["a"].weight.grad[0, 0] = torch.inf
        with NoOperationWaits(), NoMethodReads():
            twins.opt.step()
    # With clipping, skipping is the default.
    num_skipped = int(bool(options.keys() & {"max_grad_norm", "on_nonfinite"}))
    assert twins.opt.num_skipped_steps == num_skipped
    assert float(twins.opt.state[twins.model["b"].bias]["step"]) == 4.0 - num_skipped


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({}, ["adamw_kernel"]),
        ({"max_grad_norm": 1.0, "groups": True}, ["norms_kernel", "adamw_kernel"]),
        ({"on_nonfinite": "raise"}, ["norms_kernel", "adamw_kernel"]),
    ],
    ids=["step", "clip", "raise"],
)
def test_steps_launch_on_the_current_stream(device, monkeypatch, options, kernels):
    twins = Twins(device, **options)
    for number in (0, 1):
        current = Stream(number, device.core.new_stream(number))
        monkeypatch.setattr(CudaTables, "stream", lambda self, current=current: current)
        twins.give_gradients()
        assert device.launches(twins.opt.step) == kernels
        where = [(launch.device, launch.stream) for launch in device.core.launches()]
        assert where == [current] * len(kernels)


def test_layer_norms_launch_on_the_current_stream(device, monkeypatch):
    twins = Twins(device)
    twins.give_gradients()
    stream = device.core.new_stream(0)
    monkeypatch.setattr(CudaTables, "stream", lambda self: Stream(0, stream))
    layers = LayerMap.from_model(twins.model)
    assert device.launches(lambda: layer_grad_norms(twins.model, layers)) == ["norms_kernel"]
    assert [launch.stream for launch in device.core.launches()] == [stream]


def test_the_current_stream_is_that_of_torch(device, monkeypatch):
    """As on a GPU, with torch's side imitated; memory is told of each stream once."""
    core = device.core
    tables = CudaTables(core, core.CudaNormWork([4], [0], 1), torch.device("cpu"))
    told = []
    memory = SimpleNamespace(record_stream=lambda stream: told.append(stream.cuda_stream))
    for name, value in {
        "_on_cuda": True,
        "_device": torch.device("cuda", 3),
        "_tables": memory,
        "_scratch": memory,
    }.items():
        setattr(tables, name, value)
    handles = {torch.device("cuda", 3): 77, None: 1}
    current = lambda of=None: SimpleNamespace(cuda_stream=handles[of])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    for handle in (77, 77, 0, 77):
        handles[torch.device("cuda", 3)] = handle
        assert tables.stream() == Stream(3, handle)
    assert told == [77, 77, 0, 0]
