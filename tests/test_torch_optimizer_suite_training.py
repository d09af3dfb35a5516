"""PyTorch's optimizer tests on LocalizedAdamW: param groups, schedulers, GradScaler, mixed models.

Also parameters that freeze and return in mid-run. Values of single inputs are in
test_torch_optimizer_suite.py.
"""

# ruff: noqa: PT009, PT027
# The harness's assertEqual compares nested tensors; its messages name the item.

import copy
import inspect
import warnings

import torch
from numerics import assert_same_bits
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch_suite import (
    INFO,
    ON_EVERY,
    TestCase,
    assert_close,
    cases,
    give,
    instantiate,
    judge_of,
    optims,
    parametrize,
    twins_of,
)

# One of every class in torch.optim.lr_scheduler; `test_every_scheduler` checks that none is absent.
_SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.7),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, factor=0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6, eta_min=1e-4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, start_factor=0.4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    # These two also change betas, which are read anew at every step.
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=1e-3, max_lr=0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=4),
}


def _params(device, dtype=torch.float32):
    return [
        nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in ((7, 3), (5,))
    ]


def _go(scheduler, loss):
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


class TestTorchSuiteTraining(TestCase):
    @ON_EVERY
    def test_goes_right_direction_with_lr_schedulers(self, device, dtype, optim_info):
        """The schedulers that torch tries with Adam, on two groups of which one has its own lr."""
        self.assertGreaterEqual(len(optim_info.scheduler_inputs), 5)
        for makers in optim_info.scheduler_inputs:
            for kwargs in cases(optim_info, device):
                weight = nn.Parameter(torch.randn(10, 5, device=device))
                bias = nn.Parameter(torch.randn(10, device=device))
                inputs = torch.randn(5, device=device)
                groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
                opt = optim_info.optim_cls(groups, **kwargs)
                schedulers = [make(opt) for make in makers]

                def closure(opt=opt, weight=weight, bias=bias, inputs=inputs):
                    opt.zero_grad()
                    loss = (weight.mv(inputs) + bias).pow(2).sum()
                    loss.backward()
                    return loss

                before = closure().item()
                for _ in range(10):
                    loss = opt.step(closure).item()
                    for scheduler in schedulers:
                        _go(scheduler, loss)
                after = closure().item()
                if kwargs.get("maximize", False):
                    self.assertGreater(after, before)
                else:
                    self.assertLess(after, before)

    @ON_EVERY
    def test_every_scheduler(self, device, dtype, optim_info):
        known = {
            name
            for name, found in vars(lr_scheduler).items()
            if inspect.isclass(found)
            and issubclass(found, lr_scheduler.LRScheduler)
            and not name.startswith("_")
        }
        self.assertEqual(known - {"LRScheduler"} - set(_SCHEDULERS), set())
        for name, make in _SCHEDULERS.items():
            for kwargs in cases(optim_info, device):
                tensor_lr = isinstance(kwargs.get("lr"), torch.Tensor)
                if tensor_lr or isinstance(kwargs.get("betas", (0.9,))[0], torch.Tensor):
                    continue  # which schedulers take them changes with torch's version
                params = _params(device)
                theirs = twins_of(params)
                opt, judge = optim_info.optim_cls(params, **kwargs), judge_of(theirs, kwargs)
                schedulers = [make(opt), make(judge)]
                for step in range(8):
                    give(params, theirs)
                    opt.step()
                    judge.step()
                    with warnings.catch_warnings():
                        # Older SequentialLR steps its schedulers in the way it warns of itself.
                        warnings.filterwarnings("ignore", "The epoch parameter", UserWarning)
                        for scheduler in schedulers:
                            _go(scheduler, 1.0 + step)
                    self.assertEqual(opt.param_groups[0]["lr"], judge.param_groups[0]["lr"])
                assert_close(params, theirs, f"{name}, {kwargs}")

    @ON_EVERY
    def test_param_groups(self, device, dtype, optim_info):
        """Every option can differ by group; what a group does not say is the default."""
        other = [
            {"lr": 0.1},
            {"weight_decay": 0.0},
            {"betas": (0.5, 0.6), "eps": 1e-3},
            {"amsgrad": True},
            {"maximize": True},
        ]
        for kwargs in cases(optim_info, device):
            for options in other:
                params = _params(device)
                theirs = twins_of(params)
                opt = optim_info.optim_cls(
                    [{"params": params[:1]}, {"params": params[1:], **options}], **kwargs
                )
                judge = judge_of(
                    [{"params": theirs[:1]}, {"params": theirs[1:], **options}], kwargs
                )
                for key, default in opt.defaults.items():
                    self.assertIs(opt.param_groups[0][key], default)
                    expected = options.get(key, default)
                    self.assertEqual(opt.param_groups[1][key], expected)
                for _ in range(4):
                    give(params, theirs)
                    opt.step()
                    judge.step()
                assert_close(params, theirs, f"{kwargs}, {options}")

    @ON_EVERY
    def test_param_groups_lr(self, device, dtype, optim_info):
        """A group of lr 1e-28 stays, as its decay vanishes too."""
        for kwargs in cases(optim_info, device):
            params = _params(device)
            idle = nn.Parameter(torch.randn(2, device=device))
            before = idle.detach().clone()
            lr = kwargs.pop("lr", 1e-3)
            opt = optim_info.optim_cls(
                [{"params": params, "lr": lr}, {"params": [idle]}], lr=1e-28, **kwargs
            )
            start = twins_of(params)
            for _ in range(5):
                give([*params, idle])
                opt.step()
            assert_same_bits(idle.cpu(), before.cpu())
            for a, b in zip(params, start, strict=True):
                self.assertNotEqual(a, b)

    @ON_EVERY
    def test_add_param_group(self, device, dtype, optim_info):
        """In mid-run; refused where torch refuses, and the optimizer is as before then."""
        for kwargs in cases(optim_info, device):
            params = _params(device)
            theirs = twins_of(params)
            opt, judge = optim_info.optim_cls(params[:1], **kwargs), judge_of(theirs[:1], kwargs)
            for step in range(5):
                if step == 2:
                    opt.add_param_group({"params": params[1], "lr": 0.05})
                    judge.add_param_group({"params": theirs[1], "lr": 0.05})
                give(params, theirs)
                opt.step()
                judge.step()
            assert_close(params, theirs, str(kwargs))
            self.assertEqual(opt.state[params[1]]["step"], 3.0)
            with self.assertRaisesRegex(ValueError, "some parameters appear in more than one"):
                opt.add_param_group({"params": params[:1]})
            with self.assertRaisesRegex(TypeError, "param_group must be a dict"):
                opt.add_param_group(params)
            with self.assertRaisesRegex(ValueError, "can't optimize a non-leaf Tensor"):
                opt.add_param_group({"params": [params[0] * 2]})
            self.assertEqual(len(opt.param_groups), 2)
            opt.step()

    @parametrize("set_to_none", [True, False])
    @ON_EVERY
    def test_zero_grad(self, device, dtype, optim_info, set_to_none):
        for kwargs in cases(optim_info, device):
            params = _params(device)
            opt = optim_info.optim_cls(params, **kwargs)
            give(params, without=(1,))
            grad = params[0].grad
            opt.zero_grad(set_to_none=set_to_none)
            self.assertIsNone(params[1].grad)
            if set_to_none:
                self.assertIsNone(params[0].grad)
            else:
                self.assertIs(params[0].grad, grad)
                self.assertEqual(int(grad.count_nonzero()), 0)

    @parametrize("no_grad_scale", [True, False])
    @ON_EVERY
    def test_fused_does_not_step_if_foundinf(self, device, dtype, optim_info, no_grad_scale):
        """`found_inf` and `grad_scale` as GradScaler sets them on an optimizer that reads them."""
        for kwargs in cases(optim_info, device):
            params = _params(device)
            theirs = twins_of(params)
            opt, judge = optim_info.optim_cls(params, **kwargs), judge_of(theirs, kwargs)
            count = 0.0
            for found in (1.0, 0.0, 1.0, 0.0):
                before = twins_of(params)
                scale = 1.0 if no_grad_scale else 8.0
                opt.grad_scale = None if no_grad_scale else torch.full((1,), scale, device=device)
                opt.found_inf = torch.full((), found, device=device)
                give(params, theirs)
                for p in params:
                    p.grad.mul_(scale)
                opt.step()
                if found:
                    for p, old in zip(params, before, strict=True):
                        assert_same_bits(p.cpu(), old.cpu(), str(kwargs))
                else:
                    count += 1
                    judge.step()
                for p in params:
                    self.assertEqual(float(opt.state.get(p, {}).get("step", 0.0)), count)
            del opt.grad_scale, opt.found_inf
            give(params, theirs)
            opt.step()
            judge.step()
            assert_close(params, theirs, str(kwargs))

    @parametrize("unscale", [False, True])
    @ON_EVERY
    def test_grad_scaler(self, device, dtype, optim_info, unscale):
        """Overflow in the first step and in a later one; with unscale_ the caller clips."""
        self.assertTrue(getattr(optim_info.optim_cls, "_step_supports_amp_scaling", False))
        for kwargs in cases(optim_info, device):
            params = _params(device)
            theirs = twins_of(params)
            opt, judge = optim_info.optim_cls(params, **kwargs), judge_of(theirs, kwargs)
            scales = []
            for own, one in ((params, opt), (theirs, judge)):
                scaler = torch.amp.GradScaler(
                    device.split(":")[0], init_scale=256.0, growth_interval=2
                )
                seen = []
                for step in range(6):
                    one.zero_grad()
                    factor = torch.inf if step in (0, 3) else 1.0 + step
                    scaler.scale(sum((p**3).sum() for p in own) * factor).backward()
                    if unscale:
                        scaler.unscale_(one)
                        nn.utils.clip_grad_norm_(own, 0.5, foreach=False)
                    scaler.step(one)
                    scaler.update()
                    seen.append(scaler.get_scale())
                scales.append(seen)
                self.assertEqual([float(one.state[p]["step"]) for p in own], [4.0, 4.0])
            self.assertEqual(scales[0], scales[1])
            assert_close(params, theirs, str(kwargs))
            # What the scaler lent for a step is gone after it.
            self.assertFalse(hasattr(opt, "grad_scale") or hasattr(opt, "found_inf"))

    @ON_EVERY
    def test_mixed_dtypes(self, device, dtype, optim_info):
        """float64, float32, bfloat16 and float16 side by side, on every backend."""
        kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for kwargs in cases(optim_info, device, fused=(False, None)):
            params = [nn.Parameter(torch.rand(4, 3, device=device, dtype=kind)) for kind in kinds]
            exact = [p if p.dtype == torch.float64 else p.float() for p in params]
            theirs = twins_of(exact)
            opt, judge = optim_info.optim_cls(params, **kwargs), judge_of(theirs, kwargs)
            for _ in range(5):
                for a, b in zip(params, theirs, strict=True):
                    a.grad = torch.randn_like(a)
                    b.grad = a.grad.to(b.dtype)
                opt.step()
                judge.step()
                for a, b in zip(params, theirs, strict=True):
                    b.data.copy_(b.data.to(a.dtype))
            rounded = [b.to(a.dtype) for a, b in zip(params, theirs, strict=True)]
            assert_close(params, rounded, str(kwargs))
            wide = [opt.state[p]["exp_avg"].dtype for p in params]
            self.assertEqual(wide, [torch.float64, *[torch.float32] * 3])

    @ON_EVERY
    def test_gradients_of_another_dtype(self, device, dtype, optim_info):
        """float32 and float64 gradients of half-width parameters are used unrounded."""
        for kwargs in cases(optim_info, device, torch.bfloat16):
            for grad_dtype in (torch.float32, torch.float64, torch.float16):
                start = torch.randn(6, 5, device=device)
                param = nn.Parameter(start.clone().to(grad_dtype))
                param.grad = torch.randn_like(param)
                param.data = start.bfloat16()  # the gradient keeps its dtype
                self.assertEqual(param.grad.dtype, grad_dtype)
                theirs = nn.Parameter(start.bfloat16().float())
                theirs.grad = param.grad.float()
                opt, judge = optim_info.optim_cls([param], **kwargs), judge_of([theirs], kwargs)
                opt.step()
                judge.step()
                assert_close([param], [theirs.bfloat16()], f"{kwargs}, {grad_dtype}")
                moment = judge.state[theirs]["exp_avg"]
                self.assertEqual(opt.state[param]["exp_avg"], moment, rtol=1e-6, atol=1e-7)

    @ON_EVERY
    def test_freeze_and_unfreeze(self, device, dtype, optim_info):
        """By requires_grad and by grads set to None: bits stay, and training goes on as torch's."""
        for kwargs in cases(optim_info, device):
            torch.manual_seed(2)
            model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1))
            model.to(device)
            other = copy.deepcopy(model)
            opt = optim_info.optim_cls(model.parameters(), **kwargs)
            judge = judge_of(list(other.parameters()), kwargs)
            inputs = torch.randn(8, 4, device=device)
            for step in range(9):
                frozen = {1: [2], 2: [2], 4: [0, 3], 5: [0, 3], 7: [0, 2, 3]}.get(step, [])
                before = copy.deepcopy(model)
                state = copy.deepcopy(opt.state_dict()["state"])
                for net, one in ((model, opt), (other, judge)):
                    for i in (0, 2, 3):
                        # Freezing as people do it; steps 4 and 5 forget the gradients instead.
                        net[i].requires_grad_(i not in frozen or step in (4, 5))
                    one.zero_grad()
                    loss = net(inputs).square().mean()
                    if loss.requires_grad:
                        loss.backward()
                    if step in (4, 5):
                        for i in frozen:
                            for p in net[i].parameters():
                                p.grad = None
                    one.step()
                    net.requires_grad_(True)
                saved = opt.state_dict()["state"]
                for i in frozen:
                    for name, p in model[i].named_parameters():
                        assert_same_bits(p.cpu(), before[i].get_parameter(name).cpu(), f"{i}")
                    for at in {0: (0, 1), 2: (2, 3), 3: (4, 5)}[i]:
                        self.assertEqual(saved[at], state[at], rtol=0, atol=0)
                ours, theirs = list(model.parameters()), list(other.parameters())
                assert_close(ours, theirs, f"{kwargs}, step {step}", ulps=64)
                for a, b in zip(ours, theirs, strict=True):
                    self.assertEqual(opt.state[a]["step"], judge.state[b]["step"])
                with torch.no_grad():  # the next gradients are taken at the same point
                    for a, b in zip(ours, theirs, strict=True):
                        b.copy_(a)


class TestTorchSuiteDevices(TestCase):
    @optims([INFO], dtypes=[torch.float32, torch.bfloat16, torch.float64])
    def test_mixed_devices(self, device, dtype, optim_info):
        """Parameters on the CPU and on a device in one optimizer."""
        for kwargs in cases(optim_info, device, dtype, fused=(False, None)):
            params = [*_params("cpu", dtype), *_params(device, dtype)]
            theirs = [nn.Parameter(p.detach().cpu().clone()) for p in params]
            opt = optim_info.optim_cls(params, **kwargs)
            judge = optim_info.optim_cls(theirs, **{**kwargs, "fused": False})
            for _ in range(4):
                give(params, theirs)
                opt.step()
                judge.step()
            assert_close(params, theirs, str(kwargs))


instantiate(TestTorchSuiteTraining, globals())
instantiate(TestTorchSuiteDevices, globals(), only_for=("cuda",))
