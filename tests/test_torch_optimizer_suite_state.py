"""PyTorch's optimizer tests on LocalizedAdamW: state dicts, new and old, named and moved.

Hooks and copies are in test_torch_optimizer_suite_hooks.py, values of updates in
test_torch_optimizer_suite.py.
"""

# ruff: noqa: PT009
# The harness's assertEqual compares nested tensors; its messages name the item.

import copy
import io

import torch
from numerics import assert_same_bits
from torch import nn
from torch_suite import (
    INFO,
    ON_EVERY,
    TestCase,
    assert_close,
    cases,
    give,
    instantiate,
    judge_of,
    named,
    optims,
    parametrize,
    params_on,
    train,
    twins_of,
)


def _without_names(state_dict):
    groups = [
        {k: v for k, v in group.items() if k != "param_names"}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


class TestTorchSuiteState(TestCase):
    def _assert_same(self, ours, expected, what=""):
        self.assertEqual(ours, expected, rtol=0, atol=0, msg=lambda m: f"{what}: {m}")

    @parametrize("first_named", [True, False])
    @parametrize("second_named", [True, False])
    @optims([INFO], dtypes=[torch.float32, torch.bfloat16, torch.float64])
    def test_state_dict_deterministic(self, device, dtype, optim_info, first_named, second_named):
        """Training goes on in a second optimizer to the same bits, state dict included."""
        for kwargs in cases(optim_info, device, dtype):
            params = params_on(device, dtype)
            opt = optim_info.optim_cls(named(params, first_named), **kwargs)
            train(opt, params, 3, seed=1)
            copies = twins_of(params)
            second = optim_info.optim_cls(named(copies, second_named), **kwargs)
            saved = copy.deepcopy(opt.state_dict())
            second.load_state_dict(saved)
            self._assert_same(saved, opt.state_dict(), "loading leaves the state dict as it is")
            for seed in range(2, 5):
                train(opt, params, 1, seed)
                train(second, copies, 1, seed)
                for a, b in zip(params, copies, strict=True):
                    assert_same_bits(b.cpu(), a.cpu(), str(kwargs))
            ours, theirs = _without_names(opt.state_dict()), _without_names(second.state_dict())
            self._assert_same(theirs, ours, str(kwargs))
            # Parameters that stand twice have one number in the state dict.
            second.param_groups.extend(second.param_groups)
            twice = _without_names(second.state_dict())["param_groups"]
            self._assert_same(twice[-1], ours["param_groups"][-1])

    @parametrize("first_named", [True, False])
    @parametrize("second_named", [True, False])
    @ON_EVERY
    def test_names_survive(self, device, dtype, optim_info, first_named, second_named):
        names = ["name0", "name1", "name2"]
        for kwargs in cases(optim_info, device):
            opt = optim_info.optim_cls(named(params_on(device), first_named), **kwargs)
            second = optim_info.optim_cls(named(params_on(device), second_named), **kwargs)
            second.load_state_dict(opt.state_dict())
            found = second.state_dict()["param_groups"][0].get("param_names")
            self.assertEqual(found, names if first_named or second_named else None)

    @ON_EVERY
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        """Without the keys that AdamW got over the years; training continues equal."""
        for kwargs in cases(optim_info, device):
            params = params_on(device)
            opt = optim_info.optim_cls(params, **kwargs)
            train(opt, params, 3, seed=1)
            old = copy.deepcopy(opt.state_dict())
            for group in old["param_groups"]:
                for flag in (*optim_info.not_og_supported_flags, "decoupled_weight_decay"):
                    group.pop(flag, None)
            copies = twins_of(params)
            second = optim_info.optim_cls(copies, **kwargs)
            second.load_state_dict(old)
            # What an old state lacks stays as the optimizer was made (torch turns maximize off).
            self.assertEqual(second.param_groups[0]["maximize"], kwargs.get("maximize", False))
            train(opt, params, 2, seed=2)
            train(second, copies, 2, seed=2)
            for a, b in zip(params, copies, strict=True):
                assert_same_bits(b.cpu(), a.cpu(), str(kwargs))
            self._assert_same(second.state_dict(), opt.state_dict(), str(kwargs))

    @ON_EVERY
    def test_load_nontensor_step(self, device, dtype, optim_info):
        """Counts as numbers, as Tensors of one dimension, of float64 and of int64."""
        forms = {
            "float": float,
            "int": int,
            "one dimension": lambda step: step.reshape(1),
            "float64": lambda step: step.double(),
            "int64": lambda step: step.long(),
        }
        for name, form in forms.items():
            for kwargs in cases(optim_info, device):
                params = params_on(device)
                opt = optim_info.optim_cls(params, **kwargs)
                train(opt, params, 3, seed=1)
                saved = copy.deepcopy(opt.state_dict())
                for state in saved["state"].values():
                    state["step"] = form(state["step"])
                copies = twins_of(params)
                second = optim_info.optim_cls(copies, **kwargs)
                second.load_state_dict(saved)
                train(opt, params, 2, seed=2)
                train(second, copies, 2, seed=2)
                for a, b in zip(params, copies, strict=True):
                    assert_same_bits(b.cpu(), a.cpu(), f"{name}, {kwargs}")
                    self._assert_same(second.state[b]["step"], opt.state[a]["step"])

    @parametrize("is_named", [True, False])
    @optims([INFO], dtypes=[torch.float32, torch.bfloat16])
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info, is_named):
        for kwargs in cases(optim_info, device, dtype):
            params = params_on(device, dtype)
            opt = optim_info.optim_cls(named(params, is_named), **kwargs)
            train(opt, params, 3, seed=1)
            for target in {"cpu", device}:
                file = io.BytesIO()
                torch.save(opt.state_dict(), file)
                for weights_only in (True, False):
                    file.seek(0)
                    loaded = torch.load(file, weights_only=weights_only, map_location=target)
                    if target == device:
                        self._assert_same(loaded, opt.state_dict(), str(kwargs))
                copies = twins_of(params)
                second = optim_info.optim_cls(named(copies, is_named), **kwargs)
                second.load_state_dict(loaded)
                twin = copy.deepcopy(opt)
                twin_params = twin.param_groups[0]["params"]
                train(twin, twin_params, 2, seed=2)
                train(second, copies, 2, seed=2)
                for a, b in zip(twin_params, copies, strict=True):
                    assert_same_bits(b.cpu(), a.cpu(), str(kwargs))

    @ON_EVERY
    def test_state_moves_between_dtypes_of_parameters(self, device, dtype, optim_info):
        """Moments are as saved where both dtypes keep them in float32, else converted."""
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        for kwargs in cases(optim_info, device, fused=(False, None)):
            params = params_on(device)
            opt = optim_info.optim_cls(params, **kwargs)
            train(opt, params, 3, seed=1)
            for other in dtypes:
                moved = twins_of(params, other)
                second = optim_info.optim_cls(moved, **kwargs)
                second.load_state_dict(opt.state_dict())
                train(second, moved, 0, seed=0)
                for a, b in zip(params, moved, strict=True):
                    for key in ("exp_avg", "exp_avg_sq"):
                        got = second.state[b][key]
                        self.assertEqual(got.float(), opt.state[a][key], rtol=0, atol=0)
                train(second, moved, 1, seed=2)
                wide = torch.promote_types(other, torch.float32)
                self.assertEqual({second.state[b]["exp_avg"].dtype for b in moved}, {wide})

    @ON_EVERY
    def test_torchs_state_dict_and_ours(self, device, dtype, optim_info):
        """The same keys, group by group and parameter by parameter; either loads the other's."""
        for kwargs in cases(optim_info, device):
            params = params_on(device)
            theirs = twins_of(params)
            opt, judge = optim_info.optim_cls(params, **kwargs), judge_of(theirs, kwargs)
            for one, own in ((opt, params), (judge, theirs)):
                train(one, own, 2, seed=1)
            ours, expected = opt.state_dict(), judge.state_dict()
            missing = {"decoupled_weight_decay"} - set(expected["param_groups"][0])
            self.assertEqual(
                set(ours["param_groups"][0]) - missing, set(expected["param_groups"][0])
            )
            for i, state in expected["state"].items():
                self.assertEqual(list(ours["state"][i]), list(state))
            opt.load_state_dict(copy.deepcopy(expected))
            judge.load_state_dict(copy.deepcopy(ours))
            for one, own in ((opt, params), (judge, theirs)):
                train(one, own, 2, seed=2)
            assert_close(params, theirs, str(kwargs))


class TestTorchSuiteStateMoves(TestCase):
    @ON_EVERY
    def test_state_dict_with_cudaparams_on(self, device, dtype, optim_info):
        """From the CPU to the device and back; `step` stays on the CPU, as torch keeps it."""
        for kwargs in cases(optim_info, device):
            params = params_on("cpu")
            opt = optim_info.optim_cls(params, **kwargs)
            train(opt, params, 3, seed=1)
            moved = [nn.Parameter(p.detach().to(device)) for p in params]
            second = optim_info.optim_cls(moved, **kwargs)
            second.load_state_dict(copy.deepcopy(opt.state_dict()))
            self.assertEqual({second.state[p]["step"].device.type for p in moved}, {"cpu"})
            self.assertEqual({second.state[p]["exp_avg"].device.type for p in moved}, {"cuda"})
            for _ in range(3):
                give(params, moved)
                opt.step()
                second.step()
                assert_close(moved, params, str(kwargs))
            opt.load_state_dict(second.state_dict())
            self.assertEqual({opt.state[p]["exp_avg"].device.type for p in params}, {"cpu"})


instantiate(TestTorchSuiteState, globals())
instantiate(TestTorchSuiteStateMoves, globals(), only_for=("cuda",))
