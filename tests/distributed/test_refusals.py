"""FSDP1 and ZeRO-3 are refused when the optimizer is made, with what to use instead."""

import warnings

import pytest
import torch
from parallel import batch, make_model, make_optimizer, one_backward
from ranks import run_ranks
from torch import nn

from gradloc import LocalizedAdamW


def fsdp1() -> list[str]:
    """What is said of FSDP1's parameters: flat, in their original shapes, wrapped too late."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    said = []
    for original in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that FSDP1 is old
            model = FullyShardedDataParallel(
                make_model("gpt2"), use_orig_params=original, device_id=torch.device("cpu")
            )
        for params in (model.parameters(), model.named_parameters()):
            with pytest.raises(ValueError, match="FSDP1") as caught:
                LocalizedAdamW(params, lr=1e-3)
            said.append(str(caught.value))
        with pytest.raises(ValueError, match=r"FSDP1|no parameter|layer"):
            make_optimizer(model)
    # The optimizer first: it holds parameters that FSDP1 then takes the memory of.
    model = make_model("gpt2")
    optimizer = make_optimizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu")
        )
    one_backward(wrapped, batch(0))
    with pytest.raises(ValueError, match="FSDP1") as caught:
        optimizer.step()
    said.append(str(caught.value))
    return said


def test_fsdp1():
    for said in run_ranks(fsdp1, 2):
        assert len(said) == 5
        for message in said:
            assert "fully_shard" in message
            assert "fsdp_version=2" in message


def test_zero_3():
    model = make_model("gpt2")
    model.transformer.wte.weight.ds_id = 0  # as deepspeed.zero.Init marks it
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight.*ZeRO-3.*fully_shard"):
        make_optimizer(model)
    optimizer = LocalizedAdamW([nn.Parameter(torch.ones(2))])
    late = nn.Parameter(torch.ones(3))
    late.ds_status = "NOT_AVAILABLE"
    with pytest.raises(ValueError, match=r"ZeRO-3"):
        optimizer.add_param_group({"params": [late]})
    assert len(optimizer.param_groups) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
