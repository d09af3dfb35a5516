"""TemporalWorld: what it promises about facts, corpora, words and files, at several sizes."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gradloc.probes import TemporalWorld, encode_probe, read_probes
from gradloc.probes.world_words import FAMILY_NAMES, GIVEN_NAMES, RELATIONS, TOPICS

WORLDS = {
    "default": {},
    "other-seed": {"seed": 7},
    "tiny": {"num_entities": 5, "num_new_entities": 3, "num_objects": 4, "share_changed": 0.5},
    "static": {"num_entities": 12, "num_new_entities": 0, "share_changed": 0.0},
    "large": {"num_entities": 3000, "num_new_entities": 500, "num_objects": 50},
}
each_world = pytest.mark.parametrize("arguments", WORLDS.values(), ids=list(WORLDS))


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def statements(documents: list[str]) -> Counter[tuple[str, str, str]]:
    """The (entity, relation, object) that documents state, found by the training templates."""
    patterns = [
        (
            relation.name,
            re.compile(
                re.escape(template)
                .replace(r"\{entity\}", r"(?P<entity>[A-Z]\w+ [A-Z]\w+)")
                .replace(r"\{object\}", r"(?P<object>\w+(?: \w+)?)")
            ),
        )
        for relation in RELATIONS
        for template in relation.training
    ]
    found: Counter[tuple[str, str, str]] = Counter()
    for document in documents:
        for sentence in re.findall(r"[^.]+\.", document):
            for name, pattern in patterns:
                match = pattern.fullmatch(sentence.strip())
                if match:
                    found[match["entity"], name, match["object"]] += 1
    return found


def test_the_default_world_has_the_documented_size() -> None:
    world = TemporalWorld()
    assert (len(world.entities), len(world.new_entities), len(world.relations)) == (60, 20, 4)
    assert Counter(fact.kind for fact in world.facts) == {
        "unchanged": 168,
        "new": 80,
        "updated": 72,
    }
    probes = world.probes()
    assert {kind: len(group) for kind, group in probes.items()} == {
        "updated": 144,
        "new": 160,
        "unchanged": 336,
        "outdated": 144,
    }
    assert len(world.old_probes()) == 480
    assert 350 <= len(world.tokenizer()) <= 420


@each_world
def test_names_are_distinct_and_made_of_known_tokens(arguments: Any) -> None:
    world = TemporalWorld(**arguments)
    names = world.entities + world.new_entities
    assert len(set(names)) == len(names)
    known = {part for name in world.entities for part in name.split()}
    for name in names:
        given, family = name.split()
        assert given in GIVEN_NAMES
        assert family in FAMILY_NAMES
        assert {given, family} <= known, name
    if len(names) >= 60:
        firsts = Counter(name.split()[0] for name in names)
        assert max(firsts.values()) > 1, "one token alone would name the entity"


@each_world
def test_facts(arguments: Any) -> None:
    world = TemporalWorld(**arguments)
    old = [fact for fact in world.facts if fact.old is not None]
    assert [(fact.entity, fact.relation) for fact in old] == [
        (entity, relation.name) for relation in RELATIONS for entity in world.entities
    ]
    changed = sum(fact.kind == "updated" for fact in old)
    assert changed == round(arguments.get("share_changed", 0.3) * len(old))
    assert {(fact.entity, fact.relation) for fact in world.facts if fact.kind == "new"} == {
        (entity, relation.name) for relation in RELATIONS for entity in world.new_entities
    }
    for relation in RELATIONS:
        before = Counter(fact.old for fact in old if fact.relation == relation.name)
        assert set(before) == set(world.objects[relation.name]), "every object occurs before"
        assert max(before.values()) - min(before.values()) <= 1
        after = {fact.new for fact in world.facts if fact.relation == relation.name}
        assert after <= set(before)


def test_templates() -> None:
    for relation in RELATIONS:
        assert len(relation.training) == 4
        assert len(relation.probing) == 2
        trained = {word for one in RELATIONS for text in one.training for word in words_of(text)}
        for template in relation.training + relation.probing:
            assert template.index("{entity}") < template.index("{object}")
        for probing in relation.probing:
            assert set(words_of(probing)) <= trained, "a probe with a word that was never trained"
            for training in relation.training:
                assert probing.rstrip(".") not in training
                assert training.rstrip(".") not in probing
        if any(template.endswith(" a {object}.") for template in relation.training):
            assert not [text for text in relation.objects if text[0] in "aeiou"], "it says 'a'"
    lengths = {one.name: {len(text.split()) for text in one.objects} for one in RELATIONS}
    assert lengths == {"home": {1}, "trade": {1}, "employer": {2}, "animal": {2}}
    for relation in RELATIONS:
        assert len(set(relation.objects)) == len(relation.objects) >= 50


def test_stocks_of_words_do_not_mix() -> None:
    towns = {word for text in RELATIONS[0].objects for word in text.split()}
    firms = {word for text in RELATIONS[2].objects for word in text.split()}
    stocks = [set(GIVEN_NAMES), set(FAMILY_NAMES), towns, firms]
    for index, stock in enumerate(stocks):
        for other in stocks[index + 1 :]:
            assert not stock & other


@each_world
def test_the_old_corpus_states_the_old_facts(arguments: Any) -> None:
    world = TemporalWorld(**arguments)
    num_tokens = 60 * len(world.facts)
    found = statements(world.old_corpus(num_tokens))
    expected = {(fact.entity, fact.relation, fact.old) for fact in world.facts if fact.old}
    assert set(found) == expected
    assert max(found.values()) - min(found.values()) <= 1, "every fact as often as any other"


def test_the_new_corpus_states_what_is_new() -> None:
    world = TemporalWorld()
    by_kind = {
        kind: {(f.entity, f.relation, f.new) for f in world.facts if f.kind == kind}
        for kind in ("updated", "new", "unchanged")
    }
    found = set(statements(world.new_corpus(30_000)))
    assert found == by_kind["updated"] | by_kind["new"]
    replay = world.new_corpus(30_000, share_updated=0, share_new=0, share_unchanged=0.4)
    assert set(statements(replay)) == by_kind["unchanged"]
    everything = world.new_corpus(30_000, share_updated=0.3, share_new=0.3, share_unchanged=0.4)
    assert set(statements(everything)) == by_kind["updated"] | by_kind["new"] | by_kind["unchanged"]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
def test_shares_and_lengths(share: float) -> None:
    world = TemporalWorld(3)
    documents = world.old_corpus(20_000, share_facts=share)
    names = set(world.entities)
    lengths = {True: 0, False: 0}
    for document in documents:
        lengths[any(name in document for name in names)] += len(words_of(document))
        assert 3 <= document.count(".") <= 5
    total = sum(lengths.values())
    assert 20_000 <= total < 20_100
    assert lengths[True] / total == pytest.approx(share, abs=0.004)


def test_probes_are_not_in_the_corpora() -> None:
    world = TemporalWorld(num_entities=20, num_new_entities=10)
    corpora = " ".join(world.old_corpus(100_000) + world.new_corpus(50_000))
    for group in world.probes().values():
        for probe in group:
            assert probe.text.rstrip(".") not in corpora


def test_probes_ask_for_the_right_object() -> None:
    world = TemporalWorld(2)
    facts = {(fact.entity, fact.relation): fact for fact in world.facts}
    for kind, group in {**world.probes(), "old": world.old_probes()}.items():
        for probe in group:
            entity, relation = probe.source.split(":")[2].split("/")
            fact = facts[entity, relation]
            wanted = fact.old if kind in ("outdated", "old") else fact.new
            assert probe.span_texts == (wanted,)
            assert probe.kind == kind
            assert entity in probe.text[: probe.spans[0][0]]
            assert probe.query is not None
            assert probe.query.replace("_X_", wanted or "") == probe.text
            if kind not in ("outdated", "old"):
                assert fact.kind == kind


def test_text_drifts_and_states_no_facts() -> None:
    world = TemporalWorld()
    old, new = world.text("old", 300), world.text("new", 300)
    corpora = [
        (world.old_corpus(20_000, share_facts=0), "old"),
        (world.new_corpus(20_000, share_updated=0, share_new=0), "new"),
    ]
    for documents, period in [(old, "old"), (new, "new"), *corpora]:
        words = set(words_of(" ".join(documents)))
        for topic in TOPICS:
            present = topic.period in (period, "both")
            assert bool(words & set(topic.actors)) == present, topic.name
        assert not statements(documents)
    assert {topic.period for topic in TOPICS} == {"old", "both", "new"}
    assert world.text("old", 50, seed=1) != world.text("old", 50)
    assert world.text("old", 50) == world.text("old", 50)
    actors = [actor for topic in TOPICS for actor in topic.actors]
    assert len(set(actors)) == len(actors)


def test_held_out_text_is_not_the_corpus_text() -> None:
    world = TemporalWorld()
    corpus = set(world.old_corpus(50_000))
    repeated = sum(document in corpus for document in world.text("old", 200))
    assert repeated < 20, f"{repeated} of 200 documents stand in the corpus"


@each_world
def test_the_tokenizer_knows_every_word(arguments: Any) -> None:
    world = TemporalWorld(**arguments)
    tokenizer = world.tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    documents = world.old_corpus(4000) + world.text("old", 50) + world.text("new", 50)
    documents += [probe.text for group in world.probes().values() for probe in group[:400]]
    for document in documents:
        ids = tokenizer(document)["input_ids"]
        assert tokenizer.unk_token_id not in ids, document
        assert len(ids) == len(words_of(document))
    for group in world.probes().values():
        for probe in group[:8]:
            encoded = encode_probe(probe, tokenizer, 32)
            labelled = [label for label in encoded["labels"] if label != -100]
            assert tokenizer.decode(labelled) == probe.span_texts[0]


def test_the_tokenizer_survives_saving(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = TemporalWorld().tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.pad_token, again.eos_token, again.bos_token) == ("<pad>", "<eos>", "<eos>")


def test_the_same_seed_gives_the_same_bytes() -> None:
    """The digest is fixed: another Python, machine or order of a set must not change the world."""
    world = TemporalWorld(5)
    content = "\n".join(
        [*world.old_corpus(2000), *world.new_corpus(2000), *world.text("new", 20)]
        + [probe.text for group in world.probes().values() for probe in group]
        + world.vocabulary()
    )
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert digest[:16] == "3df576443ca63854"
    assert TemporalWorld(6).old_corpus(2000) != world.old_corpus(2000)
    assert world.old_corpus(2000, seed=1) != world.old_corpus(2000)


def test_the_global_random_state_is_left_alone() -> None:
    random.seed(3)
    expected = random.random()
    random.seed(3)
    TemporalWorld(1).old_corpus(500)
    assert random.random() == expected


@pytest.mark.parametrize("name", ["tiny", "static"])
def test_write(tmp_path: Path, name: str) -> None:
    world = TemporalWorld(**WORLDS[name])
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "probes-new.jsonl").write_text("another world's")
    paths = world.write(tmp_path, old_tokens=3000, new_tokens=1000, text_documents=9)
    present = [kind for kind, group in world.probes().items() if group and kind != "outdated"]
    names = {"old.txt", "new.txt", "text_old.txt", "text_new.txt"}
    names |= {f"probes-{kind}.jsonl" for kind in present}
    assert {path.name for path in paths} == names
    assert {path.name for path in tmp_path.iterdir()} == names | {"notes.md"}
    assert (tmp_path / "old.txt").read_text().splitlines() == world.old_corpus(3000)
    assert (tmp_path / "text_new.txt").read_text().splitlines() == world.text("new", 9)
    for kind in present:
        read = read_probes(tmp_path / f"probes-{kind}.jsonl")
        assert [(p.text, p.spans, p.kind, p.query) for p in read] == [
            (p.text, p.spans, p.kind, p.query) for p in world.probes()[kind]
        ]
    first = {path: path.read_bytes() for path in paths}
    world.write(tmp_path, old_tokens=3000, new_tokens=1000, text_documents=9)
    assert {path: path.read_bytes() for path in paths} == first


def test_writing_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another path"):
        TemporalWorld(num_entities=8).write(tmp_path / "file" / "world", old_tokens=100)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_entities": 1}, "num_entities=1"),
        ({"num_new_entities": -1}, "num_new_entities=-1"),
        ({"num_objects": 1}, "num_objects=1: must be from 2 to"),
        ({"num_objects": 51}, "num_objects=51: must be from 2 to 50"),
        ({"share_changed": 1.5}, r"share_changed=1\.5"),
        ({"num_entities": 3, "num_new_entities": 7}, "need 10 names, but 3 old entities can"),
        ({"num_entities": 200_000}, "need 200020 names, but there are"),
    ],
)
def test_bad_arguments(arguments: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TemporalWorld(**arguments)


def test_the_smallest_name_space_is_used_up() -> None:
    world = TemporalWorld(num_entities=3, num_new_entities=6)
    assert len(set(world.entities + world.new_entities)) == 9


def test_bad_lengths_and_shares() -> None:
    world = TemporalWorld(num_entities=6, num_new_entities=0, share_changed=0)
    with pytest.raises(ValueError, match=r"share_updated=0\.25, but the world has no such facts"):
        world.new_corpus(100)
    with pytest.raises(ValueError, match="num_tokens=0"):
        world.old_corpus(0)
    with pytest.raises(ValueError, match=r"share_facts=1\.2"):
        world.old_corpus(100, share_facts=1.2)
    with pytest.raises(ValueError, match="period='now'"):
        world.text("now")
    with pytest.raises(ValueError, match="num_documents=0"):
        world.text("old", 0)
    with pytest.raises(ValueError, match=r"sum to 1\.2"):
        TemporalWorld().new_corpus(100, share_updated=0.6, share_new=0.6)
