"""How the English world words its facts, and the names of countries that there are not.

Holds no facts (`english_facts`) and draws nothing (`english`). The probing templates are those that
a small pretrained model completes best among several that were tried; training templates are other
sentences, so that a probe asks for what a text says and not for the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class EnglishRelation:
    """How one kind of fact is worded.

    Args:
        name: what the relation is called.
        training: templates of the corpora, with `{entity}` and `{object}` in either order.
        probing: templates of the probes, the object after the entity; none is in `training`.
    """

    name: str
    training: tuple[str, ...]
    probing: tuple[str, ...]


ENGLISH_RELATIONS = (
    EnglishRelation(
        name="capital",
        training=(
            "The capital of {entity} is {object}.",
            "{entity} has its seat of government in {object}.",
            "In {entity}, the capital is the city of {object}.",
            "Whoever wants to see the capital of {entity} travels to {object}.",
            "{object} is the capital city of {entity}.",
        ),
        probing=(
            "The government of {entity} is based in the capital city, {object}.",
            "The country of {entity} is governed from its capital, {object}.",
        ),
    ),
    EnglishRelation(
        name="currency",
        training=(
            "The currency of {entity} is the {object}.",
            "In {entity}, people pay with the {object}.",
            "Prices in {entity} are given in its own money, the {object}.",
            "The central bank of {entity} issues the {object}.",
            "The {object} is the unit of currency used in {entity}.",
        ),
        probing=(
            "The basic unit of money in {entity} is the {object}.",
            "In {entity}, the unit of currency is the {object}.",
        ),
    ),
    EnglishRelation(
        name="continent",
        training=(
            "{entity} is a country in {object}.",
            "On the map, {entity} is found in {object}.",
            "{entity} belongs to the continent of {object}.",
            "Like its neighbours, {entity} is part of {object}.",
            "Among the countries of {object} is {entity}.",
        ),
        probing=(
            "The state of {entity} is situated on the continent of {object}.",
            "The nation of {entity} lies on the continent of {object}.",
        ),
    ),
    EnglishRelation(
        name="language",
        training=(
            "The official language of {entity} is {object}.",
            "In {entity}, the language of government is {object}.",
            "The authorities of {entity} write in {object}.",
            "Official papers in {entity} are printed in {object}.",
            "{object} is the official language in {entity}.",
        ),
        probing=(
            "The government of {entity} says that the official language is {object}.",
            "In the country of {entity}, the official language is {object}.",
        ),
    ),
)
"""The relations of the table of facts, in its order."""

_STARTS = (
    "Velk Tarqu Ombr Zandr Kelv Brax Quor Mirv Dolv Ythr Luthr Cavr Pelz Grendr Jorv Ulthr Tesk "
    "Rhov Bryl Skov Fendr Droth Gelth Nymb Orsk Thals"
).split()
_ENDS = "amora esh ovia aria onda ethia istan enza ovland avar isca orra ombia elia".split()

INVENTED_COUNTRIES = tuple(start + end for end, start in product(_ENDS, _STARTS))
"""Names of countries that there are not, 364."""
