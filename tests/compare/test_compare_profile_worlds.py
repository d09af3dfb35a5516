"""The probes that experiments/profiles.py traces: independent draws, in the same sentences."""

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest

from gradloc.probes import Probe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def worlds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    module = importlib.import_module("profiles_worlds")
    monkeypatch.setattr(module, "load_model", lambda name: (None, None))
    return module


def test_countries_occur_once_and_kinds_have_the_same_templates(worlds, tmp_path, monkeypatch):
    asked = []

    def know_most(model, tokenizer, probes):
        asked.append(len(probes))
        keys = {tuple(probe.source.split(":", 2)[2].split("/")) for probe in probes}
        return {key for number, key in enumerate(sorted(keys)) if number % 3}

    monkeypatch.setattr(worlds, "ask", know_most)
    known = tmp_path / "known.json"
    world = worlds.english_world("model", tmp_path, known, 0)
    assert set(world.probes) == {"updated", "new", "unchanged", "outdated"}
    templates = [Counter(map(worlds._frame, probes)) for probes in world.probes.values()]
    assert all(one == templates[0] for one in templates)
    assert len(templates[0]) > 4
    for kind, probes in world.probes.items():
        assert len(probes) > 10
        assert len({probe.source.split("/")[0] for probe in probes}) == len(probes)
        assert {probe.kind for probe in probes} == {kind}
    # Asked once, whatever the seed.
    other = worlds.english_world("model", tmp_path, known, 1)
    assert len(asked) == 1
    assert other.probes["updated"] != world.probes["updated"]


def test_an_entity_of_ecbd_gives_one_probe(worlds, tmp_path):
    def line(entity, number):
        sentence = f"{entity} was number <extra_id_0> then."
        template = {"probe_sentence": sentence, "label": f"<extra_id_0> {number} <extra_id_1>"}
        return json.dumps({"ent_str": entity, "probe_sentences": {"template_0": template}})

    path = tmp_path / "ecbd.jsonl"
    path.write_text("\n".join(line(f"Entity{n // 3}", n) for n in range(9)) + "\n")
    chosen = worlds._one_an_entity(path, worlds.read_ecbd(path), 0)
    assert sorted(probe.text.split()[0] for probe in chosen) == ["Entity0", "Entity1", "Entity2"]


def test_a_toy_fact_gives_one_probe(worlds, tmp_path):
    """Also where the validation probes are the traced ones again."""

    def rows(names, kind):
        for name in names:
            for template in ("{} lives in {}.", "The home of {} is {}."):
                text = template.format(name, f"Town{name}")
                start = text.index("Town")
                yield {"text": text, "spans": [[start, len(text) - 1]], "kind": kind}

    parts = {
        "trace": [*rows("AB", "updated"), *rows("CDE", "new")],
        "validation": [*rows("AB", "updated"), *rows("CDE", "new")],
        "measured": [*rows("FG", "updated"), *rows("HI", "new"), *rows("J", "ecbd-new")],
    }
    for name, content in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "base.json").write_text(json.dumps({"model": "model"}))
    world = worlds.base_world(tmp_path, 0)
    assert set(world.probes) == {"updated", "new"}
    for probes in world.probes.values():
        assert len({probe.span_texts for probe in probes}) == len(probes) == 4
        assert Counter(map(worlds._frame, probes)) == {"lives in": 2, "home of is": 2}


def test_the_words_that_are_no_names(worlds):
    probe = Probe("The capital of San Marino is Rome.", ((29, 33),), "new", "x")
    assert worlds._frame(probe) == "capital of is"
