"""Entities and facts of the synthetic world, drawn from a seed.

Writes no text: that is the business of `world`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from gradloc.probes.world_words import FAMILY_NAMES, GIVEN_NAMES


@dataclass(frozen=True)
class Fact:
    """What holds of an entity before and after the date.

    Args:
        entity: its name.
        relation: the name of the relation.
        old: the object before the date; None for an entity that appears at it.
        new: the object after the date.
    """

    entity: str
    relation: str
    old: str | None
    new: str

    @property
    def kind(self) -> str:
        """Say what the date does to the fact: "new", "updated" or "unchanged"."""
        if self.old is None:
            return "new"
        return "unchanged" if self.old == self.new else "updated"


def draw_names(num_old: int, num_new: int, draw: random.Random) -> list[str]:
    """Draw distinct names of two tokens, every token of a new entity's name also in an old one's.

    A token then belongs to several names, so that both tokens are needed to know the entity.
    """
    total = num_old + num_new
    num_given = min(len(GIVEN_NAMES), num_old)
    num_family = min(len(FAMILY_NAMES), num_old)
    if num_given * num_family < total:
        reason = (
            f"{num_old} old entities can make known only {num_given * num_family} names"
            if num_old < len(FAMILY_NAMES)
            else f"there are {num_given * num_family} names"
        )
        raise ValueError(
            f"num_entities={num_old} and num_new_entities={num_new} need {total} names, but "
            f"{reason}: choose fewer new entities or another number of old ones"
        )
    # Five times as many names as are needed: few enough that tokens recur in several names, many
    # enough that most pairs of tokens name nobody.
    wanted = math.ceil(math.sqrt(5 * total))
    given = draw.sample(GIVEN_NAMES, min(num_given, max(wanted, math.ceil(total / num_family))))
    family = draw.sample(FAMILY_NAMES, min(num_family, max(wanted, math.ceil(total / len(given)))))
    longest = max(len(given), len(family))
    cover = [(given[index % len(given)], family[index % len(family)]) for index in range(longest)]
    rest = sorted(set(product(given, family)).difference(cover))
    draw.shuffle(rest)
    pairs = cover + rest
    old = pairs[:num_old]
    draw.shuffle(old)
    return [" ".join(pair) for pair in old + pairs[num_old:total]]


def draw_facts(
    entities: Sequence[str],
    new_entities: Sequence[str],
    objects: Mapping[str, Sequence[str]],
    share_changed: float,
    draw_for: Callable[[str], random.Random],
) -> Iterator[Fact]:
    """Deal out objects, change a share of them at the date, and give the new entities theirs.

    Args:
        entities: names of those from before the date.
        new_entities: names of those that appear at it.
        objects: relation name -> what may be its object.
        share_changed: the share of facts that change.
        draw_for: a purpose -> its own source of chance.

    Yields:
        The facts of old entities, relation by relation, then those of new ones.
    """
    before: list[tuple[str, str, str]] = []
    for relation in objects:
        choices = objects[relation]
        # Every object as often as any other, so that none is unknown and none a good guess.
        dealt = [choices[index % len(choices)] for index in range(len(entities))]
        draw_for(f"facts/{relation}").shuffle(dealt)
        before += [(entity, relation, thing) for entity, thing in zip(entities, dealt, strict=True)]
    draw = draw_for("changes")
    changed = set(draw.sample(range(len(before)), round(share_changed * len(before))))
    for index, (entity, relation, thing) in enumerate(before):
        now = thing
        if index in changed:
            now = draw.choice([other for other in objects[relation] if other != thing])
        yield Fact(entity, relation, thing, now)
    draw = draw_for("facts of new entities")
    for relation in objects:
        for entity in new_entities:
            yield Fact(entity, relation, None, draw.choice(objects[relation]))
