"""gradloc.training.self_replay: documents that a model samples, and the model left as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from conftest import make_gpt2, sentences

from gradloc.training.corpus import document_tokens, pack_documents, packed_corpus
from gradloc.training.self_replay import SelfReplay, generate_replay

PROMPTS = ["The capital of Arvo is", "The capital of Belun is", "The"]


def generate(model, tokenizer, **changes):
    usual = {"num_tokens": 100, "block_size": 16, "batch_size": 4, "seed": 0}
    return generate_replay(model, tokenizer, **{**usual, **changes})


def with_constant_logits(model, **logits):
    """The same distribution at each place: nearly uniform but for the tokens given (t7=3.0)."""
    with torch.no_grad():
        wte = model.transformer.wte.weight
        wte.zero_()
        # No ties, of which top-k would keep all.
        wte[:, 0] = torch.linspace(-1e-3, 1e-3, len(wte))
        for name, value in logits.items():
            wte[int(name[1:]), 0] = value
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
        model.transformer.ln_f.bias[0] = 1.0
    return model


@pytest.fixture
def calls(monkeypatch):
    """What `model.generate` got and gave: pairs of (rows without padding, output rows)."""
    from transformers import GPT2LMHeadModel

    seen = []
    inner = GPT2LMHeadModel.generate

    def recorded(self, ids, **kwargs):
        output = inner(self, ids, **kwargs)
        mask = kwargs["attention_mask"].bool()
        rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        seen.append((rows, output.tolist()))
        return output

    monkeypatch.setattr(GPT2LMHeadModel, "generate", recorded)
    return seen


def test_the_seed_decides_and_nothing_else_changes(gpt2, tokenizer):
    gpt2.train()
    gpt2.transformer.h[0].eval()
    gpt2.transformer.wpe.weight.requires_grad_(False)
    gpt2.generation_config.top_k = 3
    config, content = gpt2.generation_config, gpt2.generation_config.to_dict()
    modes = [module.training for module in gpt2.modules()]
    weights = copy.deepcopy(gpt2.state_dict())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    first = generate(gpt2, tokenizer, prompts=PROMPTS)

    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert gpt2.generation_config is config
    assert config.to_dict() == content
    assert [module.training for module in gpt2.modules()] == modes
    assert [p.requires_grad for p in gpt2.parameters()].count(False) == 1
    assert all(torch.equal(value, weights[name]) for name, value in gpt2.state_dict().items())
    torch.manual_seed(5)
    random.seed(5)
    assert generate(gpt2, tokenizer, prompts=PROMPTS) == first
    assert generate(gpt2.eval(), tokenizer, prompts=PROMPTS) == first, "without dropout"
    assert generate(gpt2, tokenizer, prompts=PROMPTS, seed=1).documents != first.documents


@pytest.mark.parametrize("prompts", [(), PROMPTS])
def test_as_many_tokens_come_as_were_asked_for(gpt2, tokenizer, calls, prompts):
    made = generate(gpt2, tokenizer, num_tokens=150, prompts=prompts)
    assert made.num_tokens == sum(map(len, document_tokens(made.documents, tokenizer)))
    assert made.num_tokens >= 150
    rows = pack_documents(made.documents, tokenizer, block_size=16)
    assert len(rows) == made.num_tokens // 16
    assert all(0 < len(rows) <= 4 for rows, _ in calls)
    # Nothing was generated once there was enough.
    fewer = made.documents[: -len(calls[-1][0])]
    if not prompts:
        assert sum(map(len, document_tokens(fewer, tokenizer))) < 150


def test_prompts_take_their_share_and_take_turns(gpt2, tokenizer):
    def count(made):
        facts = [text for text in made.documents if text.startswith(tuple(PROMPTS))]
        assert made.documents[: len(facts)] == tuple(facts), "facts come first"
        return sum(map(len, document_tokens(facts, tokenizer))), made.num_tokens, facts

    usual = {"prompts": PROMPTS, "num_tokens": 400, "batch_size": 2}
    of_facts, total, facts = count(generate(gpt2, tokenizer, **usual))
    assert 200 <= of_facts <= 200 + 2 * 40  # a byte of a broken character becomes three again
    assert total - of_facts >= 200
    for start in range(0, len(facts) - 2, 3):
        turn = [text.startswith(PROMPTS[0]) for text in facts[start : start + 3]]
        assert turn.count(True) == 1
    of_facts, total, _ = count(generate(gpt2, tokenizer, share_prompts=1.0, **usual))
    assert of_facts == total >= 400
    of_facts, total, _ = count(generate(gpt2, tokenizer, share_prompts=0.0, **usual))
    assert of_facts == 0
    assert total >= 400


def test_short_prompts_go_on_as_if_alone_in_the_batch(gpt2, tokenizer, calls):
    """The padding is seen by nothing: positions and attention are those of the row alone."""
    generate(gpt2, tokenizer, prompts=PROMPTS, share_prompts=1.0, num_tokens=60, temperature=1e-5)
    rows, outputs = calls[0]
    assert len({len(row) for row in rows}) > 1
    eos = tokenizer.eos_token_id
    for row, output in zip(rows, outputs, strict=True):
        ids = list(row)
        for token in output[max(map(len, rows)) :]:
            with torch.no_grad():
                best = gpt2(torch.tensor([ids])).logits[0, -1].argmax().item()
            assert token == best
            ids.append(token)
            if token == eos:
                break
        assert row[0] == eos, "a document begins after the end of another"


def test_documents_end_at_eos_and_empty_ones_are_dropped_but_paid_for(gpt2, tokenizer, calls):
    eos = tokenizer.eos_token_id
    # One token in three is the end: many documents end at once.
    model = with_constant_logits(gpt2, **{f"t{eos}": float(np.log(len(tokenizer) / 2))})
    made = generate(model, tokenizer, num_tokens=200, prompts=["The"])
    generated = read = num_rows = num_empty = 0
    for rows, outputs in calls:
        length = max(map(len, rows))
        read += sum(map(len, rows))
        for output in outputs:
            ids = output[length:]
            end = ids.index(eos) + 1 if eos in ids else len(ids)
            generated += end
            num_rows += 1
            num_empty += not tokenizer.decode(ids[: end - (eos in ids)]).strip()
    assert made.num_generated_tokens == generated
    assert made.num_prompt_tokens == read
    assert num_empty > 5
    assert len(made.documents) == num_rows - num_empty
    assert all(text.strip() and "<eos>" not in text for text in made.documents)
    assert "The" not in made.documents


def test_an_end_of_the_models_own_ends_a_document_too(gpt2, tokenizer):
    end = tokenizer("Q")["input_ids"][0]
    model = with_constant_logits(gpt2, **{f"t{end}": 4.0})
    model.generation_config.eos_token_id = [end]
    made = generate(model, tokenizer)
    assert all("Q" not in text[:-1] for text in made.documents)


def test_a_model_that_says_nothing_is_an_error(gpt2, tokenizer):
    model = with_constant_logits(gpt2, **{f"t{tokenizer.eos_token_id}": 1e4}).train()
    config = model.generation_config
    with pytest.raises(ValueError, match=r"empty documents only \(64 tokens without any text"):
        generate(model, tokenizer)
    assert model.training
    assert model.generation_config is config


def test_nothing_but_the_temperature_changes_the_distribution(gpt2, tokenizer, calls):
    """Neither transformers' top-k of 50 nor what the model's generation config says."""
    model = with_constant_logits(gpt2, t9=6.0)
    model.generation_config.update(
        do_sample=True, top_k=2, top_p=0.1, repetition_penalty=9.0, max_length=3
    )

    def sampled(**changes):
        calls.clear()
        generate(model, tokenizer, num_tokens=3000, block_size=64, batch_size=16, **changes)
        return [t for rows, outputs in calls for out in outputs for t in out[len(rows[0]) :]]

    tokens = sampled()
    share = np.exp(6.0) / (np.exp(6.0) + len(tokenizer) - 1)  # 0.55
    assert abs(tokens.count(9) / len(tokens) - share) < 0.06
    assert len(set(tokens)) > 200
    hot = sampled(temperature=100.0)
    assert hot.count(9) / len(hot) < 0.03
    cold = sampled(temperature=0.1)
    assert set(cold) == {9}


def test_the_models_positions_are_not_overrun(gpt2, tokenizer, calls):
    generate(gpt2, tokenizer, prompts=PROMPTS, num_tokens=200, block_size=64)
    assert max(len(output) for _, outputs in calls for output in outputs) == 64
    with pytest.raises(ValueError, match="block_size=65: the model has 64 positions"):
        generate(gpt2, tokenizer, block_size=65)


@pytest.mark.parametrize(
    ("template", "start"), [("<bos> $A", ["<bos>"]), ("$A <eos>", ["<eos>"]), ("$A", ["<eos>"])]
)
def test_a_document_begins_as_the_tokenizer_begins_one(tokenizer, calls, template, start):
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.add_special_tokens(["<bos>"])
    special = [(name, core.token_to_id(name)) for name in ("<bos>", "<eos>")]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    other = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token="<bos>")
    generate(make_gpt2(other), other, prompts=["The capital"], num_tokens=40, batch_size=1)
    begun = {tuple(other.convert_ids_to_tokens(row)) for rows, _ in calls for row in rows}
    prompt = other.tokenize("The capital")
    assert begun == {tuple(start), (*start, *prompt)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"block_size": 1}, "block_size=1"),
        ({"share_prompts": 1.5}, r"share_prompts=1\.5"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"prompts": ["The", " "]}, "prompt ' ' takes"),
        ({"prompts": ["The", "a b c d e f g h i"]}, r"leave room in a block of block_size=16"),
    ],
)
def test_what_cannot_be_generated(gpt2, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(gpt2, tokenizer, **changes)


def test_what_cannot_generate(gpt2, tokenizer):
    with pytest.raises(ValueError, match="model=Linear cannot generate"):
        generate(torch.nn.Linear(2, 2), tokenizer)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        generate(gpt2, endless)


def test_settings():
    assert SelfReplay(0.5) == SelfReplay(0.5, temperature=1.0, share_facts=0.5)
    for changes, message in [
        ({"ratio": -1}, "ratio=-1"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"share_facts": 2}, "share_facts=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            SelfReplay(**{"ratio": 1.0, **changes})


def test_documents_in_memory_pack_as_those_of_a_file(tokenizer, text_file):
    lines = sentences(120, seed=1)
    packed = pack_documents([*lines[:60], " \n", *lines[60:]], tokenizer, block_size=16)
    of_file = packed_corpus(text_file, tokenizer, block_size=16)
    assert packed.features == of_file.features
    assert packed.to_dict() == of_file.to_dict()
    with pytest.raises(ValueError, match="the text of the documents makes 3 tokens"):
        pack_documents(["ab"], tokenizer, block_size=16)
    with pytest.raises(ValueError, match="block_size=1"):
        pack_documents(lines, tokenizer, block_size=1)
    with pytest.raises(TypeError, match="one text"):
        pack_documents(lines[0], tokenizer, block_size=16)
