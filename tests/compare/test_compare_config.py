import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from gradloc.compare.config import CompareConfig, TraceConfig, TrainingConfig, WorldConfig
from gradloc.compare.config_file import config_from, load_config, read_config, save_config
from gradloc.compare.grid import base_key, cells
from gradloc.compare.method_config import Localize, MethodConfig
from gradloc.recadam import RecAdam
from gradloc.training.lora import Lora
from gradloc.training.mixing import MixReview, Replay
from gradloc.training.self_replay import SelfReplay
from gradloc.training.slow_weights import SlowWeights

EVERYTHING = """
world: {kind: toy, num_entities: 50}
budget_tokens: 102_400
seeds: [0, 1, 2]
learning_rates: [1e-3, 3.0e-3]        # without a point YAML takes the first for text
alphas: [1, 0.7, 0.5]
training: {block_size: 32, batch_size: 8, betas: [0.9, 0.98], max_grad_norm: null}
trace: {num_probes: 16, batch_size: 4, reference_loss: all}
threads: 2
methods:
  vanilla:
  tgl-fp: {title: TGL+FP, localize: freeze}
  scale: {localize: {policy: scale, normaliser: max, reference_loss: matched-spans}}
  quantile: {localize: {policy: freeze, threshold: "quantile:0.5"}}
  random: {localize: {policy: random, like: freeze}, draws: 3}
  share: {localize: {policy: random, share: 0.25}}
  complement: {localize: complement}
  top: {localize: {policy: top-k, k: 8}}
  bottom: {localize: bottom-k}
  mer: {replay: {ratio: 1}, slow_weights: {every: 10, strength: 0.5}}
  review: {mix_review: {ratio: 4, decay: 0.5}}
  own: {self_replay: {ratio: 0.5}}
  recadam: {recadam: {gamma: 500, k: 0.1, t0: 40, anneal: linear}, learning_rates: [1.0e-3]}
  lora: {lora: {rank: 4}, learning_rates: [1.0e-2], seeds: [0]}
  defaults: {lora: , slow_weights: }
"""
SMALL = """
world: {kind: toy}
budget_tokens: 2048
seeds: [0]
learning_rates: [0.001]
methods: {vanilla: }
"""


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def everything(config_file):
    return read_config(config_file(EVERYTHING))


def test_everything_is_read(everything):
    assert everything.world == WorldConfig("toy", {"num_entities": 50})
    assert everything.budget_tokens == 102_400
    assert everything.seeds == (0, 1, 2)
    assert everything.learning_rates == (1e-3, 3e-3)
    assert everything.alphas == (1.0, 0.7, 0.5)
    assert everything.training == TrainingConfig(
        block_size=32, batch_size=8, betas=(0.9, 0.98), max_grad_norm=None
    )
    assert everything.trace == TraceConfig(num_probes=16, batch_size=4, reference_loss="all")
    assert everything.threads == 2
    expected = {
        "vanilla": {},
        "tgl-fp": {"title": "TGL+FP", "localize": Localize(policy="freeze")},
        "scale": {
            "localize": Localize(policy="scale", normaliser="max", reference_loss="matched-spans")
        },
        "quantile": {"localize": Localize(policy="freeze", threshold=("quantile", 0.5))},
        "random": {"localize": Localize(policy="random", like="freeze"), "draws": 3},
        "share": {"localize": Localize(policy="random", share=0.25)},
        "complement": {"localize": Localize(policy="complement")},
        "top": {"localize": Localize(policy="top-k", k=8)},
        "bottom": {"localize": Localize(policy="bottom-k", like="freeze")},
        "mer": {"mix": Replay(1.0), "slow_weights": SlowWeights(every=10, strength=0.5)},
        "review": {"mix": MixReview(4.0, decay=0.5)},
        "own": {"mix": SelfReplay(0.5)},
        "recadam": {
            "recadam": RecAdam(gamma=500.0, k=0.1, t0=40.0, anneal="linear"),
            "learning_rates": (1e-3,),
        },
        "lora": {"lora": Lora(rank=4), "learning_rates": (1e-2,), "seeds": (0,)},
        "defaults": {"lora": Lora(), "slow_weights": SlowWeights()},
    }
    shared = {"learning_rates": (1e-3, 3e-3), "seeds": (0, 1, 2)}
    assert everything.methods == tuple(
        MethodConfig(**{"name": name, "title": name, **shared, **own})
        for name, own in expected.items()
    )
    assert everything.method("mer").mix == Replay(1.0)


def test_what_is_left_out_has_its_default(config_file):
    config = read_config(config_file(SMALL))
    assert config.alphas == (1.0,)
    assert config.training == TrainingConfig()
    assert config.trace == TraceConfig()
    assert config.threads == 1


def test_it_goes_through_json_pickle_and_a_folder(everything, tmp_path):
    body = json.loads(json.dumps(everything.to_json(), allow_nan=False))
    assert config_from(body) == everything
    assert config_from(body).digest() == everything.digest()
    assert pickle.loads(pickle.dumps(everything)) == everything
    save_config(everything, tmp_path)
    assert load_config(tmp_path) == everything
    other = replace(everything, threads=1)
    assert other.digest() != everything.digest()
    assert other.fixed() == everything.fixed()
    with pytest.raises(KeyError):
        everything.method("vanila")


def test_the_example_of_the_docs_is_read(config_file):
    docs = Path(__file__).parents[2] / "docs" / "compare.md"
    example = docs.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    config = read_config(config_file(example))
    # It says that what it shows are the defaults.
    assert (config.training, config.trace, config.threads) == (TrainingConfig(), TraceConfig(), 1)
    assert config.method("random").draws == 3


# What is written in place of the small file's line, and what the error says of it.
MISTAKES = {
    "unknown key": ("seeds: [0]", "seed: [0]", "unknown key 'seed': did you mean 'seeds'"),
    "no such key": ("seeds: [0]", "seeds: [0]\nxyz: 1", r"unknown key 'xyz': \(known: alphas, bud"),
    "missing": ("seeds: [0]", "", "seeds must be given"),
    "twice": ("seeds: [0]", "seeds: [0]\nseeds: [1]", "line 5: key 'seeds' stands twice"),
    "no yaml": ("seeds: [0]", "seeds: [0", "not YAML"),
    "a list": ("seeds: [0]", "seeds: 3", "seeds=3: must be a list"),
    "a fraction": ("seeds: [0]", "seeds: [0.5]", "seeds=0.5: must be a whole number"),
    "a truth": ("seeds: [0]", "seeds: [true]", "seeds=True: must be a whole number"),
    "negative seed": ("seeds: [0]", "seeds: [-1]", "-1 must be at least 0"),
    "no seed": ("seeds: [0]", "seeds: []", r"seeds=\[\]: give at least one"),
    "seed twice": ("seeds: [0]", "seeds: [0, 0]", "seeds: 0 stands there twice"),
    "rate twice": ("[0.001]", "[0.001, 1e-3]", "0.001 stands there twice"),
    "rate of 0": ("[0.001]", "[0.0]", "0.0 must be a number above 0"),
    "rate nan": ("[0.001]", "[.nan]", "nan must be a number above 0"),
    "text": ("[0.001]", "[fast]", "learning_rates='fast': must be a number"),
    "budget": ("2048", "1000", r"budget_tokens=1000: one step takes 1024 tokens"),
    "no world": ("kind: toy", "kind: real", "world: kind='real': choose from 'toy', 'english'"),
    "no kind": ("{kind: toy}", "{}", "world: kind must be given"),
    "world option": ("kind: toy", "kind: toy, num_entity: 3", "world: .*num_entit"),
    "alphas": ("seeds: [0]", "seeds: [0]\nalphas: [0.5]", "add 1"),
    "alpha": ("seeds: [0]", "seeds: [0]\nalphas: [1, 1.5]", r"1.5 must be in \[0, 1\]"),
    "alphas twice": ("seeds: [0]", "seeds: [0]\nalphas: [1, 0.5, 0.50000001]", "two agree"),
    "threads": ("seeds: [0]", "seeds: [0]\nthreads: 0", "threads=0: at least 1"),
    "training key": ("seeds: [0]", "seeds: [0]\ntraining: {batch: 1}", "training: unknown key 'b"),
    "one beta": ("seeds: [0]", "seeds: [0]\ntraining: {betas: [0.9]}", r"training: betas=\[0.9\]"),
    "beta": ("seeds: [0]", "seeds: [0]\ntraining: {betas: [0.9, 1]}", r"two numbers in \[0, 1\)"),
    "warmup": ("seeds: [0]", "seeds: [0]\ntraining: {warmup_share: 1}", "warmup_share=1.0"),
    "batch": ("seeds: [0]", "seeds: [0]\ntraining: {batch_size: 0}", "batch_size=0: at least 1"),
    "clip": ("seeds: [0]", "seeds: [0]\ntraining: {max_grad_norm: 0}", "max_grad_norm=0.0"),
    "trace": ("seeds: [0]", "seeds: [0]\ntrace: {num_probes: 0}", "trace: num_probes=0"),
    "trace loss": ("seeds: [0]", "seeds: [0]\ntrace: {reference_loss: no}", "must be text"),
    "no methods": ("{vanilla: }", "{}", "give at least one"),
    "methods list": ("{vanilla: }", "[vanilla]", "methods: .* stands where keys with values"),
}
# The same for what a method may be.
METHOD_MISTAKES = {
    "unknown key": ("{replays: {ratio: 1}}", "methods: m: unknown key 'replays': did you mean 're"),
    "part's key": ("{replay: {ration: 1}}", "m: replay: unknown key 'ration': did you mean 'rat"),
    "part's value": ("{replay: {ratio: -1}}", "m: replay: ratio=-1"),
    "part's type": ("{slow_weights: {every: often}}", "slow_weights: every='often': must be a who"),
    "part missing": ("{replay: {}}", "replay: ratio must be given"),
    "part a text": ("{lora: eight}", "lora: 'eight' stands where keys with values"),
    "two mixes": ("{replay: {ratio: 1}, self_replay: {ratio: 1}}", "replay and self_replay: each"),
    "lora+recadam": ("{lora: , recadam: {gamma: 1}}", "lora and recadam: with adapters"),
    "pull": ("{recadam: {gamma: 2001}}", "gamma=2001 with learning rate 0.001: .* at most 2000"),
    "draws": ("{draws: 2}", "draws=2 with localize policy='none': only random layers are drawn"),
    "no draw": ("{draws: 0}", "draws=0: at least 1"),
    "title": ("{title: ' '}", "title=' ': give some text"),
    "policy": ("{localize: freezing}", "localize: policy='freezing': choose from 'none', 'freeze'"),
    "key of localize": ("{localize: {policy: freeze, treshold: 1}}", "did you mean 'threshold'"),
    "threshold": ("{localize: {policy: freeze, threshold: high}}", "threshold='high': give mean"),
    "unread": ("{localize: {policy: scale, k: 3}}", "k=3: policy='scale' does not read it, so le"),
    "unread none": (
        "{localize: {reference_loss: all}}",
        "reference_loss='all': policy='none' does",
    ),
    "unread count": (
        "{localize: {policy: random, k: 3, threshold: 1.5}}",
        "threshold=1.5: policy='random' does not read it with k, so leave it out",
    ),
    "two counts": ("{localize: {policy: random, k: 3, like: freeze}}", "k and like: each says how"),
    "like": ("{localize: {policy: random, like: scale}}", "like='scale': choose from 'freeze'"),
    "k": ("{localize: {policy: top-k, k: 0}}", "k=0: at least 1 layer"),
    "share": ("{localize: {policy: random, share: 1.5}}", r"share=1.5: give a share in \(0, 1\]"),
    "seeds": ("{seeds: []}", r"methods: m: seeds=\[\]"),
}


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_its_place(config_file, old, new, message):
    assert SMALL.count(old) == 1
    path = config_file(SMALL.replace(old, new))
    with pytest.raises(ValueError, match=message) as raised:
        read_config(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize(("body", "message"), METHOD_MISTAKES.values(), ids=METHOD_MISTAKES)
def test_a_mistake_in_a_method_is_named_with_its_place(config_file, body, message):
    with pytest.raises(ValueError, match=message):
        read_config(config_file(SMALL.replace("{vanilla: }", f"\n  m: {body}")))


def test_other_mistakes(config_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="name='a b': use letters"):
        read_config(config_file(SMALL.replace("vanilla", "a b")))
    config = read_config(config_file(SMALL))
    with pytest.raises(ValueError, match="not distinct"):
        replace(config, methods=config.methods * 2)
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "none")


def test_a_pull_of_two_is_allowed(config_file):
    text = SMALL.replace("{vanilla: }", "\n  m: {recadam: {gamma: 2000}}")
    assert read_config(config_file(text)).methods[0].recadam.gamma == 2000


def test_cells_come_by_seed_then_draw_then_rate_then_method():
    methods = tuple(
        MethodConfig(name=name, title=name, learning_rates=(3e-3, 1e-3), seeds=(1, 0), **own)
        for name, own in {
            "b": {},
            "a": {"localize": Localize(policy="random"), "draws": 2},
        }.items()
    )
    late = MethodConfig(name="late", title="late", learning_rates=(1e-4,), seeds=(7, 1))
    config = CompareConfig(
        world=WorldConfig("toy"),
        budget_tokens=1024,
        seeds=(1, 0),
        learning_rates=(3e-3, 1e-3),
        methods=(*methods, late),
    )
    assert [cell.name for cell in cells(config)] == [
        "b lr=0.003 seed=1 draw=0",
        "a lr=0.003 seed=1 draw=0",
        "b lr=0.001 seed=1 draw=0",
        "a lr=0.001 seed=1 draw=0",
        "late lr=0.0001 seed=1 draw=0",
        "a lr=0.003 seed=1 draw=1",
        "a lr=0.001 seed=1 draw=1",
        "b lr=0.003 seed=0 draw=0",
        "a lr=0.003 seed=0 draw=0",
        "b lr=0.001 seed=0 draw=0",
        "a lr=0.001 seed=0 draw=0",
        "a lr=0.003 seed=0 draw=1",
        "a lr=0.001 seed=0 draw=1",
        "late lr=0.0001 seed=7 draw=0",
    ]
    assert [cell.name for cell in cells(config, ["late"])] == [
        "late lr=0.0001 seed=1 draw=0",
        "late lr=0.0001 seed=7 draw=0",
    ]


def test_keys_change_with_what_decides_a_result_and_with_nothing_else(everything):
    def keys(config):
        return {cell.name: cell.key for cell in cells(config)}

    before = keys(everything)
    num_cells = 12 * 6 + 3 * 6 + 3 + 1  # random is drawn three times
    assert len(set(before.values())) == len(before) == num_cells
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in before.values())
    # Titles, threads, and what else is in the grid.
    vanilla = replace(everything.methods[0], title="Plain", seeds=(2,), learning_rates=(1e-3,))
    fewer = replace(everything, methods=(vanilla,), threads=1, seeds=(5,))
    assert keys(fewer) == {
        "vanilla lr=0.001 seed=2 draw=0": before["vanilla lr=0.001 seed=2 draw=0"]
    }
    # Everything that all runs share.
    for change in (
        {"world": WorldConfig("toy", {"num_entities": 51})},
        {"budget_tokens": 102_401},
        {"alphas": (1.0, 0.7)},
        {"training": replace(everything.training, weight_decay=0.1)},
        {"trace": replace(everything.trace, num_probes=8)},
    ):
        after = keys(replace(everything, **change))
        assert not set(after.values()) & set(before.values()), change
    # A method's own, and only its own.
    mer = replace(everything.method("mer"), slow_weights=SlowWeights(every=11, strength=0.5))
    others = tuple(mer if m.name == "mer" else m for m in everything.methods)
    after = keys(replace(everything, methods=others))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("mer ")}


def test_the_key_of_a_base(everything):
    key = base_key(everything, 0)
    assert len(key) == 16
    assert key != base_key(everything, 1)
    other = replace(everything, methods=everything.methods[:1], budget_tokens=2048, threads=1)
    assert base_key(other, 0) == key
    assert base_key(replace(everything, trace=TraceConfig()), 0) != key


def test_keys_stay_the_same_from_version_to_version():
    """Results of an earlier version would be made again otherwise."""
    vanilla = MethodConfig(name="vanilla", title="Vanilla", learning_rates=(1e-3,), seeds=(0,))
    config = CompareConfig(
        world=WorldConfig("toy", {"num_entities": 60}),
        budget_tokens=102_400,
        seeds=(0,),
        learning_rates=(1e-3,),
        methods=(vanilla,),
    )
    assert cells(config)[0].key == "3f5fa09a1b1650b9"
    assert base_key(config, 0) == "41f96eb5b4a95660"


@pytest.mark.parametrize(
    ("localize", "traced"),
    [
        (Localize(), False),
        (Localize(policy="random", k=2), False),
        (Localize(policy="random"), True),
        (Localize(policy="freeze"), True),
        (Localize(policy="scale"), True),
        (Localize(policy="top-k", k=2), True),
        (Localize(policy="bottom-k", share=0.5), True),
        (Localize(policy="complement"), True),
    ],
)
def test_who_pays_for_a_trace(localize, traced):
    assert localize.traced is traced
