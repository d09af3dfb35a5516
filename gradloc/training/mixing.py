"""Which rows a run trains on, in which order: new data, and old data mixed in against forgetting.

Draws rows of data sets that are packed already; reads no corpus, generates no text (that is
`gradloc.training.self_replay`) and trains nothing.
"""

from __future__ import annotations

import itertools
import math
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from fractions import Fraction
from typing import Any

_COLUMNS = ("input_ids", "labels")


@dataclass(frozen=True)
class Replay:
    """Old rows at a fixed ratio, spread as evenly as whole rows can be.

    Args:
        ratio: old rows for every new row, at least 0; 1 alternates new and old. The old rows go
            through fresh permutations, so that none comes twice before all others have come.

    Raises:
        ValueError: a ratio below 0, or not finite.
    """

    ratio: float

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)


@dataclass(frozen=True)
class MixReview:
    """Mix-review (He et al., EACL 2021, arXiv 1910.07117): old rows that get fewer by the epoch.

    Epoch e, counted from 0 over the new data, mixes in `round(ratio · decay^(e // decay_every) ·
    num_new)` old rows, a fresh sample each epoch, shuffled among the new ones. A sample larger than
    the old data is whole passes over it and a fresh sample for the rest.

    Args:
        ratio: old rows for every new row in the first epoch, at least 0.
        decay: factor in [0, 1]; 1 keeps the ratio.
        decay_every: epochs between two decays, at least 1.

    Raises:
        ValueError: a setting out of range.
    """

    ratio: float
    _: KW_ONLY
    decay: float = 0.9
    decay_every: int = 1

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay!r}: give a factor in [0, 1]; 1 is no decay")
        if not isinstance(self.decay_every, int) or self.decay_every < 1:
            raise ValueError(f"decay_every={self.decay_every!r}: a number of epochs, at least 1")

    def num_keep(self, epoch: int, num_new: int) -> int:
        """Old rows in one epoch over `num_new` new rows."""
        return round(self.ratio * self.decay ** (epoch // self.decay_every) * num_new)


@dataclass(frozen=True)
class EpochMix:
    """What one epoch over the new data holds.

    Args:
        num_new: new rows.
        num_keep: old rows.
    """

    num_new: int
    num_keep: int


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedRows:
    """A map-style dataset: rows in the order in which they are to be trained on.

    Train on it with `TrainConfig(shuffle=False)`, or the order is lost. `mixed_rows` makes it.

    Args:
        new: the new rows.
        keep: the old rows.
        order: for each row its index in `new`, or `-1 - index` for a row of `keep`.
        epochs: what is in each epoch; the last one may be cut short.
    """

    new: Any = field(repr=False)
    keep: Any = field(repr=False)
    order: array[int] = field(repr=False)
    epochs: tuple[EpochMix, ...]

    @property
    def num_new_rows(self) -> int:
        """New rows in all epochs, counted as often as they come."""
        return sum(epoch.num_new for epoch in self.epochs)

    @property
    def num_keep_rows(self) -> int:
        """Old rows in all epochs, counted as often as they come."""
        return sum(epoch.num_keep for epoch in self.epochs)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        at = self.order[index]
        row = self.new[at] if at >= 0 else self.keep[-1 - at]
        return {name: row[name] for name in _COLUMNS}


def mixed_rows(
    new: Any, keep: Any, *, mix: Replay | MixReview | None, num_rows: int, seed: int
) -> MixedRows:
    """Put new and old rows into the order of a run.

    An epoch is one pass over the new rows, a fresh permutation each time. Their order depends on
    `seed` only: with another mix the same new rows come in the same order, with others between
    them, so that runs can be compared in pairs. A ratio of 0 gives what `mix=None` gives.

    Args:
        new: rows with `input_ids` and `labels`: a `datasets.Dataset` or a sequence of dicts.
        keep: old rows, of the same kind and length; may be None or empty where none are drawn.
        mix: how many old rows go where; None: none.
        num_rows: rows in all, new and old; the last epoch ends there.
        seed: of every draw. The global random state is neither read nor changed.

    Returns:
        `num_rows` rows.

    Raises:
        ValueError: no new rows, a ratio above 0 and no old rows, rows that lack a column or differ
            in length (the first new and the first old one are looked at), or `num_rows` below 1.
    """
    num_keep = 0 if keep is None else len(keep)
    if num_rows < 1:
        raise ValueError(f"num_rows={num_rows!r}: at least 1 row is trained on")
    if len(new) == 0:
        raise ValueError("new is empty: give at least one row to train on")
    if mix is not None and mix.ratio > 0 and num_keep == 0:
        raise ValueError(
            f"mix={mix!r} needs old rows and keep has none: give some, let the model generate them "
            "(gradloc.training.self_replay), or take ratio=0"
        )
    _check_rows(new, keep if num_keep else None)

    if isinstance(mix, MixReview):
        epochs = _mix_review_epochs(len(new), num_keep, mix, seed)
    else:
        epochs = _replay_epochs(len(new), num_keep, Replay(0) if mix is None else mix, seed)
    order = array("q")
    counts = []
    for epoch in epochs:
        part = epoch[: num_rows - len(order)]
        order.extend(part)
        drawn = sum(at < 0 for at in part)
        counts.append(EpochMix(len(part) - drawn, drawn))
        if len(order) == num_rows:
            break
    return MixedRows(new=new, keep=keep, order=order, epochs=tuple(counts))


def _replay_epochs(num_new: int, num_keep: int, mix: Replay, seed: int) -> Iterator[list[int]]:
    # The fraction that was meant: sums of 0.1 or 1/3 must not come out just below a whole row.
    ratio = Fraction(mix.ratio).limit_denominator(10**6)
    old = _old_rows_for_ever(num_keep, seed)
    seen = 0  # new rows of all epochs so far: the fraction left over goes on into the next epoch
    for epoch in itertools.count():
        order = []
        for at in _new_rows(num_new, seed, epoch):
            order.append(at)
            due = math.floor(ratio * (seen + 1)) - math.floor(ratio * seen)
            order.extend(itertools.islice(old, due))
            seen += 1
        yield order


def _mix_review_epochs(
    num_new: int, num_keep: int, mix: MixReview, seed: int
) -> Iterator[list[int]]:
    for epoch in itertools.count():
        count = mix.num_keep(epoch, num_new)
        # A stream of its own for the old rows: drawing more or fewer does not move the new ones.
        draw = random.Random(f"gradloc mix-review {seed} {epoch}")
        passes, rest = divmod(count, num_keep) if count else (0, 0)
        sample = [*range(num_keep)] * passes + draw.sample(range(num_keep), rest)
        draw.shuffle(sample)
        is_old = [True] * count + [False] * num_new
        draw.shuffle(is_old)
        new, old = iter(_new_rows(num_new, seed, epoch)), iter(sample)
        yield [-1 - next(old) if flag else next(new) for flag in is_old]


def _new_rows(num_new: int, seed: int, epoch: int) -> list[int]:
    return _permutation(num_new, f"gradloc new rows {seed} {epoch}")


def _old_rows_for_ever(num_keep: int, seed: int) -> Iterator[int]:
    """Old rows as they stand in `MixedRows.order`, one permutation after another."""
    for turn in itertools.count():
        yield from (-1 - at for at in _permutation(num_keep, f"gradloc old rows {seed} {turn}"))


def _permutation(count: int, seed: str) -> list[int]:
    # Seeding by a string mixes all of it (sha512), so that neighbouring epochs are unrelated.
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _check_ratio(ratio: float) -> None:
    if not (math.isfinite(ratio) and ratio >= 0):
        raise ValueError(f"ratio={ratio!r}: old rows for every new row, at least 0")


def _check_rows(new: Sequence[Any], keep: Sequence[Any] | None) -> None:
    lengths = {}
    for name, rows in (("new", new), ("keep", keep)):
        if rows is None:
            continue
        missing = [column for column in _COLUMNS if column not in rows[0]]
        if missing:
            raise ValueError(
                f"the rows of {name} have no {' and no '.join(missing)}: give packed rows, such as "
                "gradloc.training.corpus.packed_corpus makes"
            )
        lengths[name] = len(rows[0]["input_ids"])
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"the rows of new are {lengths['new']} tokens long and those of keep "
            f"{lengths['keep']}: pack both with the same block_size"
        )
