"""Tensors past 2^31 and 2^32 elements, without their memory: positions and addresses have 64 bits.

Tables that were made for a small tensor are changed to say that its chunks lie far behind the
first element; the address of that element is moved back by as much. Real tensors of that size are
in test_cuda_device.py, on a GPU.
"""

import dataclasses
import mmap

import pytest
import torch
from numerics import CHUNK, assert_same_bits, make_slot, tensors_of

from gradloc import _C, RecAdam, ops
from gradloc.reference import AdamWGroup

GROUP = AdamWGroup(lr=0.02, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, maximize=False)
SEED = 11
SIZE = CHUNK + 5000
# Multiples of a chunk that are another number in 32 bits: with a sign, and without.
FAR = (2**31, 2**32 + 3 * CHUNK)
CHUNK_ENTRY_WORDS = 3  # of 8 bytes; the first is the offset, then size and tensor
ARRAYS = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@pytest.fixture
def far_end():
    """A function that puts tensors to the end of 17 GiB of addresses.

    Pages become memory when they are touched. An address that lost its upper half is one of these,
    full of zeros.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        reserved = mmap.mmap(-1, 17 * 2**30, flags=flags)
    except OSError as error:
        pytest.skip(f"this machine has no 17 GiB of addresses to reserve: {error}")
    space = torch.frombuffer(reserved, dtype=torch.uint8)
    begin = space.numel()

    def place(values):
        nonlocal begin
        num_bytes = values.numel() * values.element_size()
        begin -= (num_bytes + 4095) // 4096 * 4096
        return space[begin : begin + num_bytes].view(values.dtype).copy_(values)

    return place


def moved_back(tensor, offset):
    """The address of the element that is `offset` elements before the first."""
    return tensor.data_ptr() - offset * tensor.element_size()


def far_gradients(grad, offset):
    return _C.Gradients([moved_back(grad, offset)], [ops.DTYPE_CODES[grad.dtype]], [grad])


def far_tables(work, offset, *contents):
    """(tables, scratch memory), with all chunks `offset` elements further back."""
    tables = torch.zeros(work.table_bytes, dtype=torch.uint8)
    work.write_tables(tables.data_ptr(), *contents)
    entries = tables.view(torch.int64)[: 2 * CHUNK_ENTRY_WORDS].view(2, CHUNK_ENTRY_WORDS)
    assert entries[:, 0].tolist() == [0, CHUNK]
    assert [size & 0xFFFFFFFF for size in entries[:, 1].tolist()] == [CHUNK, SIZE - CHUNK]
    entries[:, 0] += offset
    return tables, torch.zeros(work.scratch_bytes, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", FAR)
@pytest.mark.parametrize("device", ["emulator"], indirect=True)
def test_norms_far_into_a_tensor(device, far_end, offset, dtype):
    grad = far_end(torch.randn(SIZE).to(dtype))
    grads = far_gradients(grad, offset)
    work = device.core.CudaNormWork([SIZE], [0], 1)
    tables, scratch = far_tables(work, offset, grads)
    out = torch.full((1,), torch.nan, dtype=torch.float64)
    work.norm_sq(tables.data_ptr(), scratch.data_ptr(), grads, 0, out.data_ptr(), 0, 0)
    assert float(out) == pytest.approx(float(grad.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.bfloat16),
    ],
    ids=["float32", "narrow"],
)
@pytest.mark.parametrize("recadam", [None, RecAdam(gamma=20.0, k=1.0, t0=1.0)], ids=["", "recadam"])
@pytest.mark.parametrize("offset", FAR)
@pytest.mark.parametrize("device", ["emulator"], indirect=True)
def test_a_step_far_into_a_tensor(device, far_end, offset, dtypes, recadam):
    """The CPU core, told that it has a shard that begins there, gives the random numbers too."""
    host = make_slot(torch.randn(SIZE).to(dtypes[0]), moment_dtype=dtypes[2], amsgrad=True)
    host = dataclasses.replace(host, first_element=offset)
    host.exp_avg.normal_()
    host.exp_avg_sq.uniform_(0.1, 1)
    anchor = torch.randn(SIZE).to(dtypes[2])
    if recadam is not None:
        host = dataclasses.replace(host, anchor=anchor)
    ours = {name: far_end(t.reshape(-1)) for name, t in tensors_of(host).items()}
    far_anchor = far_end(anchor)
    grad = far_end(torch.randn(SIZE).to(dtypes[1]))
    back = {name: [moved_back(ours[name], offset)] for name in ARRAYS}
    work = device.core.CudaAdamWWork(
        sizes=[SIZE],
        layers=[0],
        num_layers=1,
        params=back["param"],
        param_dtypes=[ops.DTYPE_CODES[dtypes[0]]],
        moment_dtypes=[ops.DTYPE_CODES[dtypes[2]]],
        exp_avgs=back["exp_avg"],
        exp_avg_sqs=back["exp_avg_sq"],
        max_exp_avg_sqs=back["max_exp_avg_sq"],
        steps=[ours["step"].data_ptr()],
        groups=[0],
        tensor_ids=[0],
        first_elements=[0],
        anchors=[] if recadam is None else [moved_back(far_anchor, offset)],
        anchor_dtypes=[] if recadam is None else [ops.DTYPE_CODES[dtypes[2]]],
    )
    grads = far_gradients(grad, offset)
    tables, scratch = far_tables(work, offset, grads, [0.5])
    group = (0.02, 0.9, 0.99, 1e-6, 0.1, False, 0)
    places = tables.data_ptr(), scratch.data_ptr()
    pull = None if recadam is None else (20.0, 1.0, 1.0, 0)
    work.step(*places, grads, 0, [group], 0, 0, 0.7, 0, SEED, pull, 0, 0)
    with device.host():
        host_work = ops.NativeAdamW([host], 1)
        host_work.step(
            host_work.gather([grad]),
            [GROUP],
            [0.5],
            0.7,
            with_norms=False,
            rounding_seed=SEED,
            recadam=recadam,
        )
    for name, expected in tensors_of(host).items():
        assert_same_bits(ours[name].view(expected.shape), expected, name)


@pytest.mark.parametrize("device", ["emulator"], indirect=True)
def test_the_chunks_of_a_large_tensor(device):
    size = 2**32 + 9
    work = device.core.CudaNormWork([7, size], [1, 0], 2)
    tables = torch.zeros(work.table_bytes, dtype=torch.uint8)
    work.write_tables(tables.data_ptr(), _C.Gradients([1, 1], [0, 0], []))
    count = 2**32 // CHUNK + 1
    entries = tables.view(torch.int64)[: CHUNK_ENTRY_WORDS * count].view(-1, CHUNK_ENTRY_WORDS)
    assert torch.equal(entries[:, 0], torch.arange(count) * CHUNK)
    sizes, tensors = entries[:, 1] & 0xFFFFFFFF, entries[:, 1] >> 32
    assert bool((sizes[:-1] == CHUNK).all())
    assert (int(sizes[-1]), tensors.unique().tolist()) == (9, [1])
