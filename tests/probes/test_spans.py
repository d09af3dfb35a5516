"""Spans JSONL, and what all readers share: lines, encodings, error reports, format detection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradloc.probes import Probe, ProbeFormatError, read_probes, read_spans, write_spans


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


GOOD = {"text": "Ada keeps a cat.", "spans": [[12, 15]]}


def test_kind_comes_from_the_line_or_the_caller(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {**GOOD, "kind": "pets", "answers": ["dog"]}, GOOD)
    assert [(p.kind, p.answers, p.source) for p in read_spans(path)] == [
        ("pets", ("dog",), f"{path}:1"),
        ("probe", (), f"{path}:2"),
    ]
    assert [p.kind for p in read_spans(path, "new")] == ["new", "new"]
    assert [p.kind for p in read_probes(path)] == ["pets", "probe"]
    assert [p.kind for p in read_probes(path, kind="new")] == ["new", "new"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": ""}, "'text' is ''"),
        ({"text": 3}, "'text' is 3"),
        ({"spans": []}, "spans is empty"),
        ({"spans": [12, 15]}, "not a list of"),
        ({"spans": [[12.0, 15.0]]}, "not a list of"),
        ({"spans": [[True, 15]]}, "not a list of"),
        ({"spans": [[12, 15, 16]]}, "not a list of"),
        ({"spans": [[12, 17]]}, r"\[12, 17\] lies outside the text of 16"),
        ({"spans": [[-4, -1]]}, "lies outside"),
        ({"spans": [[5, 5]]}, "is empty"),
        ({"spans": [[0, 5], [4, 9]]}, "overlaps"),
        ({"spans": [[3, 4]]}, "covers only spaces"),
        ({"kind": ""}, "'kind' is ''"),
        ({"answers": "dog"}, "'answers' is not a list"),
        ({"query": 1}, "'query' is 1"),
        ({"text": "Ada keeps a \ud83d."}, "half of a surrogate"),
    ],
)
def test_malformed_rows_name_file_and_line(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path / "a", GOOD, {**GOOD, **change})
    with pytest.raises(ProbeFormatError, match=reason) as caught:
        read_spans(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    probes = [
        Probe("Zlatan Ibrahimović 🐈 a\u2028b", ((19, 20), (21, 24)), "new", "x"),
        Probe("Ada keeps a cat.", ((12, 15),), "pets", "x", ("dog", "cow"), "Ada keeps a _X_."),
    ]
    write_spans(tmp_path / "deep" / "a.jsonl", probes)
    found = read_spans(tmp_path / "deep" / "a.jsonl")
    assert [(p.text, p.spans, p.kind, p.answers, p.query) for p in found] == [
        (p.text, p.spans, p.kind, p.answers, p.query) for p in probes
    ]


def test_blank_lines_bom_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf\r\n" + line + b"\r\n  \n" + line)
    assert [p.source for p in read_probes(path)] == [f"{path}:2", f"{path}:4"]


def test_five_errors_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    bad = [b"{", b"\xff\xfe", b"[1]", b"null", b'"text"', b"{}", b"nope"]
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + b"\n".join(bad) + b"\n")
    with pytest.raises(ProbeFormatError) as caught:
        read_probes(path)
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[0] for line in lines[:5]] == [f"{path}:{n}" for n in range(2, 7)]
    assert [line.split(": ", 1)[1].split(" (")[0] for line in lines[:3]] == [
        "not JSON",
        "not UTF-8",
        "a JSON list, expected one object a line",
    ]
    assert lines[5:] == ["and 2 more malformed lines"]


def test_a_deeply_nested_line_is_an_error_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("[" * 200_000 + "\n")
    with pytest.raises(ProbeFormatError, match=r"a:1: "):
        read_probes(path)


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    for read in (read_probes, read_spans):
        with pytest.raises(ProbeFormatError, match="the file is empty"):
            read(path)


def test_missing_paths_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such probe file: .*missing\.jsonl"):
        read_probes(tmp_path / "missing.jsonl")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_probes(tmp_path)


def test_an_unknown_format_lists_its_fields_and_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"prompt": "x", "completion": "y"})
    with pytest.raises(ProbeFormatError, match=r"a:1: .*completion.*prompt.*TempLAMA.*ECBD"):
        read_probes(path)
    (tmp_path / "a").write_text("[\n")
    with pytest.raises(ProbeFormatError, match="a:1: not JSON"):
        read_probes(path)
