"""What gradloc.training.train refuses, before it changes anything."""

import pytest
from conftest import make_gpt2
from small_runs import settings

from gradloc import (
    AllLayers,
    GradientProfile,
    LayerMap,
    LayerPlan,
    RandomLayers,
    Retrace,
    TracedGradientPolicy,
)
from gradloc.training.train import train


def test_choices_that_cannot_be(gpt2, tokenizer, dataset, tracing, tmp_path):
    def run(**choice):
        return train(gpt2, None, dataset, settings(tmp_path / "run"), **choice)

    layers = LayerMap.from_model(gpt2)
    everything = AllLayers()(layers)
    with pytest.raises(ValueError, match="either plan or policy"):
        run()
    with pytest.raises(ValueError, match="either plan or policy"):
        run(plan=everything, policy=AllLayers())
    with pytest.raises(ValueError, match="needs a profile"):
        run(policy=TracedGradientPolicy())
    with pytest.raises(ValueError, match="traces again during the run"):
        run(policy=Retrace(TracedGradientPolicy(), every=2))
    with pytest.raises(ValueError, match="does not fit the model"):
        run(plan=LayerPlan({"somewhere": 1.0}))
    with pytest.raises(ValueError, match="freezes all 7 layers"):
        run(plan=LayerPlan(dict.fromkeys(layers.names, 0.0)))
    by_block = LayerMap.from_model(gpt2, granularity="block")
    profile = GradientProfile.from_norms(
        {"probe": dict.fromkeys(by_block.names, 1.0)}, dict.fromkeys(by_block.names, 1.0)
    )
    with pytest.raises(ValueError, match="layers"):
        run(policy=TracedGradientPolicy(), profile=profile)
    assert not list(tmp_path.rglob("*.json")), "an error left files behind"


def test_a_run_is_not_overwritten_by_mistake(gpt2, tokenizer, dataset, tmp_path):
    def run(model, **changes):
        flags = {name: changes.pop(name) for name in ("resume", "overwrite") if name in changes}
        config = settings(tmp_path / "run", **changes)
        return train(model, None, dataset, config, policy=AllLayers(), **flags)

    with pytest.raises(ValueError, match="no complete checkpoint to resume from"):
        run(gpt2, resume=True)
    run(gpt2)
    with pytest.raises(ValueError, match=r"holds a run already.*--resume.*--overwrite"):
        run(gpt2)
    with pytest.raises(ValueError, match="resume and overwrite"):
        run(gpt2, resume=True, overwrite=True)
    with pytest.raises(ValueError, match=r"learning_rate=0.1 \(was 0.003\), max_steps=9 \(was 8\)"):
        run(gpt2, resume=True, learning_rate=0.1, max_steps=9)
    config = settings(tmp_path / "run")
    with pytest.raises(ValueError, match="choice="):
        train(gpt2, None, dataset, config, policy=RandomLayers(), resume=True)
    other = dataset.select(range(3, len(dataset)))
    with pytest.raises(ValueError, match="corpus="):
        train(gpt2, None, other, config, policy=AllLayers(), resume=True)
    (tmp_path / "run/notes.txt").write_text("mine")
    run(make_gpt2(tokenizer), overwrite=True, max_steps=2)
    kept = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert kept == ["checkpoint-2", "final", "notes.txt", "plan.json", "training.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0: above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"max_steps": 0}, "max_steps=0: at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
        ({"save_total_limit": 1}, "save_total_limit=1: keep at least 2"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"on_freeze": "melt"}, "on_freeze='melt': 'keep', 'offload' or 'drop'"),
        ({"state_dtype": "float16"}, "state_dtype='float16'"),
        ({"lr_scheduler": "zigzag"}, "zigzag"),
    ],
)
def test_settings_out_of_range(gpt2, dataset, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(gpt2, None, dataset, settings(tmp_path / "run", **change), policy=AllLayers())
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
