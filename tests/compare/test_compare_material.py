"""Materials: what is kept apart, what a folder gives back, which options a world takes."""

from dataclasses import replace

import pytest

from gradloc.compare import toy_world
from gradloc.compare.material import (
    FORGET_KIND,
    LEARN_KINDS,
    Material,
    read_material,
    split_by_source,
    write_material,
)
from gradloc.compare.study import check_world
from gradloc.compare.toy_world import ToyOptions
from gradloc.probes import TemporalWorld

SMALL = {"num_entities": 12, "num_new_entities": 4, "num_objects": 4}


@pytest.fixture(scope="module")
def world():
    return TemporalWorld(3, **SMALL, share_changed=0.3)


@pytest.fixture(scope="module")
def material(world):
    settings = ToyOptions(**SMALL, new_tokens=2000, keep_tokens=2000, text_documents=10)
    return toy_world._material(world, settings)


def facts_in(world, documents):
    """The facts that documents state, by entity and object standing in one sentence."""
    found = set()
    for text in documents:
        for sentence in text.replace(" .", ".").split("."):
            for fact in world.facts:
                for thing in {fact.old, fact.new} - {None}:
                    if fact.entity in sentence and thing in sentence:
                        found.add(world.source_of(fact))
    return found


def sources(world, probes):
    """Spans files do not keep the source: find it again by the probe's text."""
    by_text = {p.text: p.source for group in world.probes().values() for p in group}
    return {by_text[probe.text] for probe in probes}


def of_kind(probes, *kinds):
    return [probe for probe in probes if probe.kind in kinds]


def test_forgetting_is_measured_on_facts_that_nothing_else_saw(world, material):
    measured = sources(world, of_kind(material.measured, FORGET_KIND))
    assert measured
    for part in (material.trace, material.validation):
        assert not measured & sources(world, part)
    assert not measured & facts_in(world, material.keep)
    assert not measured & facts_in(world, material.new)
    validation = sources(world, of_kind(material.validation, FORGET_KIND))
    assert validation
    assert not validation & facts_in(world, material.keep)


def test_learning_is_measured_on_facts_that_were_not_traced(world, material):
    for kind in LEARN_KINDS:
        measured = sources(world, of_kind(material.measured, kind))
        assert measured
        assert not measured & sources(world, of_kind(material.trace, kind))


def test_the_new_corpus_states_what_is_measured_in_other_words(world, material):
    learned = sources(world, of_kind(material.measured, *LEARN_KINDS))
    assert learned <= facts_in(world, material.new)
    corpus = " ".join(material.new)
    assert not any(probe.text in corpus for probe in material.measured)


def test_kept_text_is_not_measured_text(material):
    measured = set(material.text["old"])
    assert measured
    assert not measured & set(material.reference)
    assert not measured & set(material.keep)


def test_a_folder_gives_the_material_back(tmp_path, material):
    write_material(tmp_path, material)
    again = read_material(tmp_path)
    assert again.new == tuple(material.new)
    assert again.keep == tuple(material.keep)
    assert again.prompts == tuple(material.prompts)
    assert {name: list(text) for name, text in again.text.items()} == {
        name: list(text) for name, text in material.text.items()
    }
    for part in ("trace", "validation", "measured"):
        assert [(p.text, p.spans, p.kind) for p in getattr(again, part)] == [
            (p.text, p.spans, p.kind) for p in getattr(material, part)
        ]


def test_line_ends_inside_a_document_do_not_make_two(tmp_path, material):
    write_material(tmp_path, replace(material, new=["one\ntwo", "three"]))
    assert read_material(tmp_path).new == ("one two", "three")


def test_what_shapes_a_choice_may_not_judge_it(material):
    with pytest.raises(ValueError, match="trace and measured share 1 probes"):
        replace(material, trace=[*material.trace, material.measured[0]])


@pytest.mark.parametrize("part", ["trace", "validation", "measured"])
def test_every_part_needs_its_kinds(material, part):
    without = [probe for probe in getattr(material, part) if probe.kind != "new"]
    with pytest.raises(ValueError, match=f"{part} has no probes of kind new"):
        replace(material, **{part: without})


def test_old_text_must_be_there():
    with pytest.raises(ValueError, match="no 'old'"):
        Material(new=(), keep=(), reference=(), text={}, trace=(), validation=(), measured=())


def test_the_probes_of_a_fact_stay_together(world):
    probes = world.probes()[FORGET_KIND]
    parts = split_by_source(probes, 3)
    assert sorted(p.text for part in parts for p in part) == sorted(p.text for p in probes)
    owners = [{p.source for p in part} for part in parts]
    assert sum(map(len, owners)) == len(set.union(*owners))
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("toy", {"num_entitys": 3}, "did you mean 'num_entities'"),
        ("toy", {"block_size": 8}, "no option 'block_size'"),
        ("toy", {"num_entities": 1}, "num_entities=1: must be at least 2"),
        ("toy", {"width": "wide"}, "width='wide': expected int"),
        ("english", {"passes": 0}, "passes=0: at least 1"),
        ("english", {"templama_dates": "2019"}, "two dates"),
        ("martian", {}, "'toy' or 'english'"),
    ],
)
def test_bad_worlds_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        check_world(kind, options)


def test_whole_numbers_pass_for_fractions():
    check_world("toy", {"share_changed": 1, "base_learning_rate": 1})


def test_every_part_has_some_of_each_relation():
    """Dealt out in their order, facts of four relations would fall into two halves of two."""
    probes = [
        replace(probe, source=f"x:{entity}/{relation}")
        for entity in range(12)
        for relation in range(4)
        for probe in TemporalWorld(0, **SMALL).old_probes()[:2]
    ]
    for parts in (2, 3, 4):
        for part in split_by_source(probes, parts):
            assert {probe.source[-1] for probe in part} == set("0123")
