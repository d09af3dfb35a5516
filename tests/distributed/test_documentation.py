"""The code in docs/distributed.md runs as it is printed, in two processes."""

import os
import re
from pathlib import Path

import torch.distributed as dist
from parallel import batch, make_model, one_backward
from ranks import run_ranks

from gradloc import LayerMap, LayerPlan, LocalizedAdamW

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def sections() -> dict[str, list[str]]:
    """The code blocks by heading."""
    found: dict[str, list[str]] = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        found[part.split("\n")[0]] = re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)
    return found


def follow(folder: Path) -> dict[str, bool]:
    """Run the page, section by section, each with a fresh model; what each has achieved."""
    os.chdir(folder)
    share = [batch(step).chunk(dist.get_world_size())[dist.get_rank()] for step in range(2)]
    code = sections()
    done = {}

    def run(blocks: list[str], **names) -> dict:
        for block in blocks:
            # The group is there already, and Accelerate on a CPU has to be told.
            block = block.replace("dist.init_process_group()", "").replace(
                "Accelerator()", "Accelerator(cpu=True)"
            )
            exec(compile(block, str(PAGE), "exec"), names)
        return names

    first = run(code["DDP"], model=make_model("gpt2"), batches=share)
    done["DDP"] = bool(first["optimizer"].grad_norms().nansum() > 0)
    frozen = [not param.requires_grad for param in first["model"].parameters()]
    done["static"] = any(frozen) and not all(frozen)

    usual = {"LayerMap": LayerMap, "LayerPlan": LayerPlan, "LocalizedAdamW": LocalizedAdamW}
    usual["plan"] = first["plan"]
    names = run(code["FSDP2"], model=make_model("gpt2"), **usual)
    one_backward(names["model"], share[0])
    names["optimizer"].step()
    done["FSDP2"] = bool(names["optimizer"].grad_norms().nansum() > 0)
    before = names["optimizer"].state_dict()["param_groups"][0]["localization"]
    loaders, prepared = code["Checkpoints"]
    run([loaders, prepared], **names)
    after = names["optimizer"].state_dict()["param_groups"][0]["localization"]
    done["Checkpoints"] = before == after

    run(code["Accelerate"], model=make_model("gpt2"), batches=share, **usual)
    dist.barrier()  # rank 0 writes
    done["Accelerate"] = Path("checkpoint", "optimizer.bin").exists()
    return done


def test_the_page_runs(tmp_path):
    assert [len(blocks) for blocks in sections().values()] == [2, 1, 1, 2, 0]
    for result in run_ranks(follow, 2, tmp_path):
        assert result == dict.fromkeys(result, True)
        assert len(result) == 5
