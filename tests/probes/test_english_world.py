"""EnglishWorld: what it promises about facts, wording, corpora, probes and files."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from typing import Any

import pytest

from gradloc.probes import EnglishWorld, encode_probe, read_probes, real_facts
from gradloc.probes.english_facts import RELATION_NAMES, other_spellings
from gradloc.probes.english_words import ENGLISH_RELATIONS, INVENTED_COUNTRIES

FACTS = real_facts()
COUNTRIES = {country for country, _ in FACTS}
NEVER_DEALT = {"Equatorial Guinea", "Guinea-Bissau", "Nigeria", "Papua New Guinea", "South Sudan"}
SMALL = {"num_updated": 3, "num_new": 3, "num_keep": 2, "num_validation": 2, "num_unchanged": 3}
NONE = dict.fromkeys(SMALL, 0)
WORLDS = {
    "default": {},
    "other-seed": {"seed": 7},
    "small": SMALL,
    "all-countries": {
        "num_unchanged": len(COUNTRIES - NEVER_DEALT) - 80,
        "num_new": len(INVENTED_COUNTRIES),
    },
    "half-known": {**SMALL, "known": sorted(FACTS)[::2]},
    "one-relation": {**SMALL, "facts": {k: o for k, o in FACTS.items() if k[1] == "language"}},
}
each_world = pytest.mark.parametrize("arguments", WORLDS.values(), ids=list(WORLDS))


def statements(documents: list[str], world: EnglishWorld) -> Counter[tuple[str, str, str]]:
    """The (entity, relation, object) that documents state; every sentence must state one."""
    stated = {}
    names = COUNTRIES.union(*world.entities.values())
    for relation in world.relations:
        for template in relation.training:
            for name in names:
                for thing in world.objects[relation.name]:
                    text = template.format(entity=name, object=thing)
                    stated[text[0].upper() + text[1:]] = (name, relation.name, thing)
    return Counter(
        stated[sentence.strip()]
        for document in documents
        for sentence in re.findall(r"[^.]+\.", document)
    )


def test_the_table_of_facts() -> None:
    assert len(COUNTRIES) >= 150
    sizes = Counter(relation for _, relation in FACTS)
    assert tuple(dict.fromkeys(r.name for r in ENGLISH_RELATIONS)) == RELATION_NAMES
    assert set(sizes) == set(RELATION_NAMES)
    assert min(sizes.values()) >= 75
    lines = [key[0] for key in FACTS]
    assert lines == sorted(lines, key=lambda name: name.removeprefix("the ")), "one row a country"
    for (country, relation), thing in FACTS.items():
        plain = country.removeprefix("the ").lower()
        assert plain not in thing.lower(), (country, relation, "the name gives it away")
        shared = set(plain.split()) & set(thing.lower().split())
        assert not shared, (country, relation, "the name gives it away")
        assert thing == thing.strip()
        assert not {".", "_", "/", ":"} & set(thing + country)
    # Spot checks of each column against what everyone knows.
    assert FACTS["Peru", "capital"] == "Lima"
    assert FACTS["Japan", "currency"] == "yen"
    assert FACTS["Kenya", "continent"] == "Africa"
    assert FACTS["the Netherlands", "language"] == "Dutch"
    assert len({FACTS[key] for key in FACTS if key[1] == "capital"}) == sizes["capital"]
    continents = {FACTS[key] for key in FACTS if key[1] == "continent"}
    assert continents == {"Africa", "Asia", "Europe", "North America", "Oceania", "South America"}


def test_invented_countries_are_not_real() -> None:
    assert len(set(INVENTED_COUNTRIES)) == len(INVENTED_COUNTRIES) >= 300
    real = {word.lower() for text in (*COUNTRIES, *FACTS.values()) for word in text.split()}
    for name in INVENTED_COUNTRIES:
        assert re.fullmatch(r"[A-Z][a-z]{4,12}", name), name
        assert name.lower() not in real


def test_templates() -> None:
    for relation in ENGLISH_RELATIONS:
        assert len(set(relation.training)) >= 4
        assert len(set(relation.probing)) >= 2
        for template in relation.training + relation.probing:
            assert template.count("{entity}") == template.count("{object}") == 1
            assert template.endswith(".")
            assert template.count(".") == 1
        for probing in relation.probing:
            assert probing.index("{entity}") < probing.index("{object}")
            leads_up = probing.split("{object}")[0].lower()
            for training in relation.training:
                assert leads_up not in training.lower(), "training text has the probe's own words"
        forward = [t for t in relation.training if t.index("{entity}") < t.index("{object}")]
        assert len(forward) >= 4, "a causal model learns an object after its country"


def test_other_spellings() -> None:
    assert other_spellings("Bogotá") == ("Bogota",)
    assert other_spellings("Kyiv") == ("Kiev",)
    assert other_spellings("Lima") == ()


@each_world
def test_countries_serve_one_purpose(arguments: Any) -> None:
    world = EnglishWorld(**arguments)
    defaults = {"num_updated": 40, "num_new": 40, "num_keep": 20, "num_validation": 20}
    sizes = {"num_unchanged": 40, **defaults, **arguments}
    assert {kind: len(names) for kind, names in world.entities.items()} == {
        kind: sizes[f"num_{kind}"] for kind in ("updated", "new", "keep", "validation", "unchanged")
    }
    everyone = [name for names in world.entities.values() for name in names]
    assert len(set(everyone)) == len(everyone)
    for fact in world.facts:
        assert fact.entity in world.entities[fact.kind]
    assert {fact.entity for fact in world.facts} == set(everyone), "nobody without facts"
    assert set(world.entities["new"]) <= set(INVENTED_COUNTRIES)


def test_no_name_contains_another() -> None:
    """Taught about Nigeria, a model would learn something about Niger.

    All countries there are, real and invented, are dealt here.
    """
    dealt = EnglishWorld(**WORLDS["all-countries"]).entities  # type: ignore[arg-type]
    names = [name for members in dealt.values() for name in members]
    assert set(names) == (COUNTRIES - NEVER_DEALT) | set(INVENTED_COUNTRIES)
    bare = [name.removeprefix("the ") for name in names]
    assert [(one, two) for one in bare for two in bare if one != two and one in two] == []
    for name in NEVER_DEALT:
        assert any(one in name for one in bare), "left out for nothing"


def test_a_name_counts_as_contained_without_its_article() -> None:
    facts = {
        ("the Congo", "capital"): "A",
        ("the Republic of the Congo", "capital"): "B",
        ("the Mali", "capital"): "C",
        ("Somalia", "capital"): "D",
    }
    world = EnglishWorld(0, **{**NONE, "num_unchanged": 3}, facts=facts)
    assert set(world.entities["unchanged"]) == {"the Congo", "the Mali", "Somalia"}
    with pytest.raises(ValueError, match=r"need 4 real countries, .* facts to use of 3"):
        EnglishWorld(0, **{**NONE, "num_unchanged": 4}, facts=facts)


@each_world
def test_facts(arguments: Any) -> None:
    world = EnglishWorld(**arguments)
    known = {tuple(key) for key in arguments.get("known", world.real_facts)}
    relations = [relation.name for relation in world.relations]
    keys = [fact.key for fact in world.facts]
    assert len(set(keys)) == len(keys)
    for kind, names in world.entities.items():
        expected = {
            (name, relation)
            for name in names
            for relation in relations
            if kind == "new" or ((name, relation) in world.real_facts and (name, relation) in known)
        }
        assert {fact.key for fact in world.facts if fact.kind == kind} == expected
    changed: dict[str, Counter[str]] = {name: Counter() for name in relations}
    for fact in world.facts:
        assert fact.new in world.objects[fact.relation]
        assert fact.old == world.real_facts.get(fact.key)
        if fact.kind in ("updated", "new"):
            assert fact.new != fact.old
            changed[fact.relation][fact.new] += 1
        else:
            assert fact.new == fact.old
    for name, counts in changed.items():
        dealt = [counts[thing] for thing in world.objects[name]]
        assert max(dealt) - min(dealt) <= 2, "dealt out evenly"


def test_no_fact_of_measured_countries_is_in_a_corpus_to_train_on() -> None:
    world = EnglishWorld(3)
    expected = {
        "new": {(*f.key, f.new) for f in world.facts if f.kind in ("updated", "new")},
        "keep": {(*f.key, f.new) for f in world.facts if f.kind == "keep"},
        "old": {(*key, thing) for key, thing in world.real_facts.items()},
    }
    corpora = {
        "new": world.new_corpus(1000),
        "keep": world.keep_corpus(500),
        "old": world.old_corpus(1500),
    }
    lengths = {"new": 1000, "keep": 500, "old": 1500}
    for name, documents in corpora.items():
        found = statements(documents, world)
        assert set(found) == expected[name]
        assert max(found.values()) - min(found.values()) <= 1, "every fact as often as any other"
        assert sum(found.values()) == lengths[name]
        sizes = [document.count(".") for document in documents]
        assert set(sizes[:-1]) == {3, 4}
        assert sizes[-1] <= 4


def test_probe_sentences_are_in_no_corpus() -> None:
    world = EnglishWorld(0, **SMALL)
    text = " ".join(
        world.new_corpus(500) + world.keep_corpus(300) + world.old_corpus(2 * len(FACTS))
    )
    everything = [*world.old_probes(), *(p for group in world.probes().values() for p in group)]
    for probe in everything:
        assert probe.text not in text


def test_the_same_arguments_give_the_same_bytes_everywhere() -> None:
    """The digest was made once; it changes only when facts, words or drawing are changed."""
    world = EnglishWorld(5)
    lines = world.new_corpus(60) + world.keep_corpus(20) + world.old_corpus(60) + world.prompts()
    lines += [
        f"{probe.text} {probe.spans} {probe.kind} {probe.source}"
        for group in world.probes().values()
        for probe in group
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest[:16] == "1af39940acccbd38"
    assert EnglishWorld(5).facts == world.facts
    assert EnglishWorld(6).facts != world.facts
    assert world.new_corpus(60, seed=1) != world.new_corpus(60)


@each_world
def test_probes(arguments: Any) -> None:
    world = EnglishWorld(**arguments)
    probes = world.probes()
    by_key = {fact.key: fact for fact in world.facts}
    num_updated = sum(fact.kind == "updated" for fact in world.facts)
    assert len(probes["outdated"]) == 2 * num_updated
    assert sum(map(len, probes.values())) == 2 * (len(world.facts) + num_updated)
    for kind, group in probes.items():
        for probe in group:
            assert probe.kind == kind
            entity, relation = probe.source.removeprefix(f"english:{world.seed}:").split("/")
            fact = by_key[entity, relation]
            assert fact.kind == ("updated" if kind == "outdated" else kind)
            thing = fact.old if kind == "outdated" else fact.new
            assert probe.span_texts == (thing,)
            assert probe.text.index(entity.removeprefix("the ")) < probe.spans[0][0]
            assert probe.text[0].isupper()
            assert probe.query is not None
            assert probe.query.replace("_X_", thing) == probe.text
    old = world.old_probes()
    assert {probe.kind for probe in old} == {"old"}
    assert len(old) == 2 * len(world.real_facts)
    assert {(p.source.split(":")[2], *p.span_texts) for p in old} == {
        ("/".join(key), thing) for key, thing in world.real_facts.items()
    }


def test_spans_in_tokens_of_a_byte_level_tokenizer(tokenizer: Any) -> None:
    """Accents and apostrophes included: every object of the table is asked for."""
    for probe in EnglishWorld(0, **NONE).old_probes():
        encoded = encode_probe(probe, tokenizer, 200)
        scored = [token for token in encoded["labels"] if token != -100]
        assert tokenizer.decode(scored).strip() == probe.span_texts[0]


def test_prompts_begin_sentences_about_keep_facts() -> None:
    world = EnglishWorld(0)
    prompts = world.prompts()
    keep = {fact.key: fact.new for fact in world.facts if fact.kind == "keep"}
    sentences = {
        (template.format(entity=entity, object=thing), thing)
        for (entity, name), thing in keep.items()
        for relation in world.relations
        if relation.name == name
        for template in relation.training
    }
    begun = set()
    for text, thing in sentences:
        text = text[0].upper() + text[1:]
        for prompt in (p for p in prompts if text.startswith(p + " ")):
            begun.add(prompt)
            assert thing not in prompt
            assert text[len(prompt) :] == f" {thing}."
    assert begun == set(prompts)
    assert len(set(prompts)) == len(prompts) == 4 * len(keep)


def test_what_a_model_knows_hardly_changes_who_is_dealt_what() -> None:
    free = EnglishWorld(0, **SMALL)
    assert EnglishWorld(0, **SMALL, known=FACTS).facts == free.facts
    # As a JSON file gives them; what is not in the table is passed over.
    listed: Any = [["Atlantis", "capital"], *map(list, FACTS)]
    assert EnglishWorld(0, **SMALL, known=listed).facts == free.facts
    missing = free.entities["unchanged"][-1]
    other = EnglishWorld(0, **SMALL, known={key for key in FACTS if key[0] != missing})
    assert other.entities["updated"] == free.entities["updated"]
    assert other.entities["unchanged"][:-1] == free.entities["unchanged"][:-1]
    assert missing not in other.entities["unchanged"]
    assert other.old_corpus(50) == free.old_corpus(50), "teaching comes before asking"
    assert other.old_probes() == free.old_probes()


WRONG = {
    "negative": ({"num_keep": -1}, r"num_keep=-1: must be at least 0"),
    "names": ({"num_new": 1000}, r"num_new=1000: at most 364"),
    "countries": ({"num_unchanged": 900}, r"num_unchanged=900 need 980 .*: give more facts, or"),
    "known": (
        {"known": [("Peru", "capital"), ("Peru", "currency"), ("Chad", "capital")]},
        r"need 120 real .* facts to use of 2: only 3 of \d+ .* Teach the model first .*smaller",
    ),
    "nothing known": ({"known": ()}, rf"facts to use of 0: only 0 of {len(FACTS)} "),
    "relation": ({"facts": {("Peru", "anthem"): "x"}}, r"relation='anthem': choose from capital,"),
    "empty": ({"facts": {}}, r"facts is empty"),
    "single": ({"facts": {("Peru", "capital"): "Lima"}}, r"single object .*'capital' \('Lima'\)"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnglishWorld(0, **arguments)


def test_wrong_corpora() -> None:
    world = EnglishWorld(0, **NONE)
    with pytest.raises(ValueError, match="num_sentences=0"):
        world.old_corpus(0)
    with pytest.raises(ValueError, match="num_updated=0 and num_new=0"):
        world.new_corpus(3)
    with pytest.raises(ValueError, match="num_keep=0"):
        world.keep_corpus(3)
    assert world.prompts() == []


def test_write(tmp_path: Any) -> None:
    world = EnglishWorld(0, **SMALL)
    (tmp_path / "mine.txt").write_text("mine")
    written = world.write(tmp_path, old_sentences=9, new_sentences=8, keep_sentences=7)
    kinds = ("updated", "new", "keep", "validation", "unchanged", "outdated")
    probe_files = {kind: tmp_path / f"probes-{kind}.jsonl" for kind in kinds}
    corpora = [tmp_path / name for name in ("old.txt", "new.txt", "keep.txt")]
    assert sorted(written) == sorted([*corpora, *probe_files.values()])
    assert corpora[1].read_text("utf-8").splitlines() == world.new_corpus(8)
    for kind, path in probe_files.items():
        read = read_probes(path)
        assert [(p.text, p.spans, p.kind, p.answers) for p in read] == [
            (p.text, p.spans, p.kind, p.answers) for p in world.probes()[kind]
        ]
    # A world without some kinds takes the other's files away, and nothing else.
    EnglishWorld(0, **{**NONE, "num_unchanged": 2}).write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine.txt",
        "old.txt",
        "probes-unchanged.jsonl",
    ]
