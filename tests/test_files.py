"""Files that are written whole or not at all: failures in the middle, permissions, messages."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gradloc.files import (
    check_writable,
    read_json,
    remove_leftovers,
    replacing,
    replacing_folder,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_with_its_parents(tmp_path):
    path = tmp_path / "new" / "deep" / "file.txt"
    write_text(path, "première\n")
    assert path.read_bytes() == "première\n".encode()
    assert names(path.parent) == ["file.txt"]


def test_the_old_file_stays_until_the_end(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".txt"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("old", [None, "old"])
def test_an_error_in_the_middle_leaves_the_old_file(tmp_path, old):
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == ([] if old is None else ["file.txt"])
    assert old is None or path.read_text() == old


def kill_while_writing(code: str, tmp_path: Path) -> None:
    """Run `code` in another process, which says "here" in mid-write and is killed then."""
    wait = "print('here', flush=True); import time; time.sleep(60)"
    code = textwrap.dedent(code).replace("WAIT", wait)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline().strip() == b"here"
        process.send_signal(signal.SIGKILL)


# The module alone: importing the package would load torch in every process.
LOAD = f"""
    import runpy
    files = runpy.run_path({str(Path(__file__).parents[1] / "gradloc" / "files.py")!r})
"""


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    code = """
    with files["replacing"]("file.txt") as temporary:
        temporary.write_text("half")
        WAIT
    """
    kill_while_writing(LOAD + code, tmp_path)
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_kill_in_the_middle_leaves_the_old_folder(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    code = """
    with files["replacing_folder"]("model") as temporary:
        (temporary / "weights").write_text("half")
        WAIT
    """
    kill_while_writing(LOAD + code, tmp_path)
    assert names(target) == ["weights"]
    assert (target / "weights").read_text() == "old"


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    code = """
    with files["replacing_folder"]("seed-1") as temporary:
        (temporary / "weights").write_text("half")
        WAIT
    """
    kill_while_writing(LOAD + code, tmp_path)
    assert len(list(tmp_path.glob(".seed-1.*"))) == 1, "the kill left something"
    for name in ("seed-1", "seed-10", ".seed-10.abc", ".seed-1", "x.seed-1.abc"):
        (tmp_path / name).mkdir()
    (tmp_path / ".seed-1.file").write_text("no folder")
    kept = [".seed-1", ".seed-1.file", ".seed-10.abc", "seed-1", "seed-10", "x.seed-1.abc"]
    remove_leftovers(tmp_path / "seed-1")
    assert set(kept) <= set(names(tmp_path))
    assert not [
        name for name in names(tmp_path) if name.startswith(".seed-1.") and name not in kept
    ]
    remove_leftovers(tmp_path / "missing" / "seed-1")


def test_an_old_folder_that_was_moved_aside_comes_back(tmp_path):
    """As a kill between the two renames of `replacing_folder` leaves it."""
    for name in (".model.old.abc/model", ".model.def"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_text(name)
    remove_leftovers(tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model/weights").read_text() == ".model.old.abc/model"
    # Where the new one is in its place, the old one goes.
    (tmp_path / ".model.old.xyz/model").mkdir(parents=True)
    remove_leftovers(tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["weights"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_open(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "ours", "x")
        (tmp_path / "opened").write_text("x")
        with replacing_folder(tmp_path / "our folder"):
            pass
        (tmp_path / "made folder").mkdir()
        assert os.umask(mask) == mask, "the mask is put back"
    finally:
        os.umask(before)
    for ours, theirs in (("ours", "opened"), ("our folder", "made folder")):
        assert (tmp_path / ours).stat().st_mode == (tmp_path / theirs).stat().st_mode


@pytest.mark.parametrize("write", [write_text, lambda p, t: check_writable(p)])
def test_a_file_where_a_folder_should_be(tmp_path, write):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot make the folder .*choose another path"):
        write(tmp_path / "file" / "inner.txt", "x")
    with pytest.raises(OSError, match=r"cannot make the folder .*choose another path"):
        write(tmp_path / "file" / "deeper" / "inner.txt", "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    with pytest.raises(PermissionError, match=r"cannot write in .*change its permissions"):
        write_text(folder / "file.txt", "x")
    assert names(folder) == []


def test_a_folder_that_access_denies(tmp_path, monkeypatch):
    """What the test above sees, also for root."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"cannot write in .*choose another path or change"):
        write_text(tmp_path / "file.txt", "x")
    assert names(tmp_path) == []


def test_a_folder_where_the_file_should_be(tmp_path):
    """Found before the block runs, which may be the end of hours of work."""
    (tmp_path / "taken").mkdir()

    def work():
        with replacing(tmp_path / "taken"):
            raise AssertionError("the block must not run")

    with pytest.raises(IsADirectoryError, match="taken' is a folder: add a file name"):
        work()
    assert names(tmp_path) == ["taken"]


def test_a_folder_is_found_before_the_work(tmp_path):
    """`check_writable` looked at the parent only, so it passed and `replacing` failed later."""
    with pytest.raises(IsADirectoryError, match="is a folder: add a file name"):
        check_writable(tmp_path)


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "model"
    for content in ("one", "two"):
        with replacing_folder(target) as temporary:
            (temporary / content).write_text(content)
            assert target.exists() == (content == "two"), "the old one is there until the end"
        assert names(target) == [content], "what only the old folder had is gone"
    assert names(tmp_path) == ["model"]


def test_an_error_in_the_middle_leaves_the_old_folder(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")

    def fail():
        with replacing_folder(target) as temporary:
            (temporary / "weights").write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert names(tmp_path) == ["model"]
    assert (target / "weights").read_text() == "old"


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    rename = Path.replace

    def failing(self, destination):
        if Path(destination) == target and ".old." not in str(self):
            raise OSError("the file system is gone")
        return rename(self, destination)

    monkeypatch.setattr(Path, "replace", failing)

    def fail():
        with replacing_folder(target) as temporary:
            (temporary / "weights").write_text("new")

    with pytest.raises(OSError, match="the file system is gone"):
        fail()
    assert names(tmp_path) == ["model"]
    assert (target / "weights").read_text() == "old"


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "taken").write_text("x")

    def work():
        with replacing_folder(tmp_path / "taken"):
            raise AssertionError("the block must not run")

    with pytest.raises(OSError, match="is a file, not a folder: remove it or choose another name"):
        work()
    assert (tmp_path / "taken").read_text() == "x"


def test_json_round_trip(tmp_path):
    path = tmp_path / "file.json"
    content = {"names": ["élan", "h.0"], "value": 0.1, "none": None}
    write_json(path, content, schema="a.schema", version=2)
    assert read_json(path, schema="a.schema", version=2) == {
        "schema": "a.schema",
        "version": 2,
        **content,
    }
    assert list(json.loads(path.read_text(encoding="utf-8")))[:2] == ["schema", "version"]
    assert "élan" in path.read_text(encoding="utf-8")
    assert read_json(path, schema="a.schema", version=3)["value"] == 0.1


def test_json_has_no_nan(tmp_path):
    """NaN is no JSON: other readers would fail on the file. The old file stays."""
    path = tmp_path / "file.json"
    write_json(path, {"value": 1.0}, schema="s", version=1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": float("nan")}, schema="s", version=1)
    assert read_json(path, schema="s", version=1)["value"] == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not a JSON file"),
        (b"", "is not a JSON file"),
        (b"\xff\xfe\x00", "is not a JSON file"),
        (b"[1, 2]", r"holds schema=None, not 's': is it the right file\?"),
        (b"{}", "holds schema=None, not 's'"),
        (b'{"schema": "t", "version": 1}', "holds schema='t', not 's'"),
        (b'{"schema": "s"}', "has version=None; this gradloc reads up to 1: upgrade gradloc"),
        (b'{"schema": "s", "version": "1"}', "has version='1'"),
        (b'{"schema": "s", "version": 2}', "has version=2; this gradloc reads up to 1: upgrade"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(path, schema="s", version=1)


def test_json_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_json(path, schema="s", version=1)
