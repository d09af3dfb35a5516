"""The arithmetic behind the table of registers and the predictions, on cases done by hand.

Needs no compiler: PTX and reports of ptxas stand here as text.
"""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# At the end: bench/trace.py must not stand before Python's own module of that name.
sys.path.append(str(ROOT / "bench"))

import devices  # noqa: E402
import kernel_resources  # noqa: E402
import predict  # noqa: E402
import ptx_loops  # noqa: E402


@pytest.mark.parametrize(
    ("architecture", "registers", "shared_bytes", "threads", "blocks"),
    [
        (90, 32, 0, 256, 8),  # all 2,048 threads
        (90, 33, 0, 256, 6),  # 40 registers are given out: 12 warps a quarter, 48 in all
        (90, 64, 0, 256, 4),
        (90, 80, 0, 256, 3),
        (90, 255, 0, 256, 1),
        (86, 32, 0, 256, 6),  # 1,536 threads
        (86, 32, 0, 32, 16),  # no more blocks than that
        (90, 16, 100 * 1024, 256, 2),  # shared memory, with 1 KB more of each block
        (90, 16, 114 * 1024, 256, 1),
    ],
)
def test_blocks_on_a_multiprocessor(architecture, registers, shared_bytes, threads, blocks):
    found = devices.blocks_per_multiprocessor(
        architecture, registers=registers, shared_bytes=shared_bytes, threads=threads
    )
    assert found == blocks


def test_littles_law():
    """H100: 3,350 GB/s over 700 cycles of 1.98 GHz, shared by 132 multiprocessors: 8,972 bytes."""
    h100 = next(device for device in devices.DEVICES if device.name == "H100-SXM")
    assert h100.bytes_in_flight_needed == pytest.approx(3350 * 700 / 1.98 / 132)
    needed, name = devices.needed_threads(90, 64)
    assert (round(needed), name) == (201, "H200")  # the more demanding of the two


NAME = "_ZN7gradloc4cuda12adamw_kernelILb0ELb1ELb0ELi416EEEvv"
REPORT = f"""\
ptxas info    : Compiling entry function '{NAME}' for 'sm_90'
ptxas info    : Function properties for {NAME}
    32 bytes stack frame, 44 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 32 bytes cumulative stack size, 121 bytes smem
"""


def test_the_report_of_ptxas_is_understood():
    assert kernel_resources.parse_report(REPORT) == [
        {
            "kernel": "adamw_kernel<false, true, false, 416>",
            "registers": 64,
            "shared_bytes": 121,
            "stack_bytes": 32,
            "spill_stores_bytes": 44,
            "spill_loads_bytes": 36,
        }
    ]


LOOP = """
.visible .entry kernel(
\t.param .align 8 .b8 kernel_param_0[24]
)
.maxntid 256, 1, 1
{
\t.reg .pred %p<9>;
\tsetp.eq.s32 %p1, %r1, 0;
$L__BB0_1:
\tld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd1];
\t@%p1 bra $L__BB0_3;
\tld.global.v2.u64 {%rd2, %rd3}, [%rd1+16];
\tdiv.rn.f32 %f1, %f2, %f3;
$L__BB0_3:
\t@!%p1 bra $L__BB0_5;
\tadd.s32 %r6, %r2, %r3;
$L__BB0_5:
\tst.WIDTH [%rd4], {%r6, %r3, %r4, %r5};
\tsetp.lt.s32 %p2, %r6, %r7;
\t@%p2 bra $L__BB0_1;
\tld.global.u32 %r9, [%rd1];
\tret;
}
"""


def test_ways_round_a_loop_agree_with_themselves():
    """A condition that the loop cannot change holds at both of its branches, or at neither."""
    (kernel,) = ptx_loops.kernels_of(LOOP.replace("WIDTH", "global.v4.f32"))
    turns = kernel.turns()
    assert set(turns) == {(1, 1), (2, 1)}
    one, two = turns[1, 1][0], turns[2, 1][0]
    assert len(turns[1, 1]) == len(turns[2, 1]) == 1
    # load, branch, branch, add, store, compare, branch; with the division and no addition
    assert (one.instructions, one.special) == (7, 0)
    assert (two.instructions, two.special) == (17, 2)
    assert (one.loads_in_flight, two.loads_in_flight) == (1, 2)
    assert (kernel.param_bytes, kernel.threads) == (24, 256)


@pytest.mark.parametrize("store", ["global.v2.f32", "v4.f32", "global.f32"])
def test_narrow_or_unknown_accesses_spoil_a_loop(store):
    (kernel,) = ptx_loops.kernels_of(LOOP.replace("WIDTH", store))
    assert kernel.turns() == {}


def test_problems_name_kernel_and_card():
    row = {
        "kernel": "norms_kernel<416>",
        "architecture": 90,
        "stack_bytes": 0,
        "spill_stores_bytes": 0,
        "spill_loads_bytes": 0,
        "threads_resident": 200,
        "threads_needed": 201,
        "needed_by": "H200",
    }
    (found,) = kernel_resources.problems([row])
    assert "norms_kernel<416> on sm_90: 200 threads fit" in found
    assert "H200 asks for 201" in found
    assert kernel_resources.problems([{**row, "threads_resident": 201}]) == []


LOOP_OF_STEP = predict.Loop(
    elements=8,
    loaded_bytes=128,
    in_flight_bytes=128,
    instructions=400,
    special=40,
    float64=0,
    registers=76,
    shared_bytes=105,
    threads=256,
)


def device_of(name):
    return next(device for device in devices.DEVICES if device.name == name)


def test_the_limits_of_a_step():
    """By hand, for an H100: 3 blocks of 256 threads, 6 warps a scheduler."""
    limits = predict.limits_of(LOOP_OF_STEP, device_of("H100-SXM"), 28)
    clock = 1.98e9 * 132
    assert limits.memory == pytest.approx(3350e9 * predict.ATTAINABLE / 28)
    assert limits.issue == pytest.approx(clock * 128 * 8 / 400)
    assert limits.special == pytest.approx(clock * 16 * 8 / 40)
    assert limits.float64 == math.inf
    assert limits.latency == pytest.approx(clock * 768 * 8 / (700 + 6 * 400))
    assert (limits.rate, limits.name) == (limits.memory, "memory")


def test_a_long_launch_is_bandwidth_and_a_short_one_latency():
    device = device_of("H100-SXM")
    long = predict.launch_seconds(LOOP_OF_STEP, device, [1 << 30], 1.0, 28)
    copy = (1 << 30) * 28 / (3350e9 * predict.ATTAINABLE)
    assert copy < long < 1.01 * copy
    short = predict.launch_seconds(LOOP_OF_STEP, device, [1], 1.0, 28)
    assert 2.5e-6 < short < 20e-6
    half = predict.launch_seconds(LOOP_OF_STEP, device, [1 << 30], 0.5, 28)
    assert half == pytest.approx(long / 2, rel=0.01)


@pytest.mark.parametrize("change", [{"instructions": 4000}, {"in_flight_bytes": 16}])
def test_more_instructions_and_fewer_bytes_in_flight_never_help(change):
    changed = predict.replace(LOOP_OF_STEP, **change)
    for device in devices.DEVICES:
        before = predict.limits_of(LOOP_OF_STEP, device, 28)
        after = predict.limits_of(changed, device, 28)
        assert after.rate <= before.rate
        assert after.latency < before.latency


def test_bytes_that_must_move():
    """Norms read the gradient; a step reads four arrays and writes three."""
    assert predict.bytes_of("norms", "float32") == 4
    assert predict.bytes_of("step", "float32") == 28
    assert predict.bytes_of("step", "bfloat16") == 14


def test_the_page_says_that_nothing_was_measured():
    page = (ROOT / "bench" / "results" / "predicted.md").read_text()
    assert "Predicted, not measured" in page.split("\n\n")[1]
    figures = json.loads((ROOT / "bench" / "results" / "predicted.json").read_text())
    assert set(figures) == {device.name for device in devices.DEVICES}
    for name, models in figures.items():
        for model, dtypes in models.items():
            for dtype, times in dtypes.items():
                where = (name, model, dtype)
                assert times["clip+step"] == pytest.approx(times["norms"] + times["step"]), where
                shares = [times[f"clip+step{at}"] for at in (" @ 2%", " @ 10%", " @ 50%", "")]
                assert shares == sorted(shares), where
                # At least the time that the bytes take at the published bandwidth.
                elements = sum(math.prod(shape) for _, _, shape in predict.shapes_of(model))
                moved = elements * predict.bytes_of("step", dtype)
                bound = moved / device_of(name).bandwidth_gb_s / 1e6
                assert bound < times["step"] < 2 * bound + 0.2, where
