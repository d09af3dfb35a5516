"""The emulator itself, on small kernels: what threads tell each other, and their orders."""

import ctypes

import emulator_build
import numpy as np
import pytest

THREADS = 256
SEEDS = range(8)
LANES = np.arange(THREADS) % 32


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.fixture(scope="module", params=["assembly", "ucontext"])
def samples(request) -> ctypes.CDLL:
    """The small kernels, with either way of switching between fibers."""
    defines = ["EMULATOR_UCONTEXT"] if request.param == "ucontext" else []
    library = ctypes.CDLL(str(emulator_build.build_samples(defines=defines)))
    library.error_text.restype = ctypes.c_char_p
    library.error_string.restype = ctypes.c_char_p
    return library


def source_lane(kind: str, amount: int, width: int) -> np.ndarray:
    """The lane that each thread's value comes from, as CUDA's programming guide says it."""
    first, within = LANES - LANES % width, LANES % width
    if kind == "shfl":
        return first + amount % width
    if kind == "up":
        return np.where(within >= amount, LANES - amount, LANES)
    if kind == "down":
        return np.where(within + amount < width, LANES + amount, LANES)
    return np.where((LANES ^ amount) < first + width, LANES ^ amount, LANES)


@pytest.mark.parametrize("width", [32, 16, 4, 1])
@pytest.mark.parametrize("kind", ["shfl", "up", "down", "xor"])
def test_shuffles(samples, kind, width):
    draw = np.random.default_rng(0)
    for dtype, function in ((np.int32, "shuffle_int"), (np.float64, "shuffle_double")):
        values = draw.integers(-(2**31), 2**31, THREADS).astype(dtype)
        for amount in (0, 1, 2, 5, 15, 16, 31):
            results = np.zeros(THREADS, dtype)
            samples.set_seed(ctypes.c_uint64(amount))
            number = ["shfl", "up", "down", "xor"].index(kind)
            assert (
                getattr(samples, function)(number, amount, width, pointer(values), pointer(results))
                == 0
            )
            warps = np.arange(THREADS) - LANES
            expected = values[warps + source_lane(kind, amount, width)]
            np.testing.assert_array_equal(results, expected, err_msg=f"amount={amount}")


def test_the_halves_of_a_warp_meet_among_themselves(samples):
    values = np.random.default_rng(0).integers(-1000, 1000, THREADS).astype(np.int32)
    rows = values.reshape(-1, 32)
    expected = np.empty_like(rows)
    expected[:, 0::2] = rows[:, 0::2].sum(1, keepdims=True)
    expected[:, 1::2] = 16 * rows[:, 1::2].sum(1, keepdims=True)  # sums summed once more
    for seed in SEEDS:
        results = np.zeros(THREADS, np.int32)
        samples.set_seed(ctypes.c_uint64(seed))
        assert samples.halves(pointer(values), pointer(results)) == 0, samples.error_text()
        np.testing.assert_array_equal(results.reshape(-1, 32), expected)


@pytest.mark.parametrize("pattern", ["zeros", "ones", "mixed", "one lane", "all but one"])
def test_votes(samples, pattern):
    values = np.zeros(THREADS, np.int32)
    if pattern == "mixed":
        values = np.random.default_rng(1).integers(-1, 2, THREADS).astype(np.int32)
    elif pattern == "one lane":
        values[77] = -5
    elif pattern != "zeros":
        values[:] = 3
        values[200] = pattern == "ones"
    results = np.zeros((THREADS, 6), np.uint32)
    assert samples.votes(pointer(values), pointer(results)) == 0
    true = values.reshape(-1, 32) != 0
    ballots = (true.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
    by_warp = np.stack([ballots, true.any(1), true.all(1)], axis=1).astype(np.uint32)
    np.testing.assert_array_equal(results[:, :3], np.repeat(by_warp, 32, axis=0))
    of_block = [true.any(), true.all(), true.sum()]
    np.testing.assert_array_equal(results[:, 3:], np.tile(of_block, (THREADS, 1)))


def test_sums_of_blocks_do_not_depend_on_the_order(samples):
    values = np.random.default_rng(0).integers(0, 1000, (5, THREADS)).astype(np.float32)
    for seed in SEEDS:
        sums = np.full(5, np.nan, np.float32)
        samples.set_seed(ctypes.c_uint64(seed))
        assert samples.tree_sum(True, 5, pointer(values), pointer(sums)) == 0
        np.testing.assert_array_equal(sums, values.sum(1), err_msg=f"seed={seed}")


def tickets(samples, seed: int, blocks: int = 3, threads: int = 64) -> list[int]:
    samples.set_seed(ctypes.c_uint64(seed))
    counter, order = np.zeros(1, np.uint32), np.zeros(blocks * threads, np.uint32)
    assert samples.tickets(blocks, threads, pointer(counter), pointer(order)) == 0
    assert counter[0] == blocks * threads
    return order.tolist()


def test_threads_and_blocks_run_in_an_order_drawn_from_the_seed(samples):
    orders = [tickets(samples, seed) for seed in SEEDS]
    assert all(sorted(order) == list(range(192)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(SEEDS)
    assert len({tuple(thread // 64 for thread in order[::64]) for order in orders}) > 2
    # No thread is always before its neighbour, within a warp and across warps.
    for first, second in ((0, 1), (31, 32), (5, 60)):
        before = {order.index(first) < order.index(second) for order in orders}
        assert before == {True, False}, (first, second)
    assert tickets(samples, 3) == orders[3]


def test_the_next_launch_has_another_order(samples):
    counter, orders = np.zeros(1, np.uint32), np.zeros((2, 64), np.uint32)
    samples.set_seed(ctypes.c_uint64(0))
    for order in orders:
        counter[:] = 0
        samples.tickets(1, 64, pointer(counter), pointer(order))
    assert orders[0].tolist() != orders[1].tolist()


def test_atomics(samples):
    words = np.array([100, 0, 0, 0], np.uint32)
    assert samples.atomics(pointer(words)) == 0
    # 512 threads: two taken off by each; counted 0..4 round and round; and the first one won.
    assert words[:2].astype(np.int32).tolist() == [100 - 2 * 512, 512 % 5]
    assert 1 <= words[2] <= THREADS
    assert words[3] == words[2]


def test_the_last_block_adds_up_what_the_others_handed_in(samples):
    blocks = 7
    values = np.random.default_rng(0).standard_normal((blocks, THREADS))
    results, last_blocks = set(), set()
    for seed in SEEDS:
        parts, counter = np.full(blocks, np.nan), np.zeros(1, np.uint32)
        total, last = np.full(1, np.nan), np.zeros(1, np.uint32)
        samples.set_seed(ctypes.c_uint64(seed))
        arrays = (values, parts, counter, total, last)
        assert samples.last_block(blocks, *map(pointer, arrays)) == 0
        assert counter[0] == 0
        results.add(float(total[0]))
        last_blocks.add(int(last[0]))
    assert len(results) == 1
    assert results.pop() == pytest.approx(values.sum(), rel=1e-12)
    assert len(last_blocks) > 2


@pytest.mark.parametrize(
    ("grid", "block"), [((3, 1, 1), (33, 1, 1)), ((2, 3, 4), (4, 3, 2)), ((1, 1, 5), (8, 8, 16))]
)
def test_every_thread_of_every_block_runs_once(samples, grid, block):
    visits = np.zeros(int(np.prod(grid) * np.prod(block)), np.uint32)
    shape = [np.array(size, np.uint32) for size in (grid, block)]
    assert samples.visit(*map(pointer, (*shape, visits))) == 0
    assert (visits == 1).all()


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((0, 1, 1), (32, 1, 1)),
        ((2**31, 1, 1), (32, 1, 1)),
        ((1, 65536, 1), (32, 1, 1)),
        ((1, 1, 1), (0, 1, 1)),
        ((1, 1, 1), (1025, 1, 1)),
        ((1, 1, 1), (32, 33, 1)),
        ((1, 1, 1), (1, 1, 65)),
    ],
)
def test_grids_and_blocks_that_no_device_takes(samples, grid, block):
    shape = [np.array(size, np.uint32) for size in (grid, block)]
    assert samples.visit(*map(pointer, shape), None) == 9  # cudaErrorInvalidConfiguration
    assert b"samples::visit_kernel: no device takes a grid of" in samples.error_text()


def test_kernel_parameters_up_to_their_limit(samples):
    total = np.zeros(1, np.uint32)
    assert samples.large_fits(pointer(total)) == 0
    assert total[0] == 3 * sum(range(8188)) % 2**32  # three blocks read all of them
    total[:] = 7
    assert samples.large_does_not_fit(pointer(total)) == 1  # cudaErrorInvalidValue
    assert total[0] == 7
    assert samples.error_text().decode() == (
        "samples::large_kernel<8190>: its parameters take 32768 bytes, at most 32,764 fit"
    )


def test_shared_memory_is_not_a_number_when_a_block_begins(samples):
    found = np.zeros(5, np.float32)
    assert samples.leftover(5, pointer(found)) == 0
    assert np.isnan(found).all(), found


def test_half_precision_is_numpys(samples):
    every = np.arange(2**16, dtype=np.uint16)
    widened = np.zeros(2**16, np.float32)
    samples.from_half(2**16, pointer(every), pointer(widened))
    expected = every.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(widened, expected)
    numbers = ~np.isnan(expected)
    assert (np.signbit(widened) == np.signbit(expected))[numbers].all()

    # Each half, what lies halfway to the next one, both neighbours of those, and anything.
    halves = np.sort(expected[numbers])
    middles = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
    near = np.concatenate([halves, middles, np.float32([65519.996, 65520, 1e30, -65520, 1e-45])])
    draw = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint64)
    values = np.concatenate(
        [
            near,
            np.nextafter(near, np.float32(np.inf)),
            np.nextafter(near, np.float32(-np.inf)),
            draw.astype(np.uint32).view(np.float32),
        ]
    )
    bits = np.zeros(values.size, np.uint16)
    samples.to_half(values.size, pointer(values), pointer(bits))
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    numbers = ~np.isnan(values)
    wrong = np.flatnonzero(bits[numbers] != expected.view(np.uint16)[numbers])
    assert wrong.size == 0, values[numbers][wrong[:5]]
    assert np.isnan(bits.view(np.float16)[~numbers]).all()
