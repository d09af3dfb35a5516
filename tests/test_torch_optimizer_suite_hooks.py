"""PyTorch's optimizer tests on LocalizedAdamW: hooks, copies, printing, param groups' other keys.

State dicts as such are in test_torch_optimizer_suite_state.py.
"""

# ruff: noqa: PT009
# The harness's assertEqual compares nested tensors; its messages name the item.

import copy
import functools
import pickle
from collections import OrderedDict

import torch
from numerics import assert_same_bits
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_suite import (
    INFO,
    ON_EVERY,
    TestCase,
    cases,
    give,
    instantiate,
    named,
    optims,
    params_on,
    train,
    twins_of,
)


class TestTorchSuiteHooks(TestCase):
    def _assert_same(self, ours, expected, what=""):
        self.assertEqual(ours, expected, rtol=0, atol=0, msg=lambda m: f"{what}: {m}")

    @ON_EVERY
    def test_state_dict_hooks(self, device, dtype, optim_info):
        def before(opt):
            opt.state["test"] = 1

        def after(opt, state_dict):
            state_dict["pre_hook_ran"] = state_dict["state"].pop("test", None) == 1
            return state_dict

        for kwargs in cases(optim_info, device):
            for use_before, use_after in ((True, False), (False, True), (True, True)):
                opt = optim_info.optim_cls(params_on(device), **kwargs)
                if use_before:
                    opt.register_state_dict_pre_hook(before)
                if use_after:
                    opt.register_state_dict_post_hook(after)
                found = opt.state_dict()
                self.assertEqual(found.get("pre_hook_ran"), use_before if use_after else None)
                self.assertEqual(found["state"].get("test"), None if use_after else 1)

    @ON_EVERY
    def test_load_state_dict_hooks(self, device, dtype, optim_info):
        def in_place(opt, state_dict):
            state_dict["param_groups"][0]["lr"] = 0.002

        def another(opt, state_dict):
            changed = copy.deepcopy(state_dict)
            changed["param_groups"][0]["lr"] = 0.003
            return changed

        def after(opt):
            opt.state["lr in post hook"] = opt.param_groups[0]["lr"]

        orders = {
            0.002: [(in_place, {}), (another, {"prepend": True})],
            0.003: [(in_place, {}), (another, {})],
        }
        for kwargs in cases(optim_info, device):
            for expected, hooks in orders.items():
                params = params_on(device)
                opt = optim_info.optim_cls(params, **kwargs)
                train(opt, params, 1, seed=1)
                saved = copy.deepcopy(opt.state_dict())
                for hook, how in hooks:
                    opt.register_load_state_dict_pre_hook(hook, **how)
                opt.register_load_state_dict_post_hook(after)
                opt.load_state_dict(saved)
                self.assertEqual(opt.param_groups[0]["lr"], expected)
                self.assertEqual(opt.state["lr in post hook"], expected)

    @optims([INFO], dtypes=[torch.float32, torch.bfloat16])
    def test_hook_that_orders_by_name(self, device, dtype, optim_info):
        """As torch documents: a pre-hook brings a state to the order of the names here."""

        def by_name(opt, state_dict):
            saved = state_dict["param_groups"][0]
            at = dict(zip(saved["param_names"], saved["params"], strict=True))
            names = opt.param_groups[0]["param_names"]
            state = {i: state_dict["state"][at[name]] for i, name in enumerate(names)}
            group = {**saved, "params": list(range(len(names))), "param_names": names}
            return {"state": state, "param_groups": [group]}

        for kwargs in cases(optim_info, device, dtype):
            params = params_on(device, dtype)
            opt = optim_info.optim_cls(named(params, True), **kwargs)
            train(opt, params, 3, seed=1)
            copies = twins_of(params)
            # The shapes differ between positions.
            second = optim_info.optim_cls(named(copies, True)[::-1], **kwargs)
            second.register_load_state_dict_pre_hook(by_name)
            second.load_state_dict(copy.deepcopy(opt.state_dict()))
            for a, b in zip(params, copies, strict=True):
                self._assert_same(second.state[b], opt.state[a], str(kwargs))
            train(opt, params, 2, seed=2)
            train(second, copies, 2, seed=2)
            for a, b in zip(params, copies, strict=True):
                assert_same_bits(b.cpu(), a.cpu(), str(kwargs))

    @ON_EVERY
    def test_step_hooks(self, device, dtype, optim_info):
        """Global and own ones, before and after, in torch's order; gone when removed."""
        for kwargs in cases(optim_info, device):
            params = params_on(device)
            opt, other = optim_info.optim_cls(params, **kwargs), torch.optim.SGD(params)
            calls = []

            def note(what, opt, args, kwargs, calls=calls):
                calls.append(what)

            handles = [
                register_optimizer_step_pre_hook(functools.partial(note, "all before")),
                register_optimizer_step_post_hook(functools.partial(note, "all after")),
            ]
            for one in (opt, other):
                handles.append(one.register_step_pre_hook(functools.partial(note, "before")))
                handles.append(one.register_step_post_hook(functools.partial(note, "after")))
            try:
                for one in (opt, other, opt):
                    calls.clear()
                    one.step(lambda: 1.0)
                    self.assertEqual(calls, ["all before", "before", "after", "all after"])
            finally:
                for handle in handles:
                    handle.remove()
            calls.clear()
            opt.step()
            self.assertEqual(calls, [])

    @ON_EVERY
    def test_a_pre_hook_may_change_the_arguments(self, device, dtype, optim_info):
        for kwargs in cases(optim_info, device):
            opt = optim_info.optim_cls(params_on(device), **kwargs)
            opt.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7.0), {}))
            self.assertEqual(opt.step(lambda: 1.0), 7.0)

    @optims([INFO], dtypes=[torch.float32, torch.bfloat16])
    def test_copies(self, device, dtype, optim_info):
        """Deep copies and pickles have all public attributes and go on alike."""
        for kwargs in cases(optim_info, device, dtype):
            for how in (copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))):
                params = params_on(device, dtype)
                opt = optim_info.optim_cls(params, **kwargs)
                train(opt, params, 3, seed=1)
                second = how(opt)
                public = {k for k in opt.__dict__ if not k.startswith("_")}
                self.assertEqual({k for k in second.__dict__ if not k.startswith("_")}, public)
                self._assert_same(second.state_dict(), opt.state_dict(), str(kwargs))
                copies = second.param_groups[0]["params"]
                train(opt, params, 2, seed=2)
                train(second, copies, 2, seed=2)
                for a, b in zip(params, copies, strict=True):
                    self.assertIsNot(a, b)
                    assert_same_bits(b.cpu(), a.cpu(), str(kwargs))

    @ON_EVERY
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for kwargs in cases(optim_info, device):
            opt = optim_info.optim_cls(params_on(device), **kwargs)
            text = repr(opt)
            self.assertTrue(text.startswith("LocalizedAdamW ("), msg=text)
            for word in ("Parameter Group 0", f"fused: {kwargs['fused']}", "amsgrad:", "lr:"):
                self.assertIn(word, text)

    @ON_EVERY
    def test_keys_of_others_in_a_param_group_are_kept(self, device, dtype, optim_info):
        """Through steps, schedulers, state dicts and copies."""
        for kwargs in cases(optim_info, device):
            params = params_on(device)
            groups = [
                {"params": params[:1], "name": "decoder", "initial_lr": 0.5, "lr": 0.02},
                {"params": params[1:], "weight_decay": 0.0, "marks": [1, 2]},
            ]
            opt = optim_info.optim_cls(groups, **kwargs)
            train(opt, params, 2, seed=1)
            second = optim_info.optim_cls(
                [{"params": [p]} for p in (params[0],)] + [{"params": params[1:]}], **kwargs
            )
            second.load_state_dict(copy.deepcopy(opt.state_dict()))
            for one in (second, copy.deepcopy(opt)):
                first, last = one.param_groups
                self.assertEqual((first["name"], first["initial_lr"]), ("decoder", 0.5))
                self.assertEqual((last["marks"], last["weight_decay"]), ([1, 2], 0.0))
                self.assertEqual(first["lr"], 0.02)

    @ON_EVERY
    def test_state_dict_of_other_containers(self, device, dtype, optim_info):
        """Parameters from a generator, an OrderedDict's values, and groups with a bare tensor."""
        for kwargs in cases(optim_info, device):
            params = params_on(device)
            by_name = OrderedDict(named(params, True))
            runs = []
            for made in (
                lambda ps: (p for p in ps),
                lambda ps: ps,
                lambda ps: [{"params": p} for p in ps],
                lambda ps: [{"params": iter(ps)}],
            ):
                copies = twins_of(list(by_name.values()))
                opt = optim_info.optim_cls(made(copies), **kwargs)
                torch.manual_seed(1)
                give(copies)
                opt.step()
                runs.append(copies)
            for other in runs[1:]:
                for a, b in zip(runs[0], other, strict=True):
                    assert_same_bits(b.cpu(), a.cpu(), str(kwargs))

    @ON_EVERY
    def test_profiler_names(self, device, dtype, optim_info):
        """A step and zero_grad appear under the optimizer's name, once each."""
        for kwargs in cases(optim_info, device):
            params = params_on(device)
            opt = optim_info.optim_cls(params, **kwargs)
            give(params)
            with torch.autograd.profiler.profile(use_kineto=True) as found:
                opt.step()
                opt.zero_grad()
            names = [event.name for event in found.function_events]
            self.assertEqual(names.count("Optimizer.step#LocalizedAdamW.step"), 1)
            self.assertIn("Optimizer.zero_grad#LocalizedAdamW.zero_grad", names)


instantiate(TestTorchSuiteHooks, globals())
