"""Probe: its checks, replacing the answer, and the small functions beside it."""

from __future__ import annotations

import pytest

from gradloc.probes import Probe, by_kind, probe_texts
from gradloc.probes.probe import insert_answer


def probe(text: str, *spans: tuple[int, int], kind: str = "new") -> Probe:
    return Probe(text, spans, kind, "test:1")


def test_spans_are_put_in_order_and_read_back() -> None:
    made = probe("Ada keeps a grey cat.", (12, 20), (0, 3))
    assert made.spans == ((0, 3), (12, 20))
    assert made.span_texts == ("Ada", "grey cat")


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ((), "spans is empty"),
        (((3, 3),), r"\[3, 3\] is empty"),
        (((4, 3),), r"\[4, 3\] is empty"),
        (((0, 8),), "outside the text of 7"),
        (((-1, 3),), "outside the text"),
        (((3, 4),), "covers only spaces"),
        (((0, 3), (2, 7)), r"\[2, 7\] overlaps"),
    ],
)
def test_bad_spans_are_refused(spans: tuple[tuple[int, int], ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        probe("Ada was", *spans)


def test_adjacent_spans_do_not_overlap() -> None:
    assert probe("snowball", (0, 4), (4, 8)).span_texts == ("snow", "ball")


def test_an_empty_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind=''"):
        probe("Ada", (0, 3), kind="")


@pytest.mark.parametrize(
    ("before", "answer", "after", "text", "span_text"),
    [
        ("plays for ", " Juventus ", ".", "plays for Juventus.", "Juventus"),
        ("plays for ", "Arsenal F.C.", ".", "plays for Arsenal F.C.", "Arsenal F.C."),
        ("and so ", "etc.", "... on", "and so etc.... on", "etc."),
        ("Ingrid ", ", born 1940", ") is", "Ingrid, born 1940) is", ", born 1940"),
        ("in Q", "1a", " it", "in Q1a it", "1a"),
    ],
)
def test_insert_answer(before: str, answer: str, after: str, text: str, span_text: str) -> None:
    made, (start, end) = insert_answer(before, answer, after)
    assert made == text
    assert made[start:end] == span_text


def test_with_answer_replaces_the_span_only() -> None:
    made = Probe("He plays for Juventus now.", ((13, 21),), "updated", "f:3", answers=("Roma",))
    other = made.with_answer("A.S. Roma")
    assert other.text == "He plays for A.S. Roma now."
    assert other.span_texts == ("A.S. Roma",)
    assert (other.kind, other.source, other.answers) == ("updated", "f:3", ())
    with pytest.raises(ValueError, match="2 spans"):
        probe("a b", (0, 1), (2, 3)).with_answer("c")
    with pytest.raises(ValueError, match="blank"):
        made.with_answer("  ")


def test_by_kind_keeps_the_order() -> None:
    first, second, third = probe("a", (0, 1)), probe("b", (0, 1), kind="old"), probe("c", (0, 1))
    assert by_kind([first, second, third]) == {"new": [first, third], "old": [second]}
    assert list(by_kind([second, first])) == ["old", "new"]


def test_probe_texts_are_distinct() -> None:
    assert probe_texts([probe("a b", (0, 1)), probe("c", (0, 1)), probe("a b", (2, 3))]) == [
        "a b",
        "c",
    ]
