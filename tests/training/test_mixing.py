"""gradloc.training.mixing: which rows come in which order, whatever is mixed in."""

import itertools
import math
import pickle
import random
from collections import Counter

import pytest

from gradloc.training.mixing import EpochMix, MixedRows, MixReview, Replay, mixed_rows

MIXES = [
    None,
    Replay(0),
    Replay(0.3),
    Replay(1),
    Replay(2.5),
    MixReview(0),
    MixReview(0.8, decay=0.5),
    MixReview(3.0, decay=0.9, decay_every=2),
]


def rows(count: int, *, old: bool = False) -> list[dict]:
    """Each row is known by its first token: 0, 1, 2 ... for new, 1000, 1001 ... for old ones."""
    first = 1000 if old else 0
    return [{"input_ids": [first + i, 1], "labels": [first + i, 1]} for i in range(count)]


def names(mixed: MixedRows) -> list[int]:
    return [row["input_ids"][0] for row in mixed]


def new_of(order: list[int]) -> list[int]:
    return [name for name in order if name < 1000]


def old_of(order: list[int]) -> list[int]:
    return [name for name in order if name >= 1000]


def by_epoch(mixed: MixedRows) -> list[list[int]]:
    stream = iter(names(mixed))
    parts = [list(itertools.islice(stream, e.num_new + e.num_keep)) for e in mixed.epochs]
    assert next(stream, None) is None
    return parts


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_the_new_rows_come_in_the_same_order_whatever_is_mixed_in(mix):
    alone = names(mixed_rows(rows(10), None, mix=None, num_rows=60, seed=4))
    order = names(mixed_rows(rows(10), rows(7, old=True), mix=mix, num_rows=60, seed=4))
    assert len(order) == 60
    seen = new_of(order)
    assert seen == alone[: len(seen)]
    if mix is None or mix.ratio == 0:
        assert order == alone
    else:
        assert old_of(order)


def test_each_epoch_is_a_fresh_permutation_of_the_new_rows():
    order = names(mixed_rows(rows(10), None, mix=None, num_rows=40, seed=0))
    epochs = [order[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


@pytest.mark.parametrize(
    ("mix", "sizes"),
    [
        (MixReview(2.0, decay=0.5), [20, 10, 5, 2, 1]),
        (MixReview(2.0, decay=0.5, decay_every=2), [20, 20, 10, 10, 5]),
        (MixReview(1.0), [10, 9, 8, 7, 7]),  # 10, 9, 8.1, 7.29, 6.561
        (MixReview(0.7, decay=1.0), [7] * 5),
        (MixReview(1.5, decay=0.0), [15, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_mix_review_decays_by_the_epoch(mix, sizes):
    """In a public port the decay is commented out."""
    keep = rows(7, old=True)
    mixed = mixed_rows(rows(10), keep, mix=mix, num_rows=50 + sum(sizes), seed=1)
    assert mixed.epochs == tuple(EpochMix(10, size) for size in sizes)
    assert (mixed.num_new_rows, mixed.num_keep_rows) == (50, sum(sizes))
    for epoch, size in zip(by_epoch(mixed), sizes, strict=True):
        assert sorted(new_of(epoch)) == list(range(10))
        counts = Counter(old_of(epoch))
        assert counts.total() == size
        # Whole passes over the 7 old rows, and a sample without repetition of the rest.
        assert {counts[1000 + i] for i in range(7)} <= {size // 7, -(-size // 7)}


def test_mix_review_draws_a_fresh_sample_each_epoch_and_shuffles_it_in():
    mix = MixReview(0.5, decay=1.0)
    mixed = mixed_rows(rows(40), rows(100, old=True), mix=mix, num_rows=240, seed=0)
    epochs = by_epoch(mixed)
    samples = [frozenset(old_of(epoch)) for epoch in epochs]
    assert len(set(samples)) == 4
    assert all(len(sample) == 20 for sample in samples)
    for epoch in epochs:
        assert 4 <= len(old_of(epoch[:30])) <= 16
    places = [tuple(name >= 1000 for name in epoch) for epoch in epochs]
    assert len(set(places)) == 4


@pytest.mark.parametrize("ratio", [1, 0.5, 0.25, 2, 1.5, 0.1, 0.29, 1 / 3])
def test_replay_is_spread_evenly(ratio):
    """Also past the ends of epochs: 10 new rows an epoch, 100 in all."""
    keep = rows(5, old=True)
    count = 100 + round(100 * ratio)
    mixed = mixed_rows(rows(10), keep, mix=Replay(ratio), num_rows=count, seed=2)
    num_new = num_old = 0
    for name in names(mixed):
        if name < 1000:
            # What was due to the new rows before this one has come.
            assert num_old == math.floor(ratio * num_new + 1e-9)
            num_new += 1
        else:
            num_old += 1
    assert (num_new, num_old) == (100, math.floor(100 * ratio + 1e-9))
    assert mixed.num_new_rows == num_new


def test_replay_of_ratio_1_alternates():
    order = names(mixed_rows(rows(3), rows(9, old=True), mix=Replay(1), num_rows=20, seed=0))
    assert [name >= 1000 for name in order] == [False, True] * 10


def test_replay_goes_through_fresh_permutations_of_the_old_rows():
    mixed = mixed_rows(rows(10), rows(6, old=True), mix=Replay(1.2), num_rows=66, seed=0)
    old = old_of(names(mixed))
    turns = [tuple(old[start : start + 6]) for start in range(0, 36, 6)]
    assert all(sorted(turn) == list(range(1000, 1006)) for turn in turns)
    assert len(set(turns)) == 6


@pytest.mark.parametrize("mix", MIXES[2:5] + MIXES[6:], ids=str)
def test_the_last_epoch_is_cut_short_and_counted_so(mix):
    whole = mixed_rows(rows(10), rows(7, old=True), mix=mix, num_rows=100, seed=0)
    for count in (1, 5, 10, 29, 64):
        mixed = mixed_rows(rows(10), rows(7, old=True), mix=mix, num_rows=count, seed=0)
        order = names(mixed)
        assert order == names(whole)[:count]
        assert mixed.num_new_rows == len(new_of(order))
        assert mixed.num_keep_rows == len(old_of(order))
        assert len(mixed) == count
        for epoch, counted in zip(by_epoch(mixed), mixed.epochs, strict=True):
            assert (len(new_of(epoch)), len(old_of(epoch))) == (counted.num_new, counted.num_keep)


@pytest.mark.parametrize("mix", [None, Replay(1), MixReview(1.0)], ids=str)
def test_the_seed_alone_decides(mix):
    def order(seed):
        return names(mixed_rows(rows(10), rows(8, old=True), mix=mix, num_rows=30, seed=seed))

    state = random.getstate()
    first = order(0)
    assert random.getstate() == state
    random.seed(1)
    assert order(0) == first
    other = order(1)
    assert new_of(other) != new_of(first)[: len(new_of(other))]
    if mix is not None:
        assert old_of(other) != old_of(first)


def test_data_sets_and_lists_give_the_same_rows_and_nothing_else():
    from datasets import Dataset

    new = [{**row, "source": "x"} for row in rows(4)]
    keep = rows(3, old=True)
    lists = mixed_rows(new, keep, mix=Replay(1), num_rows=10, seed=0)
    stored = mixed_rows(
        Dataset.from_list(new), Dataset.from_list(keep), mix=Replay(1), num_rows=10, seed=0
    )
    assert list(lists) == list(stored) == list(pickle.loads(pickle.dumps(lists)))
    assert set(lists[0]) == {"input_ids", "labels"}
    assert lists[-1] == lists[9]
    with pytest.raises(IndexError):
        lists[10]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Replay(-0.5), r"ratio=-0\.5"),
        (lambda: Replay(math.nan), "ratio=nan"),
        (lambda: MixReview(math.inf), "ratio=inf"),
        (lambda: MixReview(1.0, decay=1.1), r"decay=1\.1"),
        (lambda: MixReview(1.0, decay=-0.1), r"decay=-0\.1"),
        (lambda: MixReview(1.0, decay_every=0), "decay_every=0"),
        (lambda: MixReview(1.0, decay_every=1.5), r"decay_every=1\.5"),
    ],
)
def test_settings_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": 0}, "num_rows=0"),
        ({"new": []}, "new is empty"),
        ({"keep": None}, r"mix=Replay\(ratio=1\) needs old rows"),
        ({"keep": [], "mix": MixReview(1.0)}, r"MixReview\(ratio=1\.0.*needs old rows"),
        ({"new": [{"input_ids": [1, 2]}]}, "rows of new have no labels"),
        ({"keep": [{"text": "a"}]}, "rows of keep have no input_ids and no labels"),
        ({"keep": [{"input_ids": [1], "labels": [1]}]}, "new are 2 tokens long .* keep 1"),
    ],
)
def test_what_cannot_be_mixed(changes, message):
    usual = {"new": rows(3), "keep": rows(2, old=True), "mix": Replay(1), "num_rows": 4}
    given = {**usual, **changes}
    with pytest.raises(ValueError, match=message):
        mixed_rows(given.pop("new"), given.pop("keep"), seed=0, **given)


def test_no_old_rows_are_needed_where_none_are_drawn():
    for mix in (Replay(0), MixReview(0)):
        assert mixed_rows(rows(3), None, mix=mix, num_rows=5, seed=0).num_keep_rows == 0
