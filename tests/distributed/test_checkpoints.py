"""torch.distributed.checkpoint: saved on 2 ranks of FSDP2, loaded on 1 and on 4, bit for bit."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from numerics import assert_same_bits
from parallel import (
    NUM_STEPS,
    Run,
    alone,
    assert_same_run,
    collect,
    fully_sharded,
    make_model,
    make_optimizer,
    train,
)
from ranks import run_ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from gradloc import LayerPlan
from gradloc.distributed import load_optimizer, prepare_to_load

STOP = 8  # some layers froze at step 6, one never trained
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning"  # torch says so when one process loads
)


def save(folder: Path) -> tuple[Run, str]:
    """Train 8 steps, save sharded and whole; what the checkpoint has to bring back."""
    model = fully_sharded(make_model("gpt2"))
    optimizer = make_optimizer(model, seed=5)
    rank = {"rank": dist.get_rank(), "num_ranks": dist.get_world_size()}
    run = train(model, optimizer, stop=STOP, **rank)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    record = optimizer_state["param_groups"][0]["localization"]
    dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=folder / "sharded")
    whole = get_state_dict(model, optimizer, options=FULL)
    if dist.get_rank() == 0:
        torch.save(whole, folder / "whole.pt")
    run.norms = []
    return run, record


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Run, str]:
    folder = tmp_path_factory.mktemp("checkpoint")
    results = run_ranks(save, 2, folder)
    return folder, *results[0]


def fresh():
    """Another model and an optimizer whose plan trains only one layer, with another seed."""
    model = make_model("gpt2")
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    if dist.is_initialized():
        fully_sharded(model)
    optimizer = make_optimizer(model, lr=0.5, max_grad_norm=9.0)
    names = optimizer.layers.names
    only = LayerPlan({name: float(i == 1) for i, name in enumerate(names)}, policy="fresh")
    optimizer.set_plan(only)
    return model, optimizer


def load_with_torch(folder: Path, model, optimizer) -> None:
    prepare_to_load(model, optimizer, folder / "sharded")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optim": optimizer_state}, checkpoint_id=folder / "sharded")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=StateDictOptions(strict=False),
    )


def load_with_ours(folder: Path, model, optimizer) -> None:
    model_state = {"model": get_model_state_dict(model)}
    dcp.load(model_state, checkpoint_id=folder / "sharded")
    set_model_state_dict(model, model_state["model"])
    for param in model.parameters():  # as for a static plan; moments are loaded all the same
        param.requires_grad_(False)
    load_optimizer(model, optimizer, folder / "sharded")
    for param in model.parameters():
        param.requires_grad_(True)


def load_whole(folder: Path, model, optimizer) -> None:
    """From the full state dict that every rank reads."""
    model_state, optimizer_state = torch.load(folder / "whole.pt", weights_only=True)
    prepare_to_load(model, optimizer, optimizer_state)
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, model_state, options=options)
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)


def load_broadcast(folder: Path, model, optimizer) -> None:
    """From the full state dict that only rank 0 reads."""
    model_state, optimizer_state = {}, {}
    if not dist.is_initialized() or dist.get_rank() == 0:
        model_state, optimizer_state = torch.load(folder / "whole.pt", weights_only=True)
    prepare_to_load(model, optimizer, optimizer_state)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, model_state, options=options)
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)


def continue_from(folder: Path, load) -> tuple[Run, str, Run]:
    """What came back, and the run to its end."""
    model, optimizer = fresh()
    load(folder, model, optimizer)
    back = Run()
    collect(back, model, optimizer)
    record = optimizer.state_dict()["param_groups"][0]["localization"]
    assert optimizer.param_groups[0]["lr"] == 4e-3
    share = (
        {"rank": dist.get_rank(), "num_ranks": dist.get_world_size()}
        if dist.is_initialized()
        else {}
    )
    end = train(model, optimizer, start=STOP, **share)
    return back, record, end


WAYS = {
    "torch": load_with_torch,
    "load_optimizer": load_with_ours,
    "whole": load_whole,
    "broadcast": load_broadcast,
}


def continue_all(folder: Path) -> dict[str, tuple[Run, str, Run]]:
    return {name: continue_from(folder, load) for name, load in WAYS.items()}


def check(results, saved, what: str) -> None:
    _, before, record = saved
    for name, (back, came_record, end) in results.items():
        assert came_record == record, (what, name)
        assert back.steps == before.steps, (what, name)
        for kind in ("params", "moments"):
            theirs = getattr(before, kind)
            assert getattr(back, kind).keys() == theirs.keys(), (what, name)
            for key, value in theirs.items():
                assert_same_bits(getattr(back, kind)[key], value, f"{what}, {name}: {key}")
        expected = copy.copy(alone("gpt2"))
        expected.norms = expected.norms[STOP:]
        assert len(end.norms) == NUM_STEPS - STOP
        expected.norms, end.norms = expected.norms[1:], end.norms[1:]
        assert_same_run(end, expected, f"{what}, {name}")


def test_loaded_on_one(saved):
    ways = {k: v for k, v in WAYS.items() if k != "broadcast"}  # there is no other rank
    check({name: continue_from(saved[0], load) for name, load in ways.items()}, saved, "alone")


def test_loaded_on_four(saved):
    for rank, results in enumerate(run_ranks(continue_all, 4, saved[0])):
        check(results, saved, f"rank {rank} of 4")


def test_the_checkpoint_has_what_makes_this_hard(saved):
    _, before, _ = saved
    names = {key.rpartition(".")[0] for key in before.moments}
    model, optimizer = fresh()
    assert names < set(before.params), "a layer that never trained has no moments"
    assert set(before.steps.values()) == {3.0, 5.0, 6.0, 8.0}, "tensors of several ages"
    ours = get_optimizer_state_dict(model, optimizer)
    assert set(ours["state"]) != names, "the fresh optimizer has other moments"


def test_without_preparation_nothing_is_lost_silently(saved):
    model, optimizer = fresh()
    optimizer.set_plan(
        LayerPlan({n: float(i == 0) for i, n in enumerate(optimizer.layers.names)}, "one that has")
    )
    optimizer_state = get_optimizer_state_dict(model, optimizer)
    dcp.load({"optim": optimizer_state}, checkpoint_id=saved[0] / "sharded")
    with pytest.raises(
        ValueError, match=r"state of 39 parameters and has that of 1\..*prepare_to_load"
    ):
        set_optimizer_state_dict(
            model, optimizer, optimizer_state, options=StateDictOptions(strict=False)
        )


def test_what_cannot_be_prepared(saved, tmp_path):
    folder = saved[0]
    model, optimizer = fresh()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"no moments of this model's parameters"):
        prepare_to_load(model, optimizer, {"state": {}, "param_groups": []})
    state = torch.load(folder / "whole.pt", weights_only=True)[1]
    state["state"]["transformer.extra"] = state["state"]["transformer.wte.weight"]
    with pytest.raises(ValueError, match=r"moments of transformer\.extra, and the optimizer"):
        prepare_to_load(model, optimizer, state)
    two = {f"{name}.state.transformer.wte.weight.exp_avg": 0 for name in ("a", "b")}
    with pytest.raises(ValueError, match=r"several optimizers \('a', 'b'\)"):
        prepare_to_load(model, optimizer, two)
    with pytest.raises(ValueError, match=r"optimizer=AdamW: this is for LocalizedAdamW"):
        prepare_to_load(model, torch.optim.AdamW(model.parameters()), folder / "sharded")
    with pytest.raises(ValueError, match=r"of the optimizer's \d+ parameters are not in this"):
        prepare_to_load(make_model("llama"), optimizer, folder / "sharded")
    assert optimizer.state_dict() == before
    assert prepare_to_load(model, optimizer, folder / "sharded") == "optim"


def test_preparation_replaces_what_was_there(saved):
    """Also with amsgrad, whose third moment the optimizer did not have."""
    model, optimizer = fresh()
    wpe = model.transformer.wpe.weight  # never trained before it was saved
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.set_plan(None)
    optimizer.step()
    assert wpe in optimizer.state
    state = torch.load(saved[0] / "whole.pt", weights_only=True)[1]
    amsgrad = state["state"]["transformer.wte.weight"]
    amsgrad["max_exp_avg_sq"] = amsgrad["exp_avg_sq"]
    assert prepare_to_load(model, optimizer, state) == ""
    names = {name for name, param in model.named_parameters() if param in optimizer.state}
    assert names == set(state["state"])
    assert wpe not in optimizer.state
    for param, ours in optimizer.state.items():
        assert ("max_exp_avg_sq" in ours) == (param is model.transformer.wte.weight)
        assert not any(value.any() for value in ours.values())
