"""EnglishWorld: real countries of which some facts change at a date at which others appear.

It gives corpora and probes in plain English for models that already know the world, with any fast
tokenizer. It trains nothing and asks no model (`english_ask` does); its facts stand in
`english_facts`, its wording in `english_words`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from gradloc.files import write_text
from gradloc.probes.english_deal import Deck, EnglishFact, deal_entities, deal_facts
from gradloc.probes.english_facts import FactKey, other_spellings, real_facts
from gradloc.probes.english_words import ENGLISH_RELATIONS, INVENTED_COUNTRIES, EnglishRelation
from gradloc.probes.probe import Probe, insert_answer
from gradloc.probes.spans import write_spans

_SENTENCES_A_DOCUMENT = (3, 4)


class EnglishWorld:
    """Facts about countries, dealt out by country so that none tells of another kind's.

    Some real countries get another object for each of their facts (*updated*), invented ones appear
    (*new*), and the facts of other real ones hold as before: those that may be replayed (*keep*),
    those on which interpolation weights and the like are chosen (*validation*), and those that are
    only ever measured (*unchanged*). The objects of updated and new facts are real ones of the same
    relation, dealt out evenly and never a fact's own: what is new is the link and not a word. No
    country of any kind has another's name in its own. The same arguments give the same bytes on
    every machine.

    Args:
        seed: what everything is drawn from.
        num_updated: real countries whose facts change.
        num_new: invented countries.
        num_keep: real countries whose facts may be replayed.
        num_validation: real countries to choose settings on.
        num_unchanged: real countries that are only measured.
        facts: (country, relation) -> object, of relations in `ENGLISH_RELATIONS`; None takes
            `real_facts()`. Give some of these to do with fewer relations.
        known: the facts that a model answers right, as `ask` returns them: only these are used for
            updated, keep, validation and unchanged, a country counting if any of its facts is
            known. None: all facts. What is not in `facts` is passed over.

    Raises:
        ValueError: a number is negative, a relation unknown or with a single object, or there are
            too few countries (with what to do).
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        num_updated: int = 40,
        num_new: int = 40,
        num_keep: int = 20,
        num_validation: int = 20,
        num_unchanged: int = 40,
        facts: Mapping[FactKey, str] | None = None,
        known: Collection[FactKey] | None = None,
    ) -> None:
        wanted = {
            "updated": num_updated,
            "new": num_new,
            "keep": num_keep,
            "validation": num_validation,
            "unchanged": num_unchanged,
        }
        for kind, number in wanted.items():
            if number < 0:
                raise ValueError(f"num_{kind}={number}: must be at least 0")
        if num_new > len(INVENTED_COUNTRIES):
            raise ValueError(f"num_new={num_new}: at most {len(INVENTED_COUNTRIES)}, the names")
        self.seed = seed
        self.real_facts: dict[FactKey, str] = dict(real_facts() if facts is None else facts)
        """Every real fact that can be taught: (country, relation) -> object before the date."""
        self.relations: tuple[EnglishRelation, ...] = _relations(self.real_facts)
        self.objects: dict[str, tuple[str, ...]] = {
            relation.name: tuple(
                sorted({o for (_, name), o in self.real_facts.items() if name == relation.name})
            )
            for relation in self.relations
        }
        """Relation name -> the objects that occur with it, sorted."""
        for name, objects in self.objects.items():
            if len(objects) < 2 and num_updated + num_new:
                raise ValueError(
                    f"facts has a single object of relation {name!r} ({objects[0]!r}), which "
                    "cannot change: give facts with two or more, or none of that relation"
                )
        usable = self.real_facts
        if known is not None:
            # As tuples: a file may have given lists.
            given = {(entity, relation) for entity, relation in known}
            usable = {key: thing for key, thing in usable.items() if key in given}
        self.entities: dict[str, tuple[str, ...]] = deal_entities(
            self.real_facts, usable, wanted, self._draw
        )
        """Kind -> names of its countries."""
        self.facts: tuple[EnglishFact, ...] = tuple(
            deal_facts(self.entities, usable, self.objects, self._draw)
        )
        """Every fact of these countries, kind by kind."""

    def old_corpus(self, num_sentences: int, *, seed: int = 0) -> list[str]:
        """Text from before the date about all real facts, to teach them to a small model.

        It does not depend on `known`: a model can be taught, asked, and then given its own world.

        Args:
            num_sentences: the length; each fact is stated once before any is stated again.
            seed: another seed gives other text about the same facts.

        Returns:
            Documents of three or four sentences, of training templates only; the last one holds
            what is left.

        Raises:
            ValueError: num_sentences below 1.
        """
        return self._corpus(num_sentences, list(self.real_facts.items()), f"old/{seed}")

    def new_corpus(self, num_sentences: int, *, seed: int = 0) -> list[str]:
        """Text from after the date: updated and new facts, as `old_corpus` does the old ones.

        Raises:
            ValueError: num_sentences below 1, or the world has no such facts.
        """
        return self._corpus(num_sentences, self._statements("updated", "new"), f"new/{seed}")

    def keep_corpus(self, num_sentences: int, *, seed: int = 0) -> list[str]:
        """Text about the facts that may be replayed, as `old_corpus` does all of them.

        Raises:
            ValueError: num_sentences below 1, or the world has no such facts.
        """
        return self._corpus(num_sentences, self._statements("keep"), f"keep/{seed}")

    def probes(self) -> dict[str, list[Probe]]:
        """Probes of what holds after the date, a fact and probing template each.

        Returns:
            Kind -> probes, a fact's together: "updated", "new", "keep", "validation", "unchanged",
            and "outdated": the updated facts with the objects that they had before. The `source`
            names the fact ("english:0:Peru/capital"); `answers` are other spellings.
        """
        groups: dict[str, list[Probe]] = {kind: [] for kind in (*self.entities, "outdated")}
        for fact in self.facts:
            groups[fact.kind] += self._probes_of(fact.key, fact.new, fact.kind)
            if fact.kind == "updated" and fact.old is not None:
                groups["outdated"] += self._probes_of(fact.key, fact.old, "outdated")
        return groups

    def old_probes(self) -> list[Probe]:
        """Probes of all real facts as before the date, kind "old": what to `ask` a model."""
        return [
            probe
            for key, thing in self.real_facts.items()
            for probe in self._probes_of(key, thing, "old")
        ]

    def prompts(self) -> list[str]:
        """The beginnings of sentences about keep facts, up to the object, for a model to finish.

        Returns:
            Distinct texts without a space at the end, of the training templates in which the object
            comes after the country.
        """
        texts = [
            _sentence(template.split("{object}")[0], fact.entity, "").rstrip()
            for fact in self.facts
            if fact.kind == "keep"
            for template in self._relation(fact.relation).training
            if template.index("{entity}") < template.index("{object}")
        ]
        return list(dict.fromkeys(texts))

    def write(
        self,
        folder: str | os.PathLike[str],
        *,
        old_sentences: int = 10_000,
        new_sentences: int = 4_000,
        keep_sentences: int = 4_000,
    ) -> list[Path]:
        """Write corpora (a document a line) and probe files, each whole or not at all.

        Args:
            folder: made if missing. `old.txt`, `new.txt`, `keep.txt` and `probes-KIND.jsonl` for
                every kind that `probes` returns are replaced, other files stay.
            old_sentences: length of the old corpus.
            new_sentences: length of the new corpus.
            keep_sentences: length of the corpus to keep.

        Returns:
            The files written. Where the world has no facts for a file, the file is absent.

        Raises:
            OSError: the folder cannot be written.
            ValueError: a length below 1.
        """
        target = Path(folder)
        kinds = {fact.kind for fact in self.facts}
        corpora = {
            "old.txt": self.old_corpus(old_sentences),
            "new.txt": self.new_corpus(new_sentences) if kinds & {"updated", "new"} else [],
            "keep.txt": self.keep_corpus(keep_sentences) if "keep" in kinds else [],
        }
        written = []
        for name, documents in corpora.items():
            if documents:
                write_text(target / name, "".join(document + "\n" for document in documents))
                written.append(target / name)
        for kind, probes in self.probes().items():
            if probes:
                write_spans(target / f"probes-{kind}.jsonl", probes)
                written.append(target / f"probes-{kind}.jsonl")
        names = [*corpora, *(f"probes-{kind}.jsonl" for kind in self.probes())]
        for path in {target / name for name in names}.difference(written):
            # Another world's file, written here before, must not pass for this one's.
            path.unlink(missing_ok=True)
        return written

    def _draw(self, purpose: str) -> random.Random:
        # A seed of text is hashed the same way everywhere; a purpose each keeps draws independent.
        return random.Random(f"gradloc english {self.seed} {purpose}")

    def _relation(self, name: str) -> EnglishRelation:
        return next(relation for relation in self.relations if relation.name == name)

    def _statements(self, *kinds: str) -> list[tuple[FactKey, str]]:
        statements = [(fact.key, fact.new) for fact in self.facts if fact.kind in kinds]
        if not statements:
            sizes = " and ".join(f"num_{kind}=0" for kind in kinds)
            raise ValueError(f"the world was made with {sizes}: there is nothing to write about")
        return statements

    def _corpus(
        self, num_sentences: int, statements: Sequence[tuple[FactKey, str]], purpose: str
    ) -> list[str]:
        if num_sentences < 1:
            raise ValueError(f"num_sentences={num_sentences}: must be at least 1")
        draw = self._draw(f"corpus/{purpose}")
        deck = Deck(statements, draw)
        documents = []
        while num_sentences > 0:
            length = min(draw.randint(*_SENTENCES_A_DOCUMENT), num_sentences)
            num_sentences -= length
            sentences = []
            for _ in range(length):
                (entity, relation), thing = deck.take()
                template = draw.choice(self._relation(relation).training)
                sentences.append(_sentence(template, entity, thing))
            documents.append(" ".join(sentences))
        return documents

    def _probes_of(self, key: FactKey, thing: str, kind: str) -> list[Probe]:
        entity, relation = key
        probes = []
        for template in self._relation(relation).probing:
            query = _sentence(template, entity, "_X_")
            before, after = query.split("_X_")
            text, span = insert_answer(before, thing, after)
            probes.append(
                Probe(
                    text,
                    (span,),
                    kind,
                    f"english:{self.seed}:{entity}/{relation}",
                    answers=other_spellings(thing),
                    query=query,
                )
            )
        return probes


def _relations(facts: Mapping[FactKey, str]) -> tuple[EnglishRelation, ...]:
    """Those that occur, in the order of the templates."""
    given = {relation for _, relation in facts}
    names = [relation.name for relation in ENGLISH_RELATIONS]
    for name in sorted(given.difference(names)):
        raise ValueError(f"facts has relation={name!r}: choose from {', '.join(names)}")
    if not given:
        raise ValueError("facts is empty: give at least one, or None for real_facts()")
    return tuple(relation for relation in ENGLISH_RELATIONS if relation.name in given)


def _sentence(template: str, entity: str, thing: str) -> str:
    """Fill a template in; a country's article begins a sentence with a capital letter."""
    text = template.format(entity=entity, object=thing)
    return text[:1].upper() + text[1:]
