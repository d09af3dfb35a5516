"""Reads and writes the generic probes: JSONL of "text", "spans", maybe "kind", "answers", "query".

Other formats are read by `templama` and `ecbd`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from gradloc.files import write_text
from gradloc.probes.jsonl import parse_lines, text_field
from gradloc.probes.probe import Probe


def read_spans(path: str | os.PathLike[str], kind: str | None = None) -> list[Probe]:
    """Read probes of the shape `{"text": "…", "spans": [[start, end], …]}`, one a line.

    Args:
        path: the file. Spans are half-open character offsets into the text. A line may name its
            "kind", and other acceptable "answers".
        kind: the kind of every probe, whatever its line says. None: what the line says, or "probe".

    Raises:
        FileNotFoundError: no such file.
        ProbeFormatError: malformed lines, spans outside the text, empty or overlapping ones, an
            empty file.
    """

    def parse(row: dict[str, Any], source: str) -> Probe:
        text = text_field(row, "text")
        spans = row.get("spans")
        if not isinstance(spans, list) or not all(_is_pair(span) for span in spans):
            raise ValueError("field 'spans' is not a list of [start, end] pairs of whole numbers")
        answers = row.get("answers", [])
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError("field 'answers' is not a list of texts")
        query = row.get("query")
        if query is not None and not isinstance(query, str):
            raise ValueError(f"field 'query' is {query!r:.60}, expected text")
        own_kind = text_field(row, "kind") if "kind" in row else "probe"
        return Probe(
            text=text,
            spans=tuple((start, end) for start, end in spans),
            kind=kind or own_kind,
            source=source,
            answers=tuple(answers),
            query=query,
        )

    return parse_lines(path, parse)


def write_spans(path: str | os.PathLike[str], probes: Iterable[Probe]) -> None:
    """Write probes as spans JSONL, whole or not at all.

    `read_spans` gives them back, but for their source.

    Raises:
        OSError: the path cannot be written.
    """
    lines = []
    for probe in probes:
        row: dict[str, Any] = {
            "text": probe.text,
            "spans": [list(span) for span in probe.spans],
            "kind": probe.kind,
        }
        if probe.answers:
            row["answers"] = list(probe.answers)
        if probe.query is not None:
            row["query"] = probe.query
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def _is_pair(span: object) -> bool:
    return isinstance(span, list) and len(span) == 2 and all(type(offset) is int for offset in span)
