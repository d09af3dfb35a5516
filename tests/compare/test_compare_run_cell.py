"""Cells from base to record: what is charged, what acts, and what must equal vanilla to the bit."""

import json
from pathlib import Path

import pytest
import yaml

from gradloc.compare.config_file import config_from
from gradloc.compare.grid import cells
from gradloc.compare.run_cell import run_cell
from gradloc.compare.study import base_folder, open_study, prepare
from gradloc.probes import probe_batches

CONFIG = """
world: {kind: toy, num_entities: 8, num_new_entities: 4, num_objects: 4, old_tokens: 12000,
        new_tokens: 1500, keep_tokens: 3000, text_documents: 12, width: 32, num_blocks: 2,
        num_heads: 2, base_steps: 12, check_every: 6, required: 0.0}
budget_tokens: 6000
seeds: [0]
learning_rates: [3.0e-3]
alphas: [1, 0.5, 0]
training: {block_size: 32, batch_size: 8}
trace: {num_probes: 8, batch_size: 4}
methods:
  vanilla: {}
  replay-0: {replay: {ratio: 0}}
  mix-review-0: {mix_review: {ratio: 0}}
  recadam-0: {recadam: {gamma: 0}}
  slow-0: {slow_weights: {every: 2, strength: 0}}
  replay: {replay: {ratio: 1}}
  mix-review: {mix_review: {ratio: 1, decay: 0.5}}
  self-replay: {self_replay: {ratio: 0.5}}
  recadam: {recadam: {gamma: 300, k: 0.5, t0: 10}}
  slow: {slow_weights: {every: 2, strength: 0.5}}
  lora: {lora: {rank: 2}}
  tgl-fp: {localize: freeze}
  tgl-fp-all: {localize: {policy: freeze, reference_loss: all}}
  tgl-alr: {localize: scale}
  random: {localize: random, draws: 2}
  complement: {localize: complement}
  bottom: {localize: bottom-k}
"""
ASIDE = {"on_step": lambda done, total: None, "note": lambda text: None, "places": {}}


@pytest.fixture(scope="module")
def config():
    return config_from(yaml.safe_load(CONFIG))


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    prepare(config, 0, folder, **ASIDE)
    return folder


@pytest.fixture(scope="module")
def record(config, folder):
    """Give the record of a method, made once."""
    made = {}

    def record(name, draw=0):
        if (name, draw) not in made:
            cell = next(c for c in cells(config, [name]) if c.draw == draw)
            made[name, draw] = run_cell(cell, config, folder, **ASIDE)
        return made[name, draw]

    return record


def results(record):
    """All that training decides."""
    return {name: record[name] for name in ("scores", "validation", "losses", "tokens")}


@pytest.mark.parametrize("name", ["replay-0", "mix-review-0", "recadam-0", "slow-0"])
def test_turned_off_is_vanilla_to_the_bit(record, name):
    assert results(record(name)) == results(record("vanilla"))


@pytest.mark.parametrize(
    "name", ["replay", "mix-review", "self-replay", "recadam", "slow", "lora", "tgl-fp", "tgl-alr"]
)
def test_turned_on_it_acts(record, name):
    assert record(name)["scores"]["1"] != record("vanilla")["scores"]["1"]


def test_the_old_weights_are_at_the_end_of_interpolation(config, folder, record):
    base = prepare(config, 0, folder, **ASIDE)
    for name in ("vanilla", "lora", "tgl-fp"):
        scores = record(name)["scores"]
        assert list(scores) == ["1", "0.5", "0"]
        assert scores["0"] == base["scores"]["1"]
        assert scores["1"] != scores["0"]


def test_the_weight_is_that_which_validation_likes(record):
    for name in ("vanilla", "replay"):
        one = record(name)
        total = {a: v["learn"] + v["forget"] for a, v in one["validation"].items()}
        assert f"{one['alpha']:g}" == min(total, key=total.__getitem__)


def probe_tokens(config, folder):
    """Tokens of the probes that are traced, padding included."""
    study = open_study(config, 0, folder)
    total = 0
    for kind in ("updated", "new"):
        probes = [probe for probe in study.material.trace if probe.kind == kind][:8]
        assert len(probes) == 8
        batches = probe_batches(probes, study.tokenizer, batch_size=4, max_length=32)
        total += sum(batch["input_ids"].numel() for batch in batches)
    return total


def test_every_pass_is_charged(record, config, folder):
    block = config.training.block_size
    step = block * config.training.batch_size
    for name in ("vanilla", "replay", "self-replay", "tgl-fp", "random"):
        tokens = record(name)["tokens"]
        parts = [tokens[part] for part in ("new", "keep", "trace", "generate")]
        assert tokens["total"] == sum(parts)
        # No more than the budget, and no whole step less.
        assert 0 <= config.budget_tokens - tokens["total"] < step
        assert tokens["new"] + tokens["keep"] == record(name)["num_steps"] * step
    assert record("vanilla")["tokens"]["keep"] == 0
    assert record("replay")["tokens"]["keep"] == record("replay")["tokens"]["new"]
    assert record("self-replay")["tokens"]["generate"] > 0
    assert record("self-replay")["tokens"]["keep"] > 0
    assert record("vanilla")["tokens"]["trace"] == 0
    # 8 blocks of reference are read once for each of two kinds' matched spans.
    probes = probe_tokens(config, folder)
    assert record("tgl-fp")["tokens"]["trace"] == probes + 2 * 8 * block
    assert record("tgl-fp-all")["tokens"]["trace"] == probes + 8 * block
    assert record("tgl-fp")["num_steps"] <= record("vanilla")["num_steps"]


def test_plans_are_what_their_names_say(record, config, folder):
    ratio = open_study(config, 0, folder).profile.with_reference("matched-spans").relative
    mean = sum(ratio.values()) / len(ratio)
    active = {
        name: {layer for layer, scale in record(name)["plan"].items() if scale}
        for name in ("vanilla", "tgl-fp", "complement", "bottom", "random")
    }
    assert active["vanilla"] == set(ratio)
    assert active["tgl-fp"] == {name for name, value in ratio.items() if value > mean}
    assert active["complement"] == active["vanilla"] - active["tgl-fp"]
    count = len(active["tgl-fp"])
    assert active["bottom"] == set(sorted(ratio, key=ratio.__getitem__)[:count])
    assert len(active["random"]) == count
    scales = record("tgl-alr")["plan"]
    assert scales == pytest.approx({name: value / mean for name, value in ratio.items()})
    assert record("tgl-fp")["share_of_parameters"] < 1
    again = record("random", draw=1)["plan"]
    assert sum(map(bool, again.values())) == count


def test_memory_is_told(record):
    vanilla, slow, lora = (record(name)["memory"] for name in ("vanilla", "slow", "lora"))
    assert record("tgl-fp")["memory"]["optimizer_bytes"] < vanilla["optimizer_bytes"]
    # Two moments a parameter; with anchors a third stream; with slow weights a copy.
    recadam = record("recadam")["memory"]
    assert recadam["optimizer_bytes"] == pytest.approx(1.5 * vanilla["optimizer_bytes"], rel=0.01)
    assert slow["extra_bytes"] == vanilla["gradient_bytes"]
    assert lora["gradient_bytes"] < vanilla["gradient_bytes"] / 4


def test_the_share_of_weights_is_that_which_trains(record):
    assert record("vanilla")["share_of_parameters"] == 1
    assert record("lora")["share_of_parameters"] < 0.2
    for name in ("tgl-fp", "complement"):
        assert 0 < record(name)["share_of_parameters"] < 1
    both = [record(name)["share_of_parameters"] for name in ("tgl-fp", "complement")]
    assert sum(both) == pytest.approx(1)


def test_mix_review_mixes_in_less_by_the_epoch(record):
    epochs = record("mix-review")["epochs"]
    assert len(epochs) > 2
    # The last one is cut short by the budget.
    assert epochs[1][1] == round(epochs[0][1] / 2)
    assert sum(new for new, _ in epochs) * 32 == record("mix-review")["tokens"]["new"]


def test_a_decay_that_never_acts_is_refused(config, folder):
    body = yaml.safe_load(CONFIG)
    body["methods"] = {"mix-review": {"mix_review": {"ratio": 20, "decay": 0.5}}}
    lavish = config_from(body)
    with pytest.raises(ValueError, match="decay would never act"):
        run_cell(cells(lavish)[0], lavish, folder, **ASIDE)


def test_a_record_is_plain_json(record):
    one = record("vanilla")
    assert json.loads(json.dumps(one, allow_nan=False)) == json.loads(json.dumps(one))
    assert one["losses"][-1][0] <= one["num_steps"]
    assert one["losses"][-1][1] < one["losses"][0][1]


def test_nothing_is_left_behind(config, folder, record):
    record("vanilla")
    assert not list((folder / "work").glob("*"))


def test_a_budget_that_buys_no_step_is_refused(config, folder):
    body = yaml.safe_load(CONFIG)
    body["budget_tokens"] = 256
    body["methods"] = {"tgl-fp": {"localize": "freeze"}}
    small = config_from(body)
    with pytest.raises(ValueError, match="raise the budget"):
        run_cell(cells(small)[0], small, folder, **ASIDE)


def test_the_base_is_made_once(config, folder):
    file = base_folder(Path(folder), 0) / "base.json"
    before = file.stat().st_mtime_ns
    assert prepare(config, 0, folder, **ASIDE)["seed"] == 0
    assert file.stat().st_mtime_ns == before
