"""A step in a CUDA graph: replays give the bits of eager steps; what cannot be captured says so."""

import copy

import pytest
import torch
from cuda_cases import CUDA, EVERY_OPTION, assert_all_same, copies, give_gradients, make_params
from numerics import assert_same_bits

from gradloc import LocalizedAdamW

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda_kernels")]


def captured(opt):
    """A graph of one step, after steps on a side stream as torch.cuda.graph asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        opt.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY_OPTION
def test_graph_replays_as_eager(options, dtype):
    """Hundred steps with gradients refilled in place; rounding counts steps on the device."""
    options = {**options, "stochastic_rounding": dtype == torch.bfloat16, "seed": 3}
    params = make_params(dtype=dtype)
    theirs = copies(params)
    opt, judge = LocalizedAdamW(params, **options), LocalizedAdamW(theirs, **options)
    give_gradients(params, theirs)
    graph = captured(opt)
    judge.step()
    for number in range(100):
        for ours, other in zip(params, theirs, strict=True):
            ours.grad.normal_()
            if number == 50 and options.get("on_nonfinite") == "skip":
                ours.grad.fill_(torch.nan)
            other.grad.copy_(ours.grad)
        graph.replay()
        judge.step()
    assert_all_same(params, theirs)
    for ours, other in zip(params, theirs, strict=True):
        for key, tensor in judge.state[other].items():
            assert_same_bits(opt.state[ours][key], tensor, key)
        assert float(opt.state[ours]["step"]) == 101.0 - opt.num_skipped_steps
    assert opt.num_skipped_steps == judge.num_skipped_steps
    assert_same_bits(opt.grad_norms(), judge.grad_norms())


def test_a_graph_reads_the_learning_rate():
    params = make_params()
    theirs = copies(params)
    lr = torch.tensor(0.01, device=CUDA)
    opt, judge = LocalizedAdamW(params, lr=lr), LocalizedAdamW(theirs, lr=lr.clone())
    give_gradients(params, theirs)
    graph = captured(opt)
    judge.step()
    for number in range(5):
        lr.fill_(0.1 / (number + 1))
        judge.param_groups[0]["lr"].copy_(lr)
        graph.replay()
        judge.step()
    assert_all_same(params, theirs)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_a_graph_of_many_tensors_and_groups(max_grad_norm):
    """Addresses and groups that come through tables are copied again in every replay."""
    params = make_params([(1 + i % 3,) for i in range(4100)])
    theirs = copies(params)

    def groups(chosen):
        return [{"params": chosen[i::10], "lr": 0.01 * (i + 1)} for i in range(10)]

    opt = LocalizedAdamW(groups(params), max_grad_norm=max_grad_norm)
    judge = LocalizedAdamW(groups(theirs), max_grad_norm=max_grad_norm)
    give_gradients(params, theirs)
    graph = captured(opt)
    judge.step()
    # What was pinned for the copies must not have gone to somebody else.
    taken = [torch.full((n,), 255, dtype=torch.uint8).pin_memory() for n in (640, 4096, 32800) * 4]
    for _ in range(3):
        graph.replay()
        judge.step()
    assert_all_same(
        [torch.cat([p.detach() for p in params])], [torch.cat([p.detach() for p in theirs])]
    )
    del taken


@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
def test_a_first_step_cannot_be_captured(loaded):
    """Its tables would have to be uploaded; the error says what to do, and nothing has changed."""
    params = make_params()
    theirs = copies(params)
    opt, judge = LocalizedAdamW(params), LocalizedAdamW(theirs)
    give_gradients(params, theirs)
    if loaded:  # there is state, but nothing was prepared from it
        judge.step()
        opt.load_state_dict(copy.deepcopy(judge.state_dict()))
        for ours, other in zip(params, theirs, strict=True):
            ours.data.copy_(other)
    before = [param.detach().clone() for param in params]
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"step before torch.cuda.graph"):  # noqa: PT012
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.ones(1, device=CUDA).add_(1)  # torch warns of graphs with nothing in them
            opt.step()
    torch.cuda.synchronize()
    assert_all_same(params, before)
    for one in (opt, judge):
        one.step()
    assert_all_same(params, theirs)
