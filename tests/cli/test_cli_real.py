"""The real probe files and WikiText through the command line, with a small untrained model."""

import json
import os
from pathlib import Path

import pytest
import torch

from gradloc import GradientProfile
from gradloc.cli import main

DATA = Path(os.environ.get("GRADLOC_DATA", Path(__file__).parents[3] / "shared" / "data"))

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not DATA.is_dir(), reason=f"no real data at {DATA} (GRADLOC_DATA names another place)"
    ),
]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (DATA / "wikitext2/valid.txt").read_text(encoding="utf-8").splitlines()[:1500]
    core.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    folder = tmp_path_factory.mktemp("small")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(vocab_size=1500, n_positions=256, n_embd=32, n_layer=3, n_head=2, **ids)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_trace_and_evaluate_the_papers_data(small_model, tmp_path, capsys):
    probes = [
        str(DATA / "templama/dynamic_templama_p54.jsonl"),
        f"entities={DATA / 'ecbd/ecbd_2020_2021_np.jsonl'}",
        f"popular={DATA / 'ecbd/ecbd_popular.jsonl'}",
    ]
    shared = ["--model", small_model, "--probes", *probes, "--dates", "2019-Q2:2022-Q2"]
    shared += ["--max-probes", "12", "--batch-size", "4", "--device", "cpu"]
    text = str(DATA / "wikitext2/valid.txt")
    output = tmp_path / "profile.json"
    trace = ["trace", *shared, "--reference", text, "--reference-batches", "3"]
    assert main([*trace, "--output", str(output)]) == 0
    kinds = ("updated", "unchanged", "new", "entities", "popular")
    profile = GradientProfile.load(output)
    assert set(profile.kinds) == set(kinds)
    assert len(profile.names) == 9
    assert all(ratio > 0 for ratio in profile.relative.values())
    scores = tmp_path / "scores.json"
    evaluate = ["evaluate", *shared, "--text", text, "--max-text-batches", "2"]
    assert main([*evaluate, "--output", str(scores)]) == 0
    found = json.loads(scores.read_text())
    # An untrained model is near chance everywhere: ln 1500 = 7.3 nats.
    for kind in kinds:
        assert found["probes"][kind]["num_probes"] == 12
        assert found["probes"][kind]["nll"] == pytest.approx(7.3, abs=0.4)
    assert found["text"]["nll"] == pytest.approx(7.3, abs=0.2)
    assert found["text"]["num_tokens"] == 2 * 4 * 255
    assert "popular" in capsys.readouterr().out
