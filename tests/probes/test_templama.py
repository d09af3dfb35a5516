"""TempLAMA: what becomes of a fact between two dates, and what is said about bad files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradloc.probes import ProbeFormatError, read_probes, read_templama, templama_dates


def row(query: str, date: Any, *names: str, ids: tuple[str, ...] = ()) -> dict[str, Any]:
    answers: list[dict[str, str]] = [{"name": name} for name in names]
    for answer, wikidata_id in zip(answers, ids, strict=False):
        answer["wikidata_id"] = wikidata_id
    return {"query": query, "answer": answers, "date": date, "relation": "P54"}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_rows(*rows: Any) -> Path:
        path = tmp_path / "templama.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
        return path

    return write_rows


A, B, C, D, E, F = (f"{name} plays for _X_." for name in "ABCDEF")


def test_kinds_between_two_dates(write: Any) -> None:
    path = write(
        row(A, "2019", "Ajax"),
        row(B, "2019", "Betis", "Burnley"),
        row(C, "2019", "Celtic", "Cardiff"),
        row(D, "2019", "Derby"),
        row(A, "2020", "AFC"),
        row(A, "2021", "Ajax", "Arsenal F.C.", "AZ"),
        row(B, "2021", "Burnley", "Betis"),
        row(C, "2021", "Celtic"),
        row(E, "2021", "Everton", "Elche"),
        row(F, "2020", "Fulham"),
    )
    probes = read_templama(path, "2019", "2021")
    found = [(p.kind, p.text, p.span_texts, p.answers, p.source) for p in probes]
    # C only shrank, D ended and F lies between the dates: nothing to learn from them.
    assert found == [
        (
            "updated",
            "A plays for Arsenal F.C.",
            ("Arsenal F.C.",),
            ("Ajax", "AZ"),
            f"{path}:6",
        ),
        ("unchanged", "B plays for Burnley.", ("Burnley",), ("Betis",), f"{path}:7"),
        ("new", "E plays for Everton.", ("Everton",), ("Elche",), f"{path}:9"),
    ]
    assert [p.query for p in probes] == [A, B, E]


def test_outdated_answers_on_request(write: Any) -> None:
    path = write(
        row(A, "2019", "Ajax", "AZ"), row(B, "2019", "Betis"), row(A, "2020", "AZ", "Arsenal")
    )
    kinds = [(p.kind, p.span_texts[0], p.answers) for p in read_templama(path, "2019", "2020")]
    assert kinds == [("updated", "Arsenal", ("AZ",))]
    with_old = read_templama(path, "2019", "2020", include_outdated=True)
    assert [(p.kind, p.span_texts[0], p.answers) for p in with_old] == [
        ("updated", "Arsenal", ("AZ",)),
        ("outdated", "Ajax", ("AZ",)),
    ]


def test_a_fact_that_only_grew_has_no_outdated_answer(write: Any) -> None:
    path = write(row(A, "2019", "Ajax"), row(A, "2020", "Ajax", "AZ"))
    probes = read_templama(path, "2019", "2020", include_outdated=True)
    assert [(p.kind, p.span_texts[0]) for p in probes] == [("updated", "AZ")]


def test_rows_of_one_query_and_date_are_merged(write: Any) -> None:
    path = write(
        row(A, "2019", "Ajax"), row(A, "2020", "AZ"), row(A, "2019", "AZ"), row(A, "2020", "Ajax")
    )
    assert [p.kind for p in read_templama(path, "2019", "2020")] == ["unchanged"]


def test_the_same_item_under_another_label_is_no_change(write: Any) -> None:
    path = write(
        row(A, "2019", "Ajax", ids=("Q81888",)),
        row(A, "2020", "AFC Ajax", ids=("Q81888",)),
        row(B, "2019", "United", ids=("Q1",)),
        row(B, "2020", "City", ids=("Q2",)),
    )
    assert [p.kind for p in read_templama(path, "2019", "2020")] == ["unchanged", "updated"]


def test_a_single_object_whole_number_dates_and_no_answers(write: Any) -> None:
    path = write(
        {"query": A, "answer": {"name": "Ajax"}, "date": 2019},
        {"query": A, "answer": {"name": "AZ"}, "date": 2020},
        {"query": B, "answer": [], "date": 2019},
        {"query": B, "answer": {"name": "Betis"}, "date": 2020},
    )
    assert templama_dates(path) == ["2019", "2020"]
    assert [(p.kind, p.span_texts[0]) for p in read_templama(path, "2019", "2020")] == [
        ("updated", "AZ"),
        ("new", "Betis"),
    ]


def test_the_blank_may_stand_anywhere(write: Any) -> None:
    query = "_X_ is where Zlatan Ibrahimović plays"
    path = write(row(query, "2019", "Malmö FF"), row(query, "2020", "Åtvidabergs FF"))
    (probe,) = read_templama(path, "2019", "2020")
    assert probe.text == "Åtvidabergs FF is where Zlatan Ibrahimović plays"
    assert probe.spans == ((0, 14),)


def test_dates_that_the_file_does_not_have(write: Any) -> None:
    path = write(row(A, "2019-Q2", "Ajax"), row(A, "2020-Q1", "AZ"))
    with pytest.raises(ValueError, match=r"new_date='2021'.*2019-Q2, 2020-Q1"):
        read_templama(path, "2019-Q2", "2021")
    with pytest.raises(ValueError, match=r"old_date='2018'.*2019-Q2, 2020-Q1"):
        read_templama(path, "2018", "2020-Q1")
    with pytest.raises(ValueError, match="is not before"):
        read_templama(path, "2020-Q1", "2019-Q2")
    with pytest.raises(ValueError, match="is not before"):
        read_templama(path, "2019-Q2", "2019-Q2")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"answer": [{"name": "x"}], "date": "1"}, "'query' is missing"),
        (row("A plays", "1", "x"), "0 times _X_"),
        (row("_X_ and _X_", "1", "x"), "2 times _X_"),
        ({"query": A, "answer": [{"name": "x"}]}, "'date' is None"),
        ({"query": A, "answer": [{"name": "x"}], "date": True}, "'date' is True"),
        ({"query": A, "answer": "x", "date": "1"}, "'answer' is neither"),
        ({"query": A, "answer": ["x"], "date": "1"}, "not an object with a name"),
        (row(A, "1", " "), "'name' is ' '"),
    ],
)
def test_malformed_rows_name_file_and_line(write: Any, bad: Any, reason: str) -> None:
    path = write(row(A, "0", "Ajax"), bad)
    with pytest.raises(ProbeFormatError, match=reason) as caught:
        read_templama(path, "0", "1")
    assert str(caught.value).startswith(f"{path}:2: ")


def test_read_probes_needs_dates_and_filters_by_kind(write: Any) -> None:
    path = write(
        row(A, "2019", "Ajax"),
        row(B, "2019", "Betis"),
        row(A, "2020", "AZ"),
        row(B, "2020", "Betis"),
    )
    with pytest.raises(ValueError, match=r"two of its dates.*2019, 2020"):
        read_probes(path)
    dates = ("2019", "2020")
    assert [p.kind for p in read_probes(path, dates=dates)] == ["updated", "unchanged"]
    assert [p.span_texts[0] for p in read_probes(path, dates=dates, kind="updated")] == ["AZ"]
    assert [p.span_texts[0] for p in read_probes(path, dates=dates, kind="outdated")] == ["Ajax"]
    with pytest.raises(ValueError, match="no new between 2019 and 2020"):
        read_probes(path, dates=dates, kind="new")
    with pytest.raises(ValueError, match="kind='teams'"):
        read_probes(path, dates=dates, kind="teams")
