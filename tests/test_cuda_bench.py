"""The Python of a GPU visit's benchmarks: shapes, clocks, promises, the short run, the report.

Runs without a GPU, where clocks see a device made of stand-ins. The script that calls all of it is
tested in test_run_cuda.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The folder of the benchmarks, importable."""
    monkeypatch.syspath_prepend(str(BENCH))


def test_the_models_have_their_published_sizes(bench):
    from model_shapes import num_elements, shapes_of

    sizes = {
        "gpt2-small": (124_439_808, 148),
        "gpt2-xl": (1_557_611_200, 580),
        "llama-3.2-1b": (1_235_814_400, 146),
        "llama-3.1-8b": (8_030_261_248, 291),
    }
    for model, (elements, tensors) in sizes.items():
        assert (model, num_elements(model), len(shapes_of(model))) == (model, elements, tensors)
    with pytest.raises(ValueError, match="model='gpt5'"):
        shapes_of("gpt5")


def test_shapes_are_those_that_gradloc_finds_in_the_model_itself(bench):
    from model_shapes import Shapes, gpt2, llama
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from gradloc import LayerMap

    small = {"vocab_size": 60, "num_attention_heads": 4, "num_key_value_heads": 2}
    models = {
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=60, n_positions=16, n_embd=8, n_layer=2, n_head=2)
        ),
        "llama": LlamaForCausalLM(
            LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, **small)
        ),
    }
    rows = {
        "gpt2": gpt2(2, 8, vocabulary=60, positions=16),
        "llama": llama(2, 16, 24, 8, tied=False, vocabulary=60),
    }
    for name, model in models.items():
        found = LayerMap.from_model(model)
        parameters = dict(model.named_parameters())
        wanted = {
            layer.name: (layer.kind, sorted(tuple(parameters[p].shape) for p in layer.parameters))
            for layer in found
        }
        ours = {}
        for layer, kind, shape in rows[name]:
            ours.setdefault(layer, (kind, []))[1].append(shape)
        assert {key: (kind, sorted(shapes)) for key, (kind, shapes) in ours.items()} == wanted
    assert Shapes("tiny").layer_map().names[2] == "transformer.h.0.attn"


def test_values_are_random_and_gradients_come_at_new_addresses(bench):
    from model_shapes import Shapes, plan_of_share

    model = Shapes("tiny", torch.bfloat16)
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.bfloat16
        assert parameter.abs().sum() > 0
        assert parameter.grad.abs().sum() > 0
    others = model.other_gradients()
    pairs = list(zip(model.parameters(), others, strict=True))
    assert all(p.grad.data_ptr() != other.data_ptr() for p, other in pairs)
    layers = model.layer_map()
    for share in (1.0, 0.5, 0.25, 0.1, 0.02):
        plan, true = plan_of_share(layers, share)
        count = sum(layer.num_elements for layer in layers if layer.name in plan.active)
        assert true == count / sum(layer.num_elements for layer in layers)
        assert 0 < true <= max(share * 1.02, 0.03), share


def a_row(**changes) -> dict:
    row = {
        "model": "gpt2-small",
        "dtype": "float32",
        "moments": "float32",
        "op": "step",
        "by": "gradloc",
        "share": 1.0,
        "active": 1.0,
        "parameters": 124_439_808,
        "of_copy": 0.9,
        "of_full": 1.0,
        "gradloc_is_x_as_fast": 1.0,
    }
    return row | changes


FUSED = {"op": "clip+step", "by": "clip_grad_norm_ + torch fused"}
MASK = {"op": "clip+step", "share": 0.25, "active": 0.24}


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (a_row(of_copy=0.901), "kept"),
        (a_row(of_copy=0.899), "NOT KEPT"),
        (a_row(op="norms", of_copy=0.5), "NOT KEPT"),
        (a_row(of_copy=0.5, parameters=99_000_000), None),
        (a_row(of_copy=0.5, share=0.5), None),
        (a_row(**FUSED, gradloc_is_x_as_fast=1.31), "kept"),
        (a_row(**FUSED, gradloc_is_x_as_fast=1.29), "NOT KEPT"),
        (a_row(**MASK, of_full=0.269), "kept"),
        (a_row(**MASK, of_full=0.271), "NOT KEPT"),
    ],
)
def test_promises_are_judged_at_their_bounds(bench, row, verdict):
    from cuda_bounds import bounds

    lines = bounds([row], [])
    assert [line.rpartition(": ")[2] for line in lines] == ([verdict] if verdict else [])
    assert all(line.endswith(": not judged") for line in bounds([row], [], judged=False))


def test_the_host_promise_is_about_300_tensors(bench):
    from cuda_bounds import bounds

    hosts = [
        {"op": "step", "by": "gradloc", "tensors": 300, "host_us": 59.9},
        {"op": "clip+step", "by": "gradloc", "tensors": 300, "host_us": 60.1},
        {"op": "step", "by": "torch fused", "tensors": 300, "host_us": 900.0},
    ]
    verdicts = [line.rpartition(": ")[2] for line in bounds([], hosts)]
    assert verdicts == ["kept", "NOT KEPT"]


def test_the_short_run_notices_a_wrong_step_and_a_wrong_neighbour(bench, monkeypatch):
    import cuda_short_run as short_run

    case = short_run.Case("step", torch.float32, sizes=(1, 3, 33, 7, 40, 8, 5, 2))
    device = torch.device("cpu")
    assert short_run.run(case, device) == []
    right = short_run.optimizer_of

    def other_lr(model, case, *, fused):
        optimizer = right(model, case, fused=fused)
        if fused:
            optimizer.param_groups[1]["lr"] *= 1.01
        return optimizer

    monkeypatch.setattr(short_run, "optimizer_of", other_lr)
    assert any("parameter 1, element" in line for line in short_run.run(case, device))

    def past_the_end(model, case, *, fused):
        model._buffers[0][0][-1] = 3.0
        return right(model, case, fused=fused)

    monkeypatch.setattr(short_run, "optimizer_of", past_the_end)
    assert short_run.run(case, device) == ["1 elements beside the tensors were overwritten"]


def test_the_device_clock_queues_up_and_flushes_before_its_first_event(bench, monkeypatch):
    """The order of calls that a device would see, on a device made of stand-ins."""
    import cuda_timing

    seen = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            seen.append("event")

        def synchronize(self):
            seen.append("wait")

        def elapsed_time(self, end):
            return 4.0  # milliseconds

    class Flush:
        def normal_(self):
            return self

        def sum(self):
            seen.append("flush")

    def allocate(count, dtype, device):
        assert count * dtype.itemsize == 4 * 50_000_000
        return Flush()

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "_sleep", lambda cycles: seen.append(cycles))
    monkeypatch.setattr(cuda, "synchronize", lambda device: seen.append("wait"))
    facts = SimpleNamespace(L2_cache_size=50_000_000)
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(cuda_timing.torch, "empty", allocate)
    clock = cuda_timing.DeviceClock(torch.device("cuda"))  # 10 M cycles took 4 ms
    seen.clear()
    clock.set_lead("it", 0.002)
    assert clock("it", lambda: seen.append("run")) == pytest.approx(0.004)
    assert seen == ["wait", round(3.2 * 2_500_000), "flush", "event", "run", "event", "wait"]
    clock.set_lead("it", 5.0)  # a host that slow is not waited for
    seen.clear()
    clock("it", lambda: None)
    assert seen[1] == 20 * 2_500_000


def test_launches_are_what_the_profiler_saw_on_the_device(bench, monkeypatch):
    from cuda_timing import Launches, count_launches
    from torch.autograd import DeviceType

    names = ["norms_kernel", "adamw_kernel", "Memcpy HtoD (Pinned -> Device)", "Memset (Device)"]
    events = [SimpleNamespace(name=name, device_type=DeviceType.CUDA) for name in names]
    events.append(SimpleNamespace(name="cudaLaunchKernel", device_type=DeviceType.CPU))

    class Profiler:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            return events

    ran = []
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    cuda = torch.device("cuda")
    assert count_launches(lambda: ran.append(1), cuda) == Launches(kernels=2, copies=2)
    assert ran == [1]
    events.clear()  # a machine whose profiler sees no device must not read as "no launches"
    assert count_launches(lambda: None, cuda) is None
    assert count_launches(lambda: None, torch.device("cpu")) is None


def test_predictions_are_found_by_the_chip(bench, monkeypatch, tmp_path):
    from cuda_kernels import chip, predictions

    assert chip("NVIDIA H100 80GB HBM3") == chip("H100-SXM") == "h100"
    assert chip("NVIDIA GeForce RTX 4090") == chip("RTX 4090") != chip("RTX 3090")
    path = tmp_path / "predicted.json"
    assert predictions(torch.device("cuda"), path) == {}
    path.write_text(json.dumps({"RTX 4090": {"a": 1}, "H100-SXM": {"b": 2}}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert predictions(torch.device("cuda"), path) == {"b": 2}


def test_what_does_not_fit_is_left_out_with_its_numbers(bench, monkeypatch):
    import cuda_versions

    whole = cuda_versions.Case("tiny", torch.bfloat16, torch.device("cpu"))
    keys = {version.key for version in whole.versions}
    assert len(keys) == len(whole.versions)
    assert any("torch foreach" in key for key in keys)
    monkeypatch.setattr(cuda_versions, "free_bytes", lambda device: 3e9)
    part = cuda_versions.Case("tiny", torch.bfloat16, torch.device("cpu"))
    assert not any("torch foreach" in version.key for version in part.versions)
    assert any("torch foreach: needs" in line for line in part.left_out)
    assert any("float32 moments: needs" in line for line in part.left_out)


def test_a_report_is_made_of_whatever_there_is(bench, tmp_path):
    from cuda_report import report

    assert "No part has ended." in report(tmp_path)
    row = a_row(
        ms=0.5,
        quartiles_ms=[0.4, 0.6],
        tensors=148,
        moved_bytes=3_484_314_624,
        gb_per_s=2800.0,
        host_us=40.0,
        launches=1,
        copies=None,
        rounds=11,
        predicted_ms=0.45,
    )
    results = {
        "rehearsal": "",
        "timing": "events",
        "machine": {"torch": "2.11"},
        "device": {"name": "NVIDIA H100"},
        "rows": [row, a_row(**{**row, "by": "torch fused", "predicted_ms": None})],
        "host": [],
        "bounds": ["step: kept"],
        "failed": ["llama: RuntimeError: no"],
        "left_out": ["gpt2-xl: no time left"],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = report(tmp_path)
    assert "# gradloc on a GPU: NVIDIA H100" in text
    assert "predicted ms" in text
    assert "| 90.0% | 1.00 | 1 |  | 40 | 11 | 0.450 |" in text
    for line in ("* step: kept", "* llama: RuntimeError: no", "* gpt2-xl: no time left"):
        assert line in text
