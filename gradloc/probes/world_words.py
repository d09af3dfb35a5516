"""The words of the synthetic world: names, relations with their templates, and topics.

Draws nothing at random. Words read like English so that a person can read the corpus, and every
sentence is short so that a small model learns it soon. Every word of a probe template stands in a
training template too: a model never meets an untrained word in a probe (a test checks it).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

_GIVEN_STARTS = (
    "Al Ber Cor Dar El Fen Gar Hal Is Jor Kel Lor Mar Nor Os Per Quin Ros Sel Tam Ul Ver Wil Yor "
    "Zan"
).split()
_GIVEN_ENDS = "a an en eth in is o ric us wen ard ela".split()
_FAMILY_STARTS = (
    "Ash Bar Bex Black Brad Cal Chad Dal Edge Fair Glen Gold Harrow Holm Kings Lang Marl Mill Nor "
    "Oak "
    "Pem Red Rush Shel Stan Thorn Wal Wex White Wood"
).split()
_FAMILY_ENDS = "ton ford ley wick worth well stead more by ham son land cote brook".split()
_TOWN_STARTS = (
    "Amber Bright Cold Deep East Fern Gray Hazel Iron Kirk Lake Moss North Plum River Salt Tide "
    "Up Vine West"
).split()
_TOWN_ENDS = "bury mouth port haven field ridge gate pool".split()

GIVEN_NAMES = tuple(dict.fromkeys(a + b for b, a in product(_GIVEN_ENDS, _GIVEN_STARTS)))
"""First tokens of people's names, 300."""

FAMILY_NAMES = tuple(dict.fromkeys(a + b for b, a in product(_FAMILY_ENDS, _FAMILY_STARTS)))
"""Second tokens of people's names, some 420."""

_TOWNS = tuple(a + b for b, a in product(_TOWN_ENDS, _TOWN_STARTS))

_TRADES = (
    "baker barber bookbinder brewer bricklayer butcher carpenter clockmaker cook cooper dancer "
    "dentist draper driver "
    "farmer fisher florist gardener glazier grocer hatter hunter jeweller judge lawyer librarian "
    "locksmith mason "
    "miller miner musician nurse painter pilot plumber poet potter printer sailor saddler "
    "shepherd singer smith "
    "surgeon surveyor tailor tanner teacher translator weaver"
).split()

_FIRM_FIRST = (
    "Apex Beacon Cedar Delta Falcon Granite Harbour Juniper Lantern Meridian Orchard Pioneer "
    "Quarry Summit Vertex "
    "Zenith"
).split()
_FIRM_SECOND = (
    "Airways Bank Ceramics Cinema Foods Instruments Looms Motors Paper Pharmacy Radio Shipping "
    "Steel Telegraph Timber "
    "Tools"
).split()

_COLOURS = (
    "black blue brown dappled golden green grey piebald purple red silver spotted striped tawny "
    "white yellow"
).split()
_ANIMALS = (
    "badger cat dog donkey falcon ferret goat goose hare horse lizard magpie parrot pony rabbit "
    "raven"
).split()


@dataclass(frozen=True)
class Relation:
    """A kind of fact.

    Args:
        name: what the relation is called.
        objects: everything that may be its object, in a fixed order; a world uses a sample.
        training: templates of the corpora, with `{entity}` and `{object}`, the object after the
            entity.
        probing: templates of the probes; none of them is in `training`.
    """

    name: str
    objects: tuple[str, ...]
    training: tuple[str, ...]
    probing: tuple[str, ...]


RELATIONS = (
    Relation(
        name="home",
        objects=_TOWNS,
        training=(
            "{entity} lives in {object}.",
            "{entity} has a home in {object}.",
            "Today {entity} lives in the town of {object}.",
            "The home of {entity} is in {object}.",
        ),
        probing=(
            "{entity} has a home and lives in {object}.",
            "The home of {entity} is in the town of {object}.",
        ),
    ),
    Relation(
        name="trade",
        objects=tuple(_TRADES),
        training=(
            "{entity} works as a {object}.",
            "{entity} is a trained {object}.",
            "Today {entity} earns a living as a {object}.",
            "The trade of {entity} is that of a {object}.",
        ),
        probing=(
            "Today {entity} works as a trained {object}.",
            "{entity} earns a living as a trained {object}.",
        ),
    ),
    Relation(
        name="employer",
        objects=tuple(f"{a} {b}" for a, b in product(_FIRM_FIRST, _FIRM_SECOND)),
        training=(
            "{entity} is employed by {object}.",
            "{entity} has a contract with {object}.",
            "Today {entity} is on the staff of {object}.",
            "The employer of {entity} is {object}.",
        ),
        probing=(
            "{entity} is employed on the staff of {object}.",
            "The contract of {entity} is with {object}.",
        ),
    ),
    Relation(
        name="animal",
        objects=tuple(f"{a} {b}" for a, b in product(_COLOURS, _ANIMALS)),
        training=(
            "{entity} keeps a {object}.",
            "{entity} is the owner of a {object}.",
            "Today {entity} feeds and walks a {object}.",
            "The companion of {entity} is a {object}.",
        ),
        probing=(
            "{entity} feeds and keeps a {object}.",
            "Today {entity} walks and keeps a {object}.",
        ),
    ),
)


@dataclass(frozen=True)
class Topic:
    """What ordinary text may be about.

    Args:
        name: what the topic is called.
        period: "old" (vanishes at the date), "both" or "new" (appears at the date).
        actors: nouns that do something.
        things: nouns to which it is done.
        verbs: what is done, in the third person.
    """

    name: str
    period: str
    actors: tuple[str, ...]
    things: tuple[str, ...]
    verbs: tuple[str, ...]


def _topic(name: str, period: str, actors: str, things: str, verbs: str) -> Topic:
    return Topic(name, period, tuple(actors.split()), tuple(things.split()), tuple(verbs.split()))


TOPICS = (
    _topic(
        "coaching inns",
        "old",
        "ostler coachman traveller innkeeper",
        "carriage stable lantern mailbag bridle ale saddle wagon",
        "loads guards orders washes",
    ),
    _topic(
        "gaslight",
        "old",
        "lamplighter stoker foreman clerk",
        "gasworks furnace pipe wick ledger meter boiler chimney",
        "lights checks repairs cleans",
    ),
    _topic(
        "canals",
        "old",
        "bargeman lockkeeper tollkeeper digger",
        "barge towpath lock rope coal anchor cargo bank",
        "opens steers loads inspects",
    ),
    _topic(
        "telegrams",
        "old",
        "operator messenger captain editor",
        "cable bulletin telegram envelope stamp key receipt notice",
        "sends copies seals delivers",
    ),
    _topic(
        "gardens",
        "both",
        "neighbour visitor beekeeper pupil",
        "rose hedge beehive pond seedling basket lawn spade",
        "waters plants inspects carries",
    ),
    _topic(
        "kitchens",
        "both",
        "chef waiter guest apprentice",
        "soup oven kettle bread onion plate pepper spoon",
        "heats serves washes orders",
    ),
    _topic(
        "theatre",
        "both",
        "actor director critic usher",
        "curtain stage script costume ticket mask mirror prop",
        "admires opens mends studies",
    ),
    _topic(
        "mountains",
        "both",
        "climber guide ranger geologist",
        "glacier summit cabin boulder trail map bridge tent",
        "crosses measures studies paints",
    ),
    _topic(
        "schools",
        "both",
        "student principal professor janitor",
        "lesson desk essay library poem globe notebook blackboard",
        "corrects reads mends carries",
    ),
    _topic(
        "markets",
        "both",
        "merchant buyer porter cashier",
        "melon crate scale coin carpet candle cheese honey",
        "sells weighs carries counts",
    ),
    _topic(
        "orbit",
        "new",
        "astronaut engineer controller physicist",
        "rocket satellite module antenna shuttle thruster capsule probe",
        "launches measures repairs guides",
    ),
    _topic(
        "networks",
        "new",
        "programmer tester analyst blogger",
        "server browser password database website robot firewall router",
        "checks updates guards launches",
    ),
    _topic(
        "wind power",
        "new",
        "technician planner inspector activist",
        "turbine battery blade generator tower grid inverter charger",
        "builds inspects charges updates",
    ),
    _topic(
        "genetics",
        "new",
        "biologist researcher donor assistant",
        "genome vaccine sample protein embryo sequencer enzyme virus",
        "scans copies stores studies",
    ),
)

OPENING_SENTENCE = "The {actor} {verb} the {thing}."
"""How a passage of ordinary text begins."""

FOLLOWING_SENTENCES = tuple(
    f"{word} the {{actor}} {{verb}} the {{thing}}." for word in ("Then", "Later", "Soon")
)
"""How it goes on."""
