"""What a user runs with `accelerate launch`: trains under DDP, then under FSDP2, and writes both.

Each run ends with Accelerate's own checkpoint at step 8, which a fresh optimizer continues from.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from parallel import Run, make_model, make_optimizer, train

from gradloc import sharding
from gradloc.distributed import load_optimizer

SAVE_AT = 8


def run(accelerator: Accelerator, folder: Path, load) -> Run:
    """Train to step 8, save, and let another model and optimizer train the rest."""

    def backward(model, ids) -> None:
        accelerator.backward(model(input_ids=ids, labels=ids, use_cache=False).loss)

    shares = {"rank": accelerator.process_index, "num_ranks": accelerator.num_processes}
    model = make_model("gpt2")
    optimizer = make_optimizer(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    train(model, optimizer.optimizer, stop=SAVE_AT, backward=backward, **shares)
    accelerator.save_state(folder)
    accelerator.free_memory(model, optimizer)

    model = make_model("gpt2")
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = make_optimizer(model, lr=0.5, seed=3)
    model, optimizer = accelerator.prepare(model, optimizer)
    load(folder, model, optimizer)
    plain = accelerator.unwrap_model(model)
    rest = {"start": SAVE_AT, "backward": backward, "inner": plain}
    result = train(model, optimizer.optimizer, **rest, **shares)
    accelerator.free_memory(model, optimizer)
    return result


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    ddp = run(
        accelerator, folder / "ddp", lambda saved, model, optimizer: accelerator.load_state(saved)
    )

    # Accelerate turns to FSDP2 only on accelerators; its preparation works on the CPU as well.
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2

    def load(saved: Path, model, optimizer) -> None:
        from torch.distributed.checkpoint import load
        from torch.distributed.checkpoint.state_dict import (
            get_model_state_dict,
            set_model_state_dict,
        )

        assert all(sharding.is_sharded(param) for param in model.parameters())
        weights = {"model": get_model_state_dict(model)}
        load(weights, checkpoint_id=saved / "pytorch_model_fsdp_0")
        set_model_state_dict(model, weights["model"])
        load_optimizer(model, optimizer, saved / "optimizer_0")

    fsdp2 = run(accelerator, folder / "fsdp2", load)
    torch.save((ddp, fsdp2), folder / f"result{accelerator.process_index}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
