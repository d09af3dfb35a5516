"""gradloc.watch: every change that a step must notice, and every gradient that it must not misread.

Each case runs on all ways to look: torch's C interface with and without its C++ functions, and
plain Python.
"""

import gc
import sys
import weakref
from collections import defaultdict

import pytest
import torch
from torch import nn

from gradloc import watch as watching
from gradloc.watch import PlainWatch, watch

SHAPES = [(4,), (3, 5), (), (0, 7), (2, 3, 4)]
LAYERS = [2, 0, 2, 1, 5]
PARTS = [[0, 2, 3], [1, 4]]
KEYS = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@pytest.fixture(params=["direct", "objects", "plain"])
def way(request, monkeypatch):
    """How tensors are looked at."""
    if request.param == "objects":
        monkeypatch.setattr(watching, "_KNOWN_TO", (0, 0))
    watching.torch_interface.cache_clear()
    yield request.param
    watching.torch_interface.cache_clear()


class Watched:
    """An optimizer's groups and state with a watch over them, as it was remembered."""

    def __init__(self, way, *, shapes=SHAPES, dtype=torch.float32, parts=PARTS):
        self.params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        self.frozen = nn.Parameter(torch.randn(6))
        names = ("amsgrad", "fused")
        self.groups = [
            dict(zip(names, (True, None), strict=True), params=self.params[:3]),
            dict(zip(names, (False, True), strict=True), params=[*self.params[3:], self.frozen]),
        ]
        self.states = defaultdict(dict)
        for param in (*self.params, self.frozen):
            self.states[param] = {key: torch.zeros_like(param) for key in KEYS}
        make = PlainWatch if way == "plain" else watch
        self.watch = make(self.groups, self.states, self.params, LAYERS[: len(shapes)])
        assert type(self.watch).__name__ == ("PlainWatch" if way == "plain" else "TensorWatch")
        self.remembered = self.watch.remember(parts)

    def addresses(self):
        """What `gradients` has to find, by part."""
        grads = [[self.params[member].grad for member in part] for part in PARTS]
        return [[0 if g is None else g.data_ptr() or 1 for g in part] for part in grads]


def test_linux_is_read_by_the_compiled_class():
    """The other ways give the same answers: only this sees when the fast one is not used."""
    watching.torch_interface.cache_clear()
    found = watching.torch_interface()
    assert (found is not None) == (sys.platform == "linux")


def test_an_unknown_torch_is_not_read(monkeypatch):
    watching.torch_interface.cache_clear()
    monkeypatch.setattr(watching, "_FUNCTIONS", (*watching._FUNCTIONS, "aoti_torch_of_the_future"))
    assert watching.torch_interface() is None
    assert isinstance(watch([], {}, [], []), PlainWatch)
    watching.torch_interface.cache_clear()


def test_nothing_is_known_before_it_is_remembered(way):
    watched = Watched(way)
    fresh = type(watched.watch)
    if fresh is PlainWatch:
        other = fresh(watched.groups, watched.states, watched.params, LAYERS)
    else:
        other = watch(watched.groups, watched.states, watched.params, LAYERS)
    assert (other.unchanged(), other.gradients()) == (False, None)


def test_what_a_step_does_is_no_change(way):
    watched = Watched(way)
    assert watched.remembered
    for _ in range(3):
        for param in watched.params:
            param.grad = torch.randn_like(param)
        with torch.no_grad():
            for param in watched.params:
                param.add_(param.grad)
                for value in watched.states[param].values():
                    value.add_(1)
        watched.groups[0]["lr"] = 0.5
        assert watched.watch.unchanged()


def set_data(param, change):
    param.data = change(param.data)


def swap_moments(w):
    state = w.states[w.params[1]]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]


def rename_key(w):
    state = w.states[w.params[0]]
    state["exp"] = state.pop("max_exp_avg_sq")


CHANGES = [
    swap_moments,
    rename_key,
    lambda w: set_data(w.params[4], torch.clone),
    lambda w: set_data(w.params[1], lambda x: x.as_strided((3, 5), (1, 3))),
    lambda w: set_data(w.params[1], lambda x: x.to(torch.bfloat16)),
    lambda w: set_data(w.params[1], lambda x: x.view(5, 3)),
    lambda w: set_data(w.params[1], torch._neg_view),
    lambda w: set_data(w.states[w.params[0]]["exp_avg_sq"], torch.clone),
    lambda w: w.states.update({w.params[1]: dict(w.states[w.params[1]])}),
    lambda w: w.states.update({nn.Parameter(torch.ones(2)): {}}),
    lambda w: w.states.pop(w.params[4]),
    lambda w: w.groups[0]["params"].__setitem__(1, nn.Parameter(w.params[1].detach())),
    lambda w: w.groups[1].update(amsgrad=True),
    lambda w: w.groups[0].update(fused=False),
    lambda w: w.states[w.params[0]].update(exp_avg=torch.zeros(4)),
    lambda w: w.states[w.params[0]].update(extra=1),
    lambda w: w.states[w.params[0]].update(step=1.0),
    lambda w: w.states[w.params[0]].pop("max_exp_avg_sq"),
    lambda w: w.states[w.params[0]]["step"].share_memory_(),
    lambda w: w.states.clear(),
    lambda w: w.groups[0]["params"].append(w.frozen),
    lambda w: w.groups[1]["params"].pop(),
    lambda w: w.groups[0]["params"].reverse(),
    lambda w: w.groups[0].update(params=w.params[:2]),
    lambda w: w.groups.append(dict(w.groups[0], params=[])),
    lambda w: w.groups.pop(),
    lambda w: w.groups.reverse(),
    lambda w: w.groups[0].pop("fused"),
    lambda w: w.params[1].untyped_storage().resize_(0),
    lambda w: w.states[w.params[1]]["exp_avg"].untyped_storage().resize_(0),
    lambda w: w.params[0].share_memory_(),
    lambda w: torch.utils.swap_tensors(w.params[0], nn.Parameter(torch.zeros(4))),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(way, change):
    watched = Watched(way)
    assert watched.watch.unchanged()
    change(watched)
    assert not watched.watch.unchanged()
    assert not watched.watch.unchanged()


def test_the_state_of_a_frozen_parameter_may_be_moved(way):
    watched = Watched(way)
    watched.states[watched.frozen]["exp_avg"] = torch.ones(6)
    assert watched.watch.unchanged()


def test_remembering_anew_ends_a_change(way):
    watched = Watched(way)
    set_data(watched.params[4], torch.clone)
    assert not watched.watch.unchanged()
    assert watched.watch.remember(PARTS)
    assert watched.watch.unchanged()


@pytest.mark.parametrize(
    "param",
    [
        nn.Parameter(torch.zeros(4, dtype=torch.float64)),
        nn.Parameter(torch.zeros(4, device="meta")),
        nn.Parameter(torch._neg_view(torch.ones(4))),
        nn.Parameter(torch.zeros(4).to_sparse()),
        torch.zeros(4).as_subclass(type("Other", (torch.Tensor,), {})),
    ],
    ids=["float64", "meta", "negative", "sparse", "subclass"],
)
def test_what_is_not_watched(way, param):
    groups = [{"params": [param], "amsgrad": False, "fused": None}]
    make = PlainWatch if way == "plain" else watch
    watched = make(groups, {}, [param], [0])
    assert not watched.remember([[0]])
    assert not watched.unchanged()
    assert watched.gradients() is None


def test_gradients_by_part(way):
    watched = Watched(way)
    found = watched.watch.gradients()
    assert [g.addresses for g in found] == [[0, 0, 0], [0, 0]]
    assert [(sum(g.present), len(g.present)) for g in found] == [(0, 3), (0, 2)]
    assert watched.watch.layers_with_grad == set()
    for param in watched.params[1:]:
        param.grad = torch.randn_like(param)
    found = watched.watch.gradients()
    assert [g.addresses for g in found] == watched.addresses()
    assert [g.codes for g in found] == [[0, 0, 0], [0, 0]]
    assert [(sum(g.present), len(g.present)) for g in found] == [(2, 3), (2, 2)]
    assert watched.watch.layers_with_grad == {0, 1, 2, 5}
    for param in watched.params[1:]:
        param.grad = None
    watched.params[0].grad = torch.ones(4)
    assert [sum(g.present) for g in watched.watch.gradients()] == [1, 0]
    assert watched.watch.layers_with_grad == {2}


@pytest.mark.parametrize(("dtype", "code"), [(torch.bfloat16, 1), (torch.float16, 2)])
def test_dtypes_of_gradients(way, dtype, code):
    watched = Watched(way, dtype=dtype)
    watched.params[1].grad = torch.randn(3, 5).to(dtype)
    found = watched.watch.gradients()
    assert [g.addresses for g in found] == watched.addresses()
    assert [g.codes for g in found] == [[0, 0, 0], [code, 0]]


def test_a_gradient_may_have_another_dtype_than_its_parameter(way):
    watched = Watched(way)
    watched.params[1].grad = torch.ones(3, 5)
    watched.params[1].grad.data = torch.ones(3, 5).to(torch.bfloat16)
    found = watched.watch.gradients()
    assert [g.addresses for g in found] == watched.addresses()
    assert found[1].codes == [1, 0]


def test_a_parameter_that_is_in_no_part(way):
    """It has no state yet, which its first gradient brings."""
    watched = Watched(way, parts=[[0, 1, 2, 3]])
    watched.params[0].grad = torch.ones(4)
    assert watched.watch.gradients()[0].present == [True, False, False, False]
    watched.params[4].grad = torch.ones(2, 3, 4)
    assert watched.watch.gradients() is None


def test_memory_orders(way):
    watched = Watched(way)
    watched.params[1].grad = torch.ones(5, 3).t()
    assert watched.watch.gradients() is None
    watched.params[1].grad = torch.ones(3, 10)[:, ::2]
    assert watched.watch.gradients() is None
    watched.params[1].data = torch.ones(5, 3).t()
    watched.params[1].grad = torch.ones(5, 3).t()
    assert watched.watch.remember(PARTS)
    assert [g.addresses for g in watched.watch.gradients()] == watched.addresses()
    watched.params[1].grad = torch.ones(3, 5)
    assert watched.watch.gradients() is None


def test_strides_of_single_elements_do_not_count(way):
    watched = Watched(way, shapes=[(1, 4)], parts=[[0]])
    grad = torch.ones(4).as_strided((1, 4), (17, 1))
    watched.params[0].grad = grad
    (found,) = watched.watch.gradients()
    assert found.addresses == [grad.data_ptr()]


class WithMemory(torch.Tensor):
    """A subclass whose values are where a tensor's are."""


GRADIENTS = {
    "negative": lambda: torch._neg_view(torch.ones(4)),
    "sparse": lambda: torch.ones(4).to_sparse(),
    "zeros without memory": lambda: torch._efficientzerotensor(4),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_that_is_not_ordinary(way, name, capfd):
    watched = Watched(way)
    watched.params[0].grad = GRADIENTS[name]()
    assert watched.watch.unchanged()
    assert watched.watch.gradients() is None
    assert capfd.readouterr() == ("", "")  # torch's C interface prints its errors


def test_a_float64_gradient(way):
    watched = Watched(way)
    watched.params[0].grad = torch.ones(4)
    watched.params[0].grad.data = torch.ones(4, dtype=torch.float64)
    assert watched.watch.gradients() is None


def test_a_negative_part_of_a_complex_number(way):
    """The lazy minus sign that autograd itself makes."""
    watched = Watched(way, shapes=[()], parts=[[0]])
    watched.params[0].grad = torch.tensor(1 + 2j).conj().imag
    assert watched.params[0].grad.is_neg()
    assert watched.watch.gradients() is None


def test_a_gradient_whose_storage_was_freed(way):
    watched = Watched(way)
    watched.params[1].grad = torch.ones(3, 5)
    watched.params[1].grad.untyped_storage().resize_(0)
    assert watched.watch.gradients() is None


def test_a_subclass_is_left_to_python_or_read_where_its_memory_is(way):
    watched = Watched(way)
    watched.params[0].grad = torch.ones(4).as_subclass(WithMemory)
    found = watched.watch.gradients()
    assert found is None or found[0].addresses[0] == watched.params[0].grad.data_ptr()
    assert way == "direct" or found is None


def test_gradients_of_another_shape_or_device(way):
    """Torch checks a gradient when it is set; what came after makes it wrong."""
    watched = Watched(way)
    watched.params[1].grad = torch.ones(3, 5)
    watched.params[1].data = torch.ones(5, 3)
    assert watched.watch.remember(PARTS)
    assert watched.watch.gradients() is None
    watched.params[1].data = torch.ones(3, 5)
    assert watched.watch.remember(PARTS)
    assert watched.watch.gradients() is not None
    watched.params[1].grad.data = torch.ones(5, 3)
    assert watched.watch.gradients() is None


def test_gradients_that_require_gradients(way):
    watched = Watched(way, shapes=[(4,)], parts=[[0]])
    (grad,) = torch.autograd.grad((watched.params[0] ** 3).sum(), watched.params, create_graph=True)
    watched.params[0].grad = grad
    assert grad.requires_grad
    (found,) = watched.watch.gradients()
    assert found.addresses == [grad.data_ptr()]


def test_gradients_are_kept_alive_and_then_let_go(way):
    watched = Watched(way)
    watched.params[1].grad = torch.ones(3, 5)
    older = torch._C._WeakTensorRef(watched.params[1].grad)
    first = watched.watch.gradients()
    watched.params[1].grad = torch.ones(3, 5)
    newer = torch._C._WeakTensorRef(watched.params[1].grad)
    second = watched.watch.gradients()
    watched.params[1].grad = None
    assert first[1].addresses[0] != second[1].addresses[0]
    assert (older.expired(), newer.expired()) == (False, False)
    del first
    assert (older.expired(), newer.expired()) == (True, False)
    del second
    assert newer.expired()


def test_garbage_collection(way):
    """A hook of a parameter that holds the optimizer closes a ring through the watch."""

    class Owner:
        pass

    owner = Owner()
    owner.watched = Watched(way)
    owner.watched.params[0].register_hook(lambda grad, owner=owner: None)
    param = owner.watched.params[0]
    gone, param_gone = weakref.ref(owner), weakref.ref(param)
    del owner, param
    gc.collect()
    assert gone() is None
    assert param_gone() is None


def test_an_owner_is_freed_at_once(way):
    watched = Watched(way)
    gone = weakref.ref(watched)
    gc.disable()
    try:
        del watched
        assert gone() is None
    finally:
        gc.enable()


def test_errors_in_what_is_to_be_watched(way):
    watched = Watched(way)
    if way == "plain":
        with pytest.raises(AssertionError):
            watched.watch.remember([[0], [0]])
        return
    with pytest.raises(ValueError, match="member 0 is in two parts"):
        watched.watch.remember([[0], [0]])
    with pytest.raises(ValueError, match="member 9 is in two parts, or is no active"):
        watched.watch.remember([[9]])
    with pytest.raises(ValueError, match="layers has 1 entries, expected 5"):
        watch(watched.groups, watched.states, watched.params, [0])
