"""TemporalWorld: a small invented world that changes at a date, made from a seed.

It gives corpora, ordinary text and probes, to try everything with nothing but the package. It
trains nothing. Its entities and facts are drawn in `world_facts`, its words stand in `world_words`,
its ordinary text is written by `world_text`.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradloc.files import write_text
from gradloc.probes.probe import Probe, insert_answer
from gradloc.probes.spans import write_spans
from gradloc.probes.world_facts import Fact, draw_facts, draw_names
from gradloc.probes.world_text import PERIODS, passage, topics_of
from gradloc.probes.world_words import (
    FOLLOWING_SENTENCES,
    OPENING_SENTENCE,
    RELATIONS,
    TOPICS,
    Relation,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SENTENCES_A_DOCUMENT = (3, 5)


class TemporalWorld:
    """Entities with facts, of which a share changes at a date at which some entities also appear.

    The defaults are a world that a GPT-2 of four layers learns in two minutes on one thread: 60
    entities with four facts each, of which 72 of the 240 change, 20 entities that appear, names of
    two tokens. Every token of a name or an object occurs in the old facts, so that a new fact is
    new by what it says, not by its words; only ordinary text has new words, those of the new
    topics. The same arguments give the same bytes, on every machine.

    Args:
        seed: what everything is drawn from.
        num_entities: entities from before the date, at least 2.
        num_new_entities: entities that appear at the date.
        num_objects: objects a relation, from 2 to 50. No more are used than there are entities, so
            that each occurs.
        share_changed: the share of the old entities' facts that change, from 0 to 1.

    Raises:
        ValueError: a number is out of its range, or there are too few names for so many entities.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        num_entities: int = 60,
        num_new_entities: int = 20,
        num_objects: int = 24,
        share_changed: float = 0.3,
    ) -> None:
        most_objects = min(len(relation.objects) for relation in RELATIONS)
        if num_entities < 2:
            raise ValueError(f"num_entities={num_entities}: must be at least 2")
        if num_new_entities < 0:
            raise ValueError(f"num_new_entities={num_new_entities}: must be at least 0")
        if not 2 <= num_objects <= most_objects:
            raise ValueError(f"num_objects={num_objects}: must be from 2 to {most_objects}")
        if not 0 <= share_changed <= 1:
            raise ValueError(f"share_changed={share_changed}: must be from 0 to 1")
        self.seed = seed
        self.relations: tuple[Relation, ...] = RELATIONS
        names = draw_names(num_entities, num_new_entities, self._draw("names"))
        self.entities: tuple[str, ...] = tuple(names[:num_entities])
        """Names of the entities from before the date."""
        self.new_entities: tuple[str, ...] = tuple(names[num_entities:])
        """Names of those that appear at it."""
        self.objects: dict[str, tuple[str, ...]] = {
            relation.name: tuple(
                self._draw(f"objects/{relation.name}").sample(
                    relation.objects, min(num_objects, num_entities)
                )
            )
            for relation in self.relations
        }
        """Relation name -> the objects that occur with it."""
        self.facts: tuple[Fact, ...] = tuple(
            draw_facts(self.entities, self.new_entities, self.objects, share_changed, self._draw)
        )
        """Every fact, those of old entities first."""

    def old_corpus(
        self,
        num_tokens: int = 1_200_000,
        *,
        share_facts: float = 0.6,
        seed: int = 0,
        facts: Collection[Fact] | None = None,
    ) -> list[str]:
        """Text from before the date: all facts as they then are, among ordinary text.

        Args:
            num_tokens: words and punctuation marks, at least; exceeded by less than a document.
            share_facts: the share of tokens in fact sentences.
            seed: another seed gives other text about the same world.
            facts: write about these only, such as those that a method may replay; None: all.

        Returns:
            Documents of three to five sentences, in random order. Only training templates are used.

        Raises:
            ValueError: a number is out of its range.
        """
        draw = self._draw(f"corpus/old/{seed}")
        chosen = self.facts if facts is None else facts
        statements = [(fact, fact.old) for fact in chosen if fact.old is not None]
        return self._corpus(num_tokens, {"facts": (share_facts, statements)}, "old", draw)

    def new_corpus(
        self,
        num_tokens: int = 120_000,
        *,
        share_updated: float = 0.25,
        share_new: float = 0.25,
        share_unchanged: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Text from after the date: changed facts and new entities among text with the new topics.

        Args:
            num_tokens: words and punctuation marks, at least; exceeded by less than a document.
            share_updated: the share of tokens in sentences about facts that have changed.
            share_new: the same for new entities.
            share_unchanged: the same for facts that hold as before. 0, as in a corpus of news, puts
                them at risk of being forgotten.
            seed: another seed gives other text about the same world.

        Returns:
            Documents of three to five sentences, in random order. Only training templates are used.

        Raises:
            ValueError: a number is out of its range, or there are no facts of a kind that has a
                share.
        """
        draw = self._draw(f"corpus/new/{seed}")
        shares = {"updated": share_updated, "new": share_new, "unchanged": share_unchanged}
        sources = {
            kind: (share, [(fact, fact.new) for fact in self.facts if fact.kind == kind])
            for kind, share in shares.items()
        }
        return self._corpus(num_tokens, sources, "new", draw)

    def text(self, period: str, num_documents: int = 200, *, seed: int = 0) -> list[str]:
        """Ordinary text without facts, drawn apart from the corpora's, to measure on.

        Args:
            period: "old" for the topics from before the date, "new" for those after it.
            num_documents: its length.
            seed: another seed gives other text.

        Raises:
            ValueError: the period is neither, or num_documents below 1.
        """
        topics = topics_of(period)
        if num_documents < 1:
            raise ValueError(f"num_documents={num_documents}: must be at least 1")
        draw = self._draw(f"text/{period}/{seed}")
        return [
            passage(topics, draw.randint(*_SENTENCES_A_DOCUMENT), draw)
            for _ in range(num_documents)
        ]

    def probes(self) -> dict[str, list[Probe]]:
        """Probes of what holds after the date, a fact and probe template each.

        Returns:
            "updated", "new" and "unchanged" facts with their present objects, and "outdated": the
            updated facts with the objects that they had before. A kind without facts has no probes.
        """
        groups: dict[str, list[Probe]] = {"updated": [], "new": [], "unchanged": [], "outdated": []}
        for fact in self.facts:
            groups[fact.kind] += self._probes_of(fact, fact.new, fact.kind)
            if fact.kind == "updated" and fact.old is not None:
                groups["outdated"] += self._probes_of(fact, fact.old, "outdated")
        return groups

    def old_probes(self) -> list[Probe]:
        """Probes of all facts as before the date, kind "old": what a base model should know."""
        return [
            probe
            for fact in self.facts
            if fact.old is not None
            for probe in self._probes_of(fact, fact.old, "old")
        ]

    def source_of(self, fact: Fact) -> str:
        """What the probes of a fact have as their source, so that they can be told together."""
        return f"world:{self.seed}:{fact.entity}/{fact.relation}"

    def prompts(self, facts: Iterable[Fact]) -> list[str]:
        """Beginnings of training sentences about facts, up to the object: for a model to go on.

        Templates in which the object comes before the entity give none.
        """
        prompts = []
        for fact in facts:
            relation = next(one for one in self.relations if one.name == fact.relation)
            for template in relation.training:
                before, _ = template.split("{object}")
                if "{entity}" in before:
                    prompts.append(before.format(entity=fact.entity).strip())
        return prompts

    def vocabulary(self) -> list[str]:
        """Every word and punctuation mark that the world can write, sorted."""
        words = set()
        for relation in self.relations:
            for template in relation.training + relation.probing:
                words.update(_words(template.format(entity="", object="")))
            for text in self.objects[relation.name]:
                words.update(_words(text))
        for topic in TOPICS:
            words.update(topic.actors + topic.things + topic.verbs)
        for sentence in (OPENING_SENTENCE, *FOLLOWING_SENTENCES):
            words.update(_words(sentence.format(actor="", verb="", thing="")))
        for name in self.entities + self.new_entities:
            words.update(_words(name))
        return sorted(words)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Make a tokenizer with a token for every word.

        `<pad>` is 0, `<eos>` (also the bos) 1, `<unk>` 2; words follow, sorted.
        """
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace
        from transformers import PreTrainedTokenizerFast

        tokens = ["<pad>", "<eos>", "<unk>", *self.vocabulary()]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        model.pre_tokenizer = Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=model,
            pad_token="<pad>",
            eos_token="<eos>",
            bos_token="<eos>",
            unk_token="<unk>",
            clean_up_tokenization_spaces=False,
        )

    def write(
        self,
        folder: str | os.PathLike[str],
        *,
        old_tokens: int = 1_200_000,
        new_tokens: int = 120_000,
        text_documents: int = 200,
    ) -> list[Path]:
        """Write corpora and text (a document a line) and probe files, each whole or not at all.

        Args:
            folder: made if missing. `old.txt`, `new.txt`, `text_old.txt`, `text_new.txt`,
                `probes-updated.jsonl`, `probes-new.jsonl` and `probes-unchanged.jsonl` in it are
                replaced, other files stay.
            old_tokens: length of the old corpus.
            new_tokens: length of the new corpus.
            text_documents: length of each file of ordinary text.

        Returns:
            The files written. Where the world has no facts of a kind, its probe file is absent.

        Raises:
            OSError: the folder cannot be written.
            ValueError: a length below 1.
        """
        target = Path(folder)
        corpora = {"old.txt": self.old_corpus(old_tokens)}
        kinds = {fact.kind for fact in self.facts}
        corpora["new.txt"] = self.new_corpus(
            new_tokens,
            share_updated=0.25 if "updated" in kinds else 0.0,
            share_new=0.25 if "new" in kinds else 0.0,
        )
        for period in PERIODS:
            corpora[f"text_{period}.txt"] = self.text(period, text_documents)
        written = []
        for name, documents in corpora.items():
            write_text(target / name, "".join(document + "\n" for document in documents))
            written.append(target / name)
        for kind in ("updated", "new", "unchanged"):
            path = target / f"probes-{kind}.jsonl"
            probes = self.probes()[kind]
            if probes:
                write_spans(path, probes)
                written.append(path)
            else:
                # Another world's probes, written here before, must not pass for this one's.
                path.unlink(missing_ok=True)
        return written

    def _draw(self, purpose: str) -> random.Random:
        # A seed of text is hashed the same way everywhere; a purpose each keeps draws independent.
        return random.Random(f"gradloc world {self.seed} {purpose}")

    def _corpus(
        self,
        num_tokens: int,
        sources: dict[str, tuple[float, list[tuple[Fact, str]]]],
        period: str,
        draw: random.Random,
    ) -> list[str]:
        if num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens}: must be at least 1")
        shares: dict[str, float] = {}
        writers: dict[str, Callable[[int], str]] = {}
        for name, (share, statements) in sources.items():
            if not 0 <= share <= 1:
                raise ValueError(f"share_{name}={share}: must be from 0 to 1")
            if share and not statements:
                raise ValueError(
                    f"share_{name}={share}, but the world has no such facts: give it 0"
                )
            if share:
                shares[name] = share
                writers[name] = self._fact_writer(statements, draw)
        shares["text"] = 1 - sum(shares.values())
        if shares["text"] < -1e-9:
            raise ValueError(f"the shares of facts sum to {1 - shares['text']}: at most 1")
        topics = topics_of(period)
        writers["text"] = lambda num_sentences: passage(topics, num_sentences, draw)

        documents = []
        written = dict.fromkeys(shares, 0)
        total = 0
        while total < num_tokens:
            # What lies furthest behind its share is next: shares are met to within a document.
            name = max(shares, key=lambda name: shares[name] * (total + 1) - written[name])
            document = writers[name](draw.randint(*_SENTENCES_A_DOCUMENT))
            length = len(_words(document))
            written[name] += length
            total += length
            documents.append(document)
        draw.shuffle(documents)
        return documents

    def _fact_writer(
        self, statements: Sequence[tuple[Fact, str]], draw: random.Random
    ) -> Callable[[int], str]:
        """Give a function that writes documents of facts, every fact once before any again."""
        templates = {relation.name: relation.training for relation in self.relations}

        def endless() -> Iterator[str]:
            deck = list(statements)
            while True:
                draw.shuffle(deck)
                for fact, thing in deck:
                    template = draw.choice(templates[fact.relation])
                    yield template.format(entity=fact.entity, object=thing)

        sentences = endless()
        return lambda num_sentences: " ".join(next(sentences) for _ in range(num_sentences))

    def _probes_of(self, fact: Fact, thing: str, kind: str) -> list[Probe]:
        relation = next(one for one in self.relations if one.name == fact.relation)
        probes = []
        for template in relation.probing:
            query = template.format(entity=fact.entity, object="_X_")
            before, after = query.split("_X_")
            text, span = insert_answer(before, thing, after)
            probes.append(Probe(text, (span,), kind, self.source_of(fact), query=query))
        return probes


def _words(text: str) -> list[str]:
    """Split as the tokenizer does: words and runs of punctuation."""
    return re.findall(r"\w+|[^\w\s]+", text)
