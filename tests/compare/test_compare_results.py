import json
import os
import resource
import subprocess
import sys

import pytest

from gradloc.compare.results import Measures, append_record, measures, read_records


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "results.jsonl"


def record(key, **content):
    return {"key": key, **content}


def test_records_come_back_as_they_were(path):
    assert read_records(path) == []
    first = record("a", scores={"1": {"nll": 0.1}}, title="Größe\u2028\n", plan={"h.0": 1.0})
    append_record(path, first)
    append_record(path, record("b", losses=((1, 2.5), (2, 0.5))))
    assert read_records(path) == [first, record("b", losses=[[1, 2.5], [2, 0.5]])]
    assert path.read_bytes().count(b"\n") == 2


def test_what_is_not_finite_is_null(path):
    append_record(path, record("a", nll=float("nan"), more=[{"x": float("inf")}, -float("inf")]))
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == record(
        "a", nll=None, more=[{"x": None}, None]
    )


def test_a_text_that_is_no_unicode_is_kept(path):
    """As a traceback has it that names a file in another encoding."""
    append_record(path, record("a", error="caf\udce9"))
    assert read_records(path) == [record("a", error="caf\udce9")]


def test_of_two_records_with_a_key_the_last_counts(path):
    for number, key in enumerate("abac"):
        append_record(path, record(key, number=number))
    assert [(r["key"], r["number"]) for r in read_records(path)] == [("b", 1), ("a", 2), ("c", 3)]


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_line_cut_short_costs_that_record_only(path, cut):
    append_record(path, record("a", text="x" * 40))
    append_record(path, record("b", text="x" * 40))
    size = path.stat().st_size
    os.truncate(path, size - 1 - cut)
    with pytest.warns(UserWarning, match=r"results.jsonl, line 2: no record"):
        assert [r["key"] for r in read_records(path)] == ["a"]
    append_record(path, record("c"))
    append_record(path, record("b"))
    with pytest.warns(UserWarning, match=r"line 2: no record"):
        assert [r["key"] for r in read_records(path)] == ["a", "c", "b"]


def test_a_whole_line_that_lacks_its_end_counts(path):
    append_record(path, record("a"))
    os.truncate(path, path.stat().st_size - 1)
    assert [r["key"] for r in read_records(path)] == ["a"]
    append_record(path, record("b"))
    assert [r["key"] for r in read_records(path)] == ["a", "b"]


@pytest.mark.parametrize("line", [b"[1, 2]", b"7", b'{"no": "key"}', b'{"key": 7}', b"\xff\xfe"])
def test_a_line_that_is_no_record_is_left_out(path, line):
    append_record(path, record("a"))
    path.write_bytes(line + b"\n\n" + path.read_bytes())
    with pytest.warns(UserWarning, match=r"line 1: no record"):
        assert [r["key"] for r in read_records(path)] == ["a"]


@pytest.mark.parametrize("key", [None, 7])
def test_a_record_needs_a_key(path, key):
    with pytest.raises(ValueError, match=f"key={key}: a record is found by its key"):
        append_record(path, {"key": key})
    assert not path.exists()


def test_a_full_disk_leaves_the_file_as_it_was(path):
    """The system writes what fits of the line before it says that no more does."""
    append_record(path, record("a"))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            append_record(path, record("b", text="x" * 100))
        assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    append_record(path, record("b"))
    assert [r["key"] for r in read_records(path)] == ["a", "b"]


def test_processes_that_append_at_once_take_turns(path):
    code = (
        "import sys, pathlib; from gradloc.compare.results import append_record\n"
        "for n in range(50): append_record(pathlib.Path(sys.argv[1]),"
        " {'key': f'{sys.argv[2]} {n}', 'text': 'x' * 9000})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, path, name]) for name in "ab"]
    while any(writer.poll() is None for writer in writers):
        for found in read_records(path):  # never half a line, which would warn
            assert len(found["text"]) == 9000
    assert [writer.wait() for writer in writers] == [0, 0]
    expected = {f"{name} {number}" for name in "ab" for number in range(50)}
    assert {r["key"] for r in read_records(path)} == expected


def test_measures():
    scores = {
        "probes": {"updated": {"nll": 1.0}, "new": {"nll": 2.0}, "unchanged": {"nll": 0.25}},
        "text": {"old": {"nll": 3.0}, "new": {"nll": 4.0}},
    }
    assert measures(scores) == Measures(learn=1.5, forget=0.25, text=3.0)
    scores["probes"]["new"]["nll"] = None
    del scores["text"]["old"]
    assert measures(scores) == Measures(learn=None, forget=0.25, text=None)
    assert measures({}) == Measures(None, None, None)
