"""How a run remembers its policy, so that another process may go on with the same one."""

import dataclasses
import functools

import pytest
from conftest import make_gpt2
from transformers import TrainerCallback

from gradloc import AllLayers, LayerPlan, RandomLayers, Retrace, TracedGradientPolicy
from gradloc.training.config import TrainConfig
from gradloc.training.corpus import packed_corpus
from gradloc.training.policy_name import policy_name
from gradloc.training.train import train


class StopAt(TrainerCallback):
    """A kill after the checkpoint of step 3."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def make_policy(share):
    """A function with another address each time, as in each process."""

    def drawn(source, step=0):
        return LayerPlan({name: share * name.endswith("mlp") for name in source.names})

    drawn.needs_profile = False
    return drawn


@dataclasses.dataclass(frozen=True)
class Both:
    """A user's policy made of others."""

    parts: tuple
    weight: float = 0.5
    chosen: object = None


def test_a_function_in_a_policy_resumes(tokenizer, text_file, tmp_path):
    """Its repr has an address, which another process does not have: resuming was refused."""
    dataset = packed_corpus(text_file, tokenizer, block_size=16)
    config = TrainConfig(
        output=tmp_path / "run", max_steps=8, batch_size=2, save_steps=3, progress=False
    )
    first = make_policy(0.5)
    with pytest.raises(KeyboardInterrupt):
        train(
            *(make_gpt2(tokenizer), None, dataset, config),
            policy=Retrace(first, every=5),
            callbacks=[StopAt()],
        )
    again = Retrace(make_policy(0.5), every=5)
    assert again.policy is not first
    result = train(make_gpt2(tokenizer), None, dataset, config, policy=again, resume=True)
    assert result.num_steps == 8
    other = Retrace(make_policy(0.5), every=6)
    with pytest.raises(ValueError, match="every=6"):
        train(make_gpt2(tokenizer), None, dataset, config, policy=other, resume=True)


def test_names_of_policies():
    drawn = f"{__name__}.make_policy.<locals>.drawn"
    cases = {
        "RandomLayers(count=None, share=0.5, seed=3)": RandomLayers(share=0.5, seed=3),
        f"Retrace(policy={drawn}, every=10)": Retrace(make_policy(1), every=10),
        f"partial({drawn}, 2, step=3)": functools.partial(make_policy(1), 2, step=3),
        f"Both(parts=[{drawn}, AllLayers()], weight=0.5, chosen={__name__}.StopAt)": Both(
            (make_policy(1), AllLayers()), chosen=StopAt()
        ),
        f"{__name__}.Both": Both,
    }
    for expected, policy in cases.items():
        assert policy_name(policy) == expected
    traced = TracedGradientPolicy(threshold=("top_k", 2), kinds=("new",))
    assert policy_name(traced) == repr(traced)
