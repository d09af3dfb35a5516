"""Reads TempLAMA and Dynamic-TempLAMA: facts with a date a row, compared between two dates.

Reads no other format.

The shape is that of Dhingra et al. (TACL 2022), kept by Margatina et al. (EACL 2023) for
Dynamic-TempLAMA: `{"query": "Lionel Messi plays for _X_.", "answer": [{"name": "FC Barcelona"}],
"date": "2019-Q2"}`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from gradloc.probes.jsonl import parse_lines, text_field
from gradloc.probes.probe import Probe, insert_answer

KINDS = ("updated", "unchanged", "new", "outdated")
"""The kinds that `read_templama` gives."""

_BLANK = "_X_"


@dataclass(frozen=True)
class _Answer:
    name: str
    wikidata_id: str | None

    def is_same(self, other: _Answer) -> bool:
        # The label of a Wikidata item may change while the fact does not.
        if self.wikidata_id is not None and self.wikidata_id == other.wikidata_id:
            return True
        return self.name == other.name


@dataclass(frozen=True)
class _Row:
    query: str
    date: str
    answers: tuple[_Answer, ...]
    source: str


def read_templama(
    path: str | os.PathLike[str], old_date: str, new_date: str, *, include_outdated: bool = False
) -> list[Probe]:
    """Compare the facts of two dates.

    Rows of one query and date are merged. A fact (query) with rows at both dates is *unchanged*
    when its answers are the same, and *updated* when the later date has an answer that the earlier
    one has not: the span is the first such answer. A fact of the later date only is *new*. A fact
    that has only lost answers, or has ended, holds nothing to learn and gives no probe.
    `Probe.answers` are the other names of the same date.

    Args:
        path: the file.
        old_date: the earlier date, as the file writes it ("2019", "2019-Q2").
        new_date: the later date.
        include_outdated: also give the first answer of each updated fact that the later date no
            longer has, as kind "outdated".

    Returns:
        The probes in the order in which their facts first appear in the file; outdated ones after
        their updated one.

    Raises:
        FileNotFoundError: no such file.
        ProbeFormatError: malformed lines or an empty file.
        ValueError: a date that the file does not have (the file's dates are listed), or dates in
            the wrong order.
    """
    rows = parse_lines(path, _parse)
    dates = sorted({row.date for row in rows})
    for name, date in (("old_date", old_date), ("new_date", new_date)):
        if date not in dates:
            raise ValueError(
                f"{name}={date!r} is not a date of {os.fspath(path)}; choose from "
                f"{', '.join(dates)}"
            )
    if old_date >= new_date:
        raise ValueError(
            f"old_date={old_date!r} is not before new_date={new_date!r}: name the earlier date "
            "first"
        )
    old = _merge(rows, old_date)
    new = _merge(rows, new_date)
    probes: list[Probe] = []
    for query in dict.fromkeys(row.query for row in rows):
        if query not in new:
            continue
        current, source = new[query]
        if query not in old:
            probes.append(_probe(query, current, 0, "new", source))
            continue
        former, former_source = old[query]
        fresh = _first_missing(current, former)
        gone = _first_missing(former, current)
        if fresh is not None:
            probes.append(_probe(query, current, fresh, "updated", source))
            if include_outdated and gone is not None:
                probes.append(_probe(query, former, gone, "outdated", former_source))
        elif gone is None:
            probes.append(_probe(query, current, 0, "unchanged", source))
    return probes


def templama_dates(path: str | os.PathLike[str]) -> list[str]:
    """The dates of a TempLAMA file, in order.

    Raises:
        FileNotFoundError: no such file.
        ProbeFormatError: malformed lines or an empty file.
    """
    return sorted({row.date for row in parse_lines(path, _parse)})


def _parse(row: dict[str, Any], source: str) -> _Row:
    query = text_field(row, "query")
    if query.count(_BLANK) != 1:
        raise ValueError(f"query {query!r} has {query.count(_BLANK)} times {_BLANK}, expected once")
    date = row.get("date")
    if isinstance(date, int) and not isinstance(date, bool):
        date = str(date)
    if not isinstance(date, str) or not date:
        raise ValueError(f"field 'date' is {date!r:.60}, expected text such as '2019-Q2'")
    found = row.get("answer")
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list):
        raise ValueError("field 'answer' is neither an object with a name nor a list of such")
    answers = []
    for answer in found:
        if not isinstance(answer, dict):
            raise ValueError("field 'answer' holds something that is not an object with a name")
        wikidata_id = answer.get("wikidata_id")
        answers.append(
            _Answer(text_field(answer, "name").strip(), str(wikidata_id) if wikidata_id else None)
        )
    return _Row(query=query, date=date, answers=tuple(answers), source=source)


def _merge(rows: list[_Row], date: str) -> dict[str, tuple[list[_Answer], str]]:
    """Query -> its distinct answers at `date`, and where the first of its rows stands."""
    merged: dict[str, tuple[list[_Answer], str]] = {}
    for row in rows:
        # A row without answers says that nothing is known then, which is what no row says.
        if row.date != date or not row.answers:
            continue
        answers, _ = merged.setdefault(row.query, ([], row.source))
        for answer in row.answers:
            if not any(answer.is_same(other) for other in answers):
                answers.append(answer)
    return merged


def _first_missing(answers: list[_Answer], others: list[_Answer]) -> int | None:
    for index, answer in enumerate(answers):
        if not any(answer.is_same(other) for other in others):
            return index
    return None


def _probe(query: str, answers: list[_Answer], index: int, kind: str, source: str) -> Probe:
    before, after = query.split(_BLANK)
    name = answers[index].name
    text, span = insert_answer(before, name, after)
    others = tuple(dict.fromkeys(answer.name for answer in answers if answer.name != name))
    return Probe(text=text, spans=(span,), kind=kind, source=source, answers=others, query=query)
