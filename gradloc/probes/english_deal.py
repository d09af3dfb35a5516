"""Deals countries out to kinds of facts, and gives updated and new facts their objects.

Draws from sources of chance that it is given; writes no text: that is the business of `english`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Generic, TypeVar

from gradloc.probes.english_facts import FactKey
from gradloc.probes.english_words import INVENTED_COUNTRIES

_Card = TypeVar("_Card")

REAL_KINDS = ("updated", "keep", "validation", "unchanged")
"""The kinds of facts about real countries, in the order in which countries are dealt out."""


@dataclass(frozen=True, kw_only=True)
class EnglishFact:
    """What holds of a country before and after the date, and what the fact serves for.

    Args:
        entity: the country, with its article if it has one: "the Netherlands".
        relation: the name of the relation.
        old: the object before the date; None for an invented country.
        new: the object after the date.
        kind: "updated", "new", "keep", "validation" or "unchanged".
    """

    entity: str
    relation: str
    old: str | None
    new: str
    kind: str

    @property
    def key(self) -> FactKey:
        """What the fact is about: (entity, relation)."""
        return self.entity, self.relation


class Deck(Generic[_Card]):
    """Cards in random order, all of them once before any again."""

    def __init__(self, cards: Sequence[_Card], draw: random.Random) -> None:
        self._cards = list(cards)
        self._draw = draw
        self._left: list[_Card] = []

    def take(self, but: _Card | None = None) -> _Card:
        """Take the next card that is not `but`, of which there must be one."""
        while True:
            for index, card in enumerate(self._left):
                if card != but:
                    return self._left.pop(index)
            # What is left is `but` alone: it stays on top, for whoever may have it.
            self._left += self._draw.sample(self._cards, len(self._cards))


def deal_entities(
    real_facts: Mapping[FactKey, str],
    usable: Collection[FactKey],
    wanted: Mapping[str, int],
    draw_for: Callable[[str], random.Random],
) -> dict[str, tuple[str, ...]]:
    """Give every kind its own countries.

    Args:
        real_facts: (country, relation) -> object.
        usable: those of them that may be used; a country counts if it has one.
        wanted: kind -> number of countries.
        draw_for: a purpose -> its own source of chance.

    Returns:
        Kind -> countries, kinds in the order of `wanted`.

    Raises:
        ValueError: there are too few countries.

    A country whose name contains that of another, as Nigeria's does Niger's, is never dealt out: it
    would be taught something whenever the other is.
    """
    countries = {country for country, _ in usable}
    # All are shuffled, known or not, so that models that know much the same get much the same.
    names = list(dict.fromkeys(country for country, _ in real_facts))
    inclusive = _containing_others(names)
    draw_for("countries").shuffle(names)
    names = [name for name in names if name in countries and name not in inclusive]
    needed = sum(wanted[kind] for kind in REAL_KINDS)
    if len(names) < needed:
        sizes = ", ".join(f"num_{kind}={wanted[kind]}" for kind in REAL_KINDS)
        remedy = "give more facts"
        if len(usable) < len(real_facts):
            remedy = (
                f"only {len(usable)} of {len(real_facts)} facts are known. Teach the model first "
                "(train it on old_corpus, then ask it again)"
            )
        raise ValueError(
            f"{sizes} need {needed} real countries, but there are facts to use of {len(names)}: "
            f"{remedy}, or choose smaller numbers"
        )
    dealt = {"new": tuple(draw_for("new countries").sample(INVENTED_COUNTRIES, wanted["new"]))}
    for kind in REAL_KINDS:
        dealt[kind], names = tuple(names[: wanted[kind]]), names[wanted[kind] :]
    return {kind: dealt[kind] for kind in wanted}


def _containing_others(names: Sequence[str]) -> set[str]:
    """The names that have another in them, its article aside, letters as they stand."""
    parts = {name: name.removeprefix("the ") for name in names}
    return {
        name
        for name in names
        for other, part in parts.items()
        if other != name and part in parts[name]
    }


def deal_facts(
    entities: Mapping[str, Sequence[str]],
    usable: Mapping[FactKey, str],
    objects: Mapping[str, Sequence[str]],
    draw_for: Callable[[str], random.Random],
) -> Iterator[EnglishFact]:
    """Give countries their facts, changed and new ones with objects dealt out evenly.

    Args:
        entities: kind -> countries.
        usable: (country, relation) -> object, of real countries.
        objects: relation -> what may be its object.
        draw_for: a purpose -> its own source of chance.

    Yields:
        Kind by kind and country by country, relations in the order of `objects`.
    """
    decks = {name: Deck(stock, draw_for(f"objects/{name}")) for name, stock in objects.items()}
    for kind, countries in entities.items():
        for country, (relation, deck) in product(countries, decks.items()):
            old = usable.get((country, relation))
            if kind == "new":
                new = deck.take()
            elif old is None:
                continue
            else:
                new = deck.take(but=old) if kind == "updated" else old
            yield EnglishFact(entity=country, relation=relation, old=old, new=new, kind=kind)
