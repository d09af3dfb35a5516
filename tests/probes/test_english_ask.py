"""`ask`: which facts a model knows, told by oracles that stumble where a test wants them to."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from gradloc.evaluate import evaluate_probes
from gradloc.probes import EnglishWorld, Probe, ask, real_facts
from gradloc.probes.english_words import ENGLISH_RELATIONS

FACTS = real_facts()
NONE = dict.fromkeys(("num_updated", "num_new", "num_keep", "num_validation", "num_unchanged"), 0)


class Oracle(torch.nn.Module):
    """Predicts the very next token of every text, but not where it reads one of `stumbles`."""

    def __init__(self, tokenizer: Any, *stumbles: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = tokenizer
        self.stumbles = stumbles

    def forward(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        assert not self.training
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for row, ids in zip(logits, input_ids, strict=True):
            if not any(text in self.tokenizer.decode(ids) for text in self.stumbles):
                row[:-1].scatter_(1, ids[1:, None], 9.0)
        return (logits,)


@pytest.fixture
def asked() -> list[Probe]:
    countries = ("Peru", "Chad", "Japan", "the Netherlands", "Colombia")
    facts = {key: thing for key, thing in FACTS.items() if key[0] in countries}
    return EnglishWorld(0, **NONE, facts=facts).old_probes()


def test_ask(tokenizer: Any, asked: list[Probe]) -> None:
    everything = {key for key in FACTS if any("/".join(key) in p.source for p in asked)}
    assert len(everything) == len(asked) / 2
    model = Oracle(tokenizer).train()
    assert ask(model, tokenizer, asked, batch_size=3) == everything
    assert model.training

    # Bogotá: greedy decoding may write it without its accent, which counts.
    bogota = Oracle(tokenizer, "Bogotá")
    assert ask(bogota, tokenizer, asked) == everything

    peru = Oracle(tokenizer, "Peru")
    assert ask(peru, tokenizer, asked) == {key for key in everything if key[0] != "Peru"}
    assert ask(peru, tokenizer, asked[::-1], batch_size=100, templates="any") == {
        key for key in everything if key[0] != "Peru"
    }


def test_a_fact_is_known_by_all_or_any_of_its_templates(tokenizer: Any, asked: list[Probe]) -> None:
    capital = next(relation for relation in ENGLISH_RELATIONS if relation.name == "capital")
    stumble = capital.probing[0].split("{entity}")[1].split("{object}")[0]
    model = Oracle(tokenizer, stumble)
    all_known = ask(model, tokenizer, asked)
    any_known = ask(model, tokenizer, asked, templates="any")
    assert any_known == ask(Oracle(tokenizer), tokenizer, asked)
    assert all_known == {key for key in any_known if key[1] != "capital"}
    # The same exact match as that of evaluate.
    score = evaluate_probes(model, tokenizer, asked)["old"]
    assert score.exact_match == pytest.approx(
        (len(all_known) + len(any_known)) / (2 * len(any_known))
    )


def test_ask_a_real_architecture(tokenizer: Any, gpt2: Any, asked: list[Probe]) -> None:
    """Untrained, it knows nothing; the longest texts are cut to its positions."""
    assert ask(gpt2, tokenizer, asked, max_length=64) == set()


def test_wrong_questions(tokenizer: Any, asked: list[Probe]) -> None:
    model = Oracle(tokenizer)
    with pytest.raises(ValueError, match="templates='most': choose 'all' or 'any'"):
        ask(model, tokenizer, asked, templates="most")
    with pytest.raises(ValueError, match="probes is empty"):
        ask(model, tokenizer, [])
    for source in ("file:3", "world:0:A B/home", "english:0:Peru"):
        other = Probe("A is B.", ((5, 6),), "old", source)
        with pytest.raises(ValueError, match=f"source='{source}' names no fact"):
            ask(model, tokenizer, [*asked, other])


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # gguf and numpy warn about one another
def test_a_pretrained_model_knows_enough_untaught() -> None:
    """Takes two minutes on one thread."""
    path = os.environ.get("GRADLOC_GGUF")
    if not path:
        pytest.skip("set GRADLOC_GGUF to the path of a .gguf language model")
    from gradloc.models import load_model

    model, tokenizer = load_model(path)
    known = ask(model, tokenizer, EnglishWorld(0, **NONE).old_probes())
    world = EnglishWorld(0, known=known)
    for kind in ("keep", "validation", "unchanged"):
        score = evaluate_probes(model, tokenizer, world.probes()[kind], batch_size=32)[kind]
        assert score.exact_match == 1
