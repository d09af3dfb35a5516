"""Ordinary text of the synthetic world: short passages that stay on a topic.

Facts are the business of `world`. Each actor prefers a verb, and each actor with a verb prefers a
thing, so that there is something to learn; a passage stays on its topic, so that what came before
helps too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from gradloc.probes.world_words import FOLLOWING_SENTENCES, OPENING_SENTENCE, TOPICS, Topic

PERIODS = ("old", "new")

_PREFERENCE = 0.6
"""How often the preferred verb or thing is taken; otherwise any is, so that text keeps surprise."""


def topics_of(period: str) -> tuple[Topic, ...]:
    """The topics that are written about before ("old") or after ("new") the date.

    Raises:
        ValueError: the period is neither.
    """
    if period not in PERIODS:
        raise ValueError(f"period={period!r}: choose from {', '.join(PERIODS)}")
    return tuple(topic for topic in TOPICS if topic.period in (period, "both"))


def passage(topics: Sequence[Topic], num_sentences: int, draw: random.Random) -> str:
    """Write a passage about one of the topics.

    Args:
        topics: what to choose the topic from.
        num_sentences: its length, at least 1.
        draw: the source of chance.
    """
    topic = draw.choice(topics)
    sentences: list[str] = []
    for _ in range(num_sentences):
        actor = draw.randrange(len(topic.actors))
        verb = _usually(actor + 1, len(topic.verbs), draw)
        thing = _usually(3 * actor + 5 * verb, len(topic.things), draw)
        pattern = draw.choice(FOLLOWING_SENTENCES) if sentences else OPENING_SENTENCE
        sentences.append(
            pattern.format(
                actor=topic.actors[actor], verb=topic.verbs[verb], thing=topic.things[thing]
            )
        )
    return " ".join(sentences)


def _usually(preferred: int, num_choices: int, draw: random.Random) -> int:
    if draw.random() < _PREFERENCE:
        return preferred % num_choices
    return draw.randrange(num_choices)
