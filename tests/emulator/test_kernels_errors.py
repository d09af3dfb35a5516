"""What goes wrong on a device becomes a clear error, and everything stays as it was.

Failing launches and streams of other devices can only be had from the emulator.
"""

import pytest
import torch
from numerics import assert_same_bits, make_slot
from torch import nn

from gradloc import LocalizedAdamW, ops
from gradloc.ops_cuda import Decision
from gradloc.reference import AdamWGroup

emulated = pytest.mark.parametrize("device", ["emulator"], indirect=True)
GROUP = AdamWGroup(lr=0.02, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, maximize=False)
ILLEGAL_ADDRESS, INVALID_HANDLE = 700, 400


def make(device, num_steps=1, **options):
    """An optimizer over three parameters after some steps, with the gradients of the next."""
    torch.manual_seed(0)
    params = [nn.Parameter(device.to(torch.randn(shape))) for shape in ((30, 4), (7,), (2, 3, 2))]
    opt = LocalizedAdamW(params, lr=0.1, **options)
    for _ in range(num_steps + 1):
        for param in params:
            param.grad = device.to(torch.randn(param.shape))
        if num_steps:
            opt.step()
            num_steps -= 1
    return params, opt


def values(params, opt):
    """Copies of all that a step may change."""
    found = {f"parameter {i}": param.detach().clone() for i, param in enumerate(params)}
    for i, param in enumerate(params):
        for key, tensor in opt.state.get(param, {}).items():
            found[f"{key} {i}"] = tensor.clone()
    return found


def assert_unchanged(before, params, opt):
    """Bit for bit, and no state that was not there."""
    after = values(params, opt)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert_same_bits(tensor, before[name], name)


def assert_next_step_as(params, opt, twin_params, twin):
    """The next step is that of a twin to which nothing happened."""
    opt.step()
    twin.step()
    for name, tensor in values(twin_params, twin).items():
        assert_same_bits(values(params, opt)[name], tensor, name)


@emulated
@pytest.mark.parametrize("num_steps", [0, 1], ids=["first", "later"])
@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "adamw_kernel"),
        ({"max_grad_norm": 0.1}, "norms_kernel"),
        ({"on_nonfinite": "raise"}, "norms_kernel"),
        ({"stochastic_rounding": True, "amsgrad": True}, "adamw_kernel"),
    ],
)
def test_a_failed_launch(device, options, kernel, num_steps):
    params, opt = make(device, num_steps, **options)
    twin_params, twin = make(device, num_steps, **options)
    before = values(params, opt)
    device.core.fail_next_launch(ILLEGAL_ADDRESS)
    with pytest.raises(RuntimeError, match=rf"CUDA: .*{kernel}.*cudaErrorIllegalAddress"):
        opt.step()
    assert_unchanged(before, params, opt)
    assert opt.num_skipped_steps == 0
    assert_next_step_as(params, opt, twin_params, twin)


@emulated
def test_a_failed_update_after_the_norms(device):
    """Norms and decision are there then; the update is not, and the next step repeats both."""
    params, opt = make(device, max_grad_norm=0.1)
    twin_params, twin = make(device, max_grad_norm=0.1)
    before = values(params, opt)
    work = opt._step_work()
    (part, grads), *_ = work.gather()
    control = torch.zeros(3)
    part.work.norm_sq(grads, [1.0], Decision(control, 0.1, True))
    device.core.fail_next_launch(ILLEGAL_ADDRESS)
    with pytest.raises(RuntimeError, match="adamw_kernel"):
        part.work.step(grads, [_group(opt)], [1.0], control, with_norms=True, rounding_seed=None)
    assert_unchanged(before, params, opt)
    assert_next_step_as(params, opt, twin_params, twin)


def _group(opt):
    return AdamWGroup(opt.param_groups[0]["lr"], 0.9, 0.999, 1e-8, 0.01, maximize=False)


@emulated
def test_errors_are_reported_once(device):
    """Others, such as torch, must not find an error that was raised."""
    params, opt = make(device)
    device.core.fail_next_launch(ILLEGAL_ADDRESS)
    with pytest.raises(RuntimeError):
        opt.step()
    opt.step()
    grads = ops.gradients_of([param.grad for param in params])
    work = device.core.CudaNormWork([120, 7, 12], [0, 1, 0], 2)
    tables = torch.zeros(work.table_bytes, dtype=torch.uint8)
    scratch = torch.zeros(work.scratch_bytes, dtype=torch.uint8)
    work.write_tables(tables.data_ptr(), grads)
    out = torch.full((2,), torch.nan, dtype=torch.float64)

    def norm_sq(on, stream):
        work.norm_sq(tables.data_ptr(), scratch.data_ptr(), grads, 0, out.data_ptr(), on, stream)

    other = device.core.new_stream(1)
    for on, stream, error in [
        (0, other, "cudaErrorInvalidResourceHandle"),  # of another device
        (0, 12345, "cudaErrorInvalidResourceHandle"),  # of none
        (7, 0, r"cudaSetDevice\(7\).*cudaErrorInvalidDevice"),
    ]:
        with pytest.raises(RuntimeError, match=error):
            norm_sq(on, stream)
        assert out.isnan().all()
        assert device.core.current_device() == 0
    device.core.clear_launches()
    norm_sq(1, other)
    assert [(run.device, run.stream) for run in device.core.launches()] == [(1, other)]
    assert device.core.current_device() == 0, "the device before is current again"
    exact = [float(params[i].grad.double().square().sum()) for i in range(3)]
    assert out.tolist() == pytest.approx([exact[0] + exact[2], exact[1]], rel=1e-6)
    device.core.set_device_count(0)
    with pytest.raises(RuntimeError, match="cudaErrorNoDevice"):
        norm_sq(0, 0)


def _freed(tensor):
    tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("num_steps", [0, 2], ids=["first", "later"])
@pytest.mark.parametrize("what", ["parameter", "gradient", "exp_avg", "exp_avg_sq", "step"])
def test_freed_memory(device, what, num_steps):
    """The error says what is gone; with the memory and its values back, steps go on."""
    if what not in ("parameter", "gradient") and num_steps == 0:
        pytest.skip("there is no state yet")
    params, opt = make(device, num_steps)
    twin_params, twin = make(device, num_steps)
    tensors = {"parameter": params[1].data, "gradient": params[1].grad, **opt.state[params[1]]}
    tensor = tensors[what]
    kept = tensor.clone()
    size = tensor.untyped_storage().nbytes()
    _freed(tensor)
    others = [params[0], params[2]]
    before = values(others, opt)
    with pytest.raises(ValueError, match="no memory"):
        opt.step()
    assert_unchanged(before, others, opt)
    tensor.untyped_storage().resize_(size)
    tensor.copy_(kept)
    assert_next_step_as(params, opt, twin_params, twin)


def test_a_gradient_in_another_memory_order(device):
    params, opt = make(device)
    twin_params, twin = make(device)
    params[0].grad = params[0].grad.t().contiguous().t()
    params[2].grad = params[2].grad.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not any(params[i].grad.is_contiguous() for i in (0, 2))
    assert_next_step_as(params, opt, twin_params, twin)


def test_a_gradient_that_is_a_strided_view(device):
    """Every second element of a larger tensor, and one value for all."""
    params, opt = make(device)
    twin_params, twin = make(device)
    wide = torch.stack([params[0].grad, torch.full_like(params[0].grad, torch.nan)], dim=-1)
    params[0].grad = wide[..., 0]
    params[1].grad = device.to(torch.tensor(0.3)).expand(7)
    twin_params[1].grad = device.to(torch.full((7,), 0.3))
    assert_next_step_as(params, opt, twin_params, twin)


def test_a_dense_parameter_in_another_memory_order(device):
    """Dense is enough: channels_last weights are updated by the kernels."""
    start, grad = torch.randn(4, 3, 2, 5), torch.randn(4, 3, 2, 5)
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        param = nn.Parameter(device.to(start).contiguous(memory_format=form))
        opt = LocalizedAdamW([param], lr=0.1, fused=True)
        param.grad = device.to(grad)
        assert device.launches(opt.step).count("adamw_kernel") == 1
        found.append(param.detach())
    assert_same_bits(found[1].contiguous(), found[0])


def test_a_parameter_with_gaps(device):
    """Plain torch updates it; fused=True refuses it."""

    def make_param():
        torch.manual_seed(1)
        return nn.Parameter(device.to(torch.randn(6, 4))[:, ::2])

    with pytest.raises(ValueError, match=r"fused=True, but parameter 0 .*strides=\(4, 2\)"):
        LocalizedAdamW([make_param()], fused=True)
    strided, other = make_param(), nn.Parameter(device.to(torch.randn(5)))
    opt = LocalizedAdamW([strided, other], lr=0.1)
    dense = nn.Parameter(strided.detach().contiguous())
    judge = torch.optim.AdamW([dense], lr=0.1)
    for _ in range(3):
        strided.grad = device.to(torch.randn(6, 2))
        other.grad = torch.ones_like(other)
        dense.grad = strided.grad.clone()
        opt.step()
        judge.step()
    assert torch.allclose(strided, dense, rtol=1e-5, atol=1e-6)
    assert float(opt.state[other]["step"]) == 3.0


def test_a_gradient_that_does_not_fit(device):
    """Torch refuses to assign one of another shape; the parameter may change after it."""
    params, opt = make(device, num_steps=2)
    before = values(params, opt)
    data, params[2].data = params[2].data, params[2].data[:1]
    with pytest.raises(ValueError, match=r"shape=\(2, 3, 2\).* shape=\(1, 3, 2\)"):
        opt.step()
    params[2].data = data
    assert_unchanged(before, params, opt)
    opt.step()
    assert float(opt.state[params[2]]["step"]) == 3.0


@emulated
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [0, 2]}, "layer"),
        ({"sizes": [4, -1]}, "size"),
        ({"groups": [0, -1]}, "negative"),
        ({"moment_dtypes": [0, 2]}, "float16"),
        ({"param_dtypes": [0, 9]}, "dtype code 9"),
        ({"steps": [0]}, "steps has 1 entries, expected 2"),
        ({"anchors": [0]}, "anchors has 1 entries, expected 2"),
        ({"anchors": [0, 0]}, "anchor_dtypes has 0 entries, expected 2"),
        ({"anchors": [0, 0], "anchor_dtypes": [0, 2]}, "anchors of tensor 1 are float16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_lists_that_do_not_fit(device, change, message):
    zeros = [0, 0]
    work = {
        "sizes": [4, 4],
        "layers": [0, 1],
        "num_layers": 2,
        "params": zeros,
        "param_dtypes": zeros,
        "moment_dtypes": zeros,
        "exp_avgs": zeros,
        "exp_avg_sqs": zeros,
        "max_exp_avg_sqs": zeros,
        "steps": zeros,
        "groups": zeros,
        "tensor_ids": zeros,
        "first_elements": zeros,
        "anchors": [],
        "anchor_dtypes": [],
    }
    device.core.CudaAdamWWork(**work)
    with pytest.raises(ValueError, match=message):
        device.core.CudaAdamWWork(**{**work, **change})


@emulated
def test_gradients_that_do_not_fit(device):
    slots = [make_slot(torch.zeros(4), group=1) for _ in range(2)]
    work = ops.NativeAdamW(slots, 1)
    grads = work.gather([torch.ones(4), torch.ones(4)])
    for wrong, groups, message in [
        (ops.gradients_of([torch.ones(4)]), [GROUP] * 2, "grad"),
        (grads, [GROUP], "group 1 has no hyperparameters"),
    ]:
        with pytest.raises(ValueError, match=message):
            work.step(wrong, groups, [1.0], 1.0, with_norms=False, rounding_seed=None)
    assert device.core.launches() == []
    assert [float(slot.step) for slot in slots] == [0.0, 0.0]
