"""The English world of a comparison: what is asked, replayed and measured, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import make_gpt2

from gradloc.cli import main
from gradloc.compare import english_world
from gradloc.compare.config_file import config_from
from gradloc.compare.english_world import check_places, make, model_digest
from gradloc.compare.study import prepare
from gradloc.files import read_json
from gradloc.models import load_model
from gradloc.probes.english_ask import fact_key
from gradloc.probes.english_words import ENGLISH_RELATIONS

OPTIONS = {
    "num_updated": 4,
    "num_new": 4,
    "num_keep": 3,
    "num_validation": 3,
    "num_unchanged": 4,
    "sentences": 40,
    "keep_sentences": 30,
    "keep_words": 60,
    "reference_words": 80,
    "text_words": 80,
    "templama_facts": 3,
    "ecbd_entities": 5,
    "passes": 2,
}
NO_ECBD = {**OPTIONS, "ecbd_entities": 0}
FIRST = [relation.probing[0] for relation in ENGLISH_RELATIONS]
NUM_ENTITIES = 12


def _write(path: Path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _entity(name, number):
    template = {
        "probe_sentence": f"Most of {name} <extra_id_0> then.",
        "label": f"<extra_id_0> was grey{number} <extra_id_1>",
    }
    return json.dumps(
        {
            "ent_str": name,
            "definition": f"{name} is <extra_id_0> of the east.",
            "def_target": f"<extra_id_0> storm {number} <extra_id_1>",
            "probe_sentences": {"template_0": template},
        }
    )


@pytest.fixture
def data(tmp_path):
    """Files as small as can be; lines of WikiText begin with "wiki"."""
    folder = tmp_path / "data"
    _write(
        folder / "wikitext2/valid.txt", [f"wiki {n} a river runs by the town" for n in range(60)]
    )
    _write(
        folder / "templama/dynamic_templama_p54.jsonl",
        [
            json.dumps({"query": f"P{n} plays for _X_.", "answer": [{"name": team}], "date": date})
            for n in range(8)
            for date, team in (
                ("2019-Q2", f"FC {n}"),
                ("2022-Q2", f"FC {n}" if n % 2 else f"United {n}"),
            )
        ],
    )
    entities = [f"Storm{n:02d}" for n in range(NUM_ENTITIES)]
    _write(
        folder / "ecbd/ecbd_2020_2021_np.jsonl",
        [
            *(_entity(name, number) for number, name in enumerate(entities)),
            # An entity that is measured as popular, too.
            _entity("Popular0", 0),
        ],
    )
    _write(folder / "ecbd/ecbd_popular.jsonl", [_entity(f"Popular{n}", n) for n in range(2)])
    return folder


@pytest.fixture
def asked(monkeypatch):
    """`ask` knows two facts in three; the lists of probes it was given."""
    lists = []

    def ask(model, tokenizer, probes):
        lists.append(list(probes))
        keys = list(dict.fromkeys(fact_key(probe) for probe in lists[-1]))
        return {key for number, key in enumerate(keys) if number % 3}

    monkeypatch.setattr(english_world, "ask", ask)
    return lists


@pytest.fixture
def build(tmp_path, data, model_folder, asked):
    def build(options=OPTIONS, seed=0, *, model=model_folder, run="run"):
        return make(
            options,
            seed,
            tmp_path / run / "bases" / f"seed-{seed}",
            shared=tmp_path / run / "bases",
            places={"data": str(data), "model": str(model)},
            block_size=64,
            on_step=lambda done, total: None,
            note=lambda text: None,
        )

    return build


def _frame(probe):
    """The number of the template, of the probes of a relation."""
    entity, relation = fact_key(probe)
    templates = next(r.probing for r in ENGLISH_RELATIONS if r.name == relation)
    queries = [t.format(entity=entity, object="_X_") for t in templates]
    return [q[:1].upper() + q[1:] for q in queries].index(probe.query)


def test_facts_are_not_measured_by_the_sentences_that_chose_them(build, asked):
    material = build().material
    (questions,) = asked
    assert {_frame(probe) for probe in questions} == {0}
    assert len({probe.source for probe in questions}) == len(questions)

    def frames(probes, kind):
        english = [p for p in probes if p.kind == kind and p.source.startswith("english:")]
        assert english
        return {_frame(probe) for probe in english}

    assert frames(material.measured, "unchanged") == {1}
    assert frames(material.validation, "unchanged") == {1}
    for kind in ("updated", "new"):
        for part in (material.trace, material.validation, material.measured):
            assert frames(part, kind) == {0, 1}
    questioned = {probe.text for probe in questions}
    unchanged = {
        p.text for p in (*material.measured, *material.validation) if p.kind == "unchanged"
    }
    assert not questioned & unchanged


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_replayed_text_is_of_another_source_than_measured_text(build, seed):
    material = build(seed=seed).material
    assert not [text for text in material.keep if text.startswith("wiki")]
    assert {text.split()[0] for text in material.text["old"]} == {"wiki"}
    assert not set(material.text["old"]) & set(material.reference)
    storms = {text for text in material.keep if text.startswith(("Storm", "Popular"))}
    trained = {text for text in material.new if text.startswith(("Storm", "Popular"))}
    measured = {p.text.split()[2] for p in material.measured if p.kind.startswith("ecbd")}
    assert len(trained) == 5
    assert len(measured) == 7
    # Those left: seven, of seven words each; 60 words have them all, the popular one not.
    assert len(storms) == NUM_ENTITIES - 5
    assert not storms & trained
    assert not {text.split()[0] for text in storms} & measured


def test_words_to_replay_are_a_limit(build):
    few = build({**OPTIONS, "keep_words": 20}).material.keep
    assert len([text for text in few if text.startswith("Storm")]) == 2
    for change in ({"keep_words": 3}, {"ecbd_entities": 100}):
        with pytest.raises(ValueError, match=r"ecbd_entities=.*keep_words=.*left to replay"):
            build({**OPTIONS, **change})


def test_without_ecbd_other_lines_of_the_measured_file_are_replayed(build, data):
    shutil.rmtree(data / "ecbd")
    material = build(NO_ECBD).material
    wiki = [text for text in material.keep if text.startswith("wiki")]
    assert 60 <= sum(len(text.split()) for text in wiki) < 70
    parts = [wiki, material.text["old"], material.reference]
    assert len(set().union(*parts)) == sum(map(len, parts))
    with pytest.raises(ValueError, match="too few words for text_words=900"):
        build({**NO_ECBD, "text_words": 900})


def test_a_run_remembers_its_model(build, tmp_path, model_folder, tokenizer, asked):
    about = build().about
    assert about["model"] == model_folder.name
    assert about["model_digest"] == model_digest(load_model(model_folder)[0])
    assert about["model_digest"] != model_digest(make_gpt2(tokenizer, seed=1))
    # The kept copy is the model that was asked.
    assert about["model_digest"] == model_digest(load_model(tmp_path / "run/bases/model")[0])
    assert about["facts_asked"] == len(asked[0])

    # Moved, and by now gone: the same name is the same model.
    assert build(seed=1, model=tmp_path / "moved" / model_folder.name).about == about
    assert len(asked) == 1
    with pytest.raises(ValueError, match=r"model='.*other'.*run'.*made with .*another --output"):
        build(seed=2, model=tmp_path / "other")
    # The options' own model counts where no place is given.
    shared = tmp_path / "run/bases"
    places = {"data": str(tmp_path / "data")}
    check_places({**OPTIONS, "model": f"someone/{model_folder.name}"}, places, shared=shared)
    with pytest.raises(ValueError, match="model='HuggingFaceTB/SmolLM2-135M-Instruct'"):
        check_places(OPTIONS, places, shared=shared)


def test_answers_of_an_earlier_version_are_refused(build, tmp_path):
    build()
    path = tmp_path / "run/bases/model/known.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"schema": content["schema"], "version": 1, "known": []}))
    with pytest.raises(ValueError, match="begun by an earlier gradloc"):
        build(seed=1)


CONFIG = """
world: {kind: english}
budget_tokens: 2048
seeds: [0]
learning_rates: [0.001]
training: {block_size: 64, batch_size: 4}
trace: {num_probes: 4, batch_size: 2}
methods: {vanilla: {}}
"""


def test_a_base_after_a_kill(tmp_path, data, model_folder, asked):
    """What a killed process left is gone, other seeds' folders stay, and the record says whom."""
    body = yaml.safe_load(CONFIG)
    body["world"].update(OPTIONS)
    bases = tmp_path / "run/bases"
    for name in (".seed-0.abc", ".model.def", ".seed-1.ghi", "seed-1"):
        (bases / name).mkdir(parents=True)
        (bases / name / "model.safetensors").write_text("half")
    record = prepare(
        config_from(body),
        0,
        tmp_path / "run",
        places={"data": str(data), "model": str(model_folder)},
        on_step=lambda done, total: None,
        note=lambda text: None,
    )
    left = sorted(path.name for path in bases.iterdir())
    assert left == [".seed-1.ghi", "model", "model.lock", "seed-0", "seed-1"]
    known = read_json(bases / "model/known.json", schema="gradloc.compare.known", version=2)
    for name in ("model", "model_digest"):
        assert record["about"][name] == known[name]
    assert record["scores"]["1"]["probes"]["unchanged"]["num_probes"] > 0


MISSING = {
    "no data": ({"data": None}, "give --data FOLDER"),
    "data": ({"data": "nowhere"}, "data='nowhere': no such folder"),
    "text": ({"gone": "wikitext2/valid.txt"}, "has no file wikitext2/valid.txt: put it there"),
    "templama": ({"gone": "templama/dynamic_templama_p54.jsonl"}, "templama_facts to 0"),
    "ecbd": ({"gone": "ecbd/ecbd_2020_2021_np.jsonl"}, "ecbd_entities to 0"),
    "popular": ({"gone": "ecbd/ecbd_popular.jsonl"}, "ecbd_entities to 0"),
    "model folder": ({"model": "./gone"}, "model='./gone': no such file or folder"),
    "deep folder": ({"model": "runs/1/final"}, "model='runs/1/final': no such file or folder"),
    "gguf": ({"model": "base.gguf"}, "model='base.gguf': no such file or folder"),
    "empty folder": ({"model": "data"}, "model='data': the folder has no config.json"),
    "some file": ({"model": "grid.yaml"}, "model='grid.yaml' is a file, but not a .gguf"),
}


@pytest.mark.parametrize(("case", "message"), MISSING.values(), ids=list(MISSING))
def test_what_is_missing_is_said_before_anything_is_made(
    tmp_path, data, model_folder, monkeypatch, capsys, case, message
):
    monkeypatch.chdir(tmp_path)
    body = yaml.safe_load(CONFIG)
    body["world"].update(OPTIONS)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(body))
    if "gone" in case:
        (data / case["gone"]).unlink()
    places = {"model": str(model_folder), "data": "data", **case}
    where = [
        text
        for name in ("model", "data")
        if places[name] is not None
        for text in (f"--{name}", places[name])
    ]
    assert main(["compare", "grid.yaml", *where]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("gradloc: error: ")
    assert message in line
    assert "\n" not in line
    assert not (tmp_path / "grid").exists()


def test_what_the_options_leave_out_is_not_missed(tmp_path, data, model_folder):
    shutil.rmtree(data / "ecbd")
    shutil.rmtree(data / "templama")
    places = {"data": str(data), "model": str(model_folder)}
    check_places({**NO_ECBD, "templama_facts": 0}, places, shared=tmp_path / "run/bases")
    # An id of the hub is nothing that a look can judge.
    places["model"] = "someone/some-model"
    check_places({**NO_ECBD, "templama_facts": 0}, places, shared=tmp_path / "run/bases")
