import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from io import StringIO
from pathlib import Path

import compare_fakes
import pytest
from compare_fakes import RUNNER, made, make_config

from gradloc.compare.board import PATIENCE_SECONDS, Board
from gradloc.compare.config import WorldConfig
from gradloc.compare.config_file import load_config
from gradloc.compare.grid import cells
from gradloc.compare.locks import locked
from gradloc.compare.messages import Base
from gradloc.compare.results import append_record, read_records
from gradloc.compare.schedule import GridResult, check_folder, open_folder, run_grid

NUM_CELLS = 16


def quiet():
    from rich.console import Console

    return Console(file=StringIO(), width=200)


def go(config, folder, **options):
    console = options.pop("console", None) or quiet()
    return run_grid(config, folder, places={}, runner=RUNNER, console=console, **options)


def runs_in(folder):
    return [r for r in read_records(folder / "results.jsonl") if r["kind"] == "run"]


def table(folder):
    """What a table is made of: every record, whatever the order they were written in."""
    return sorted(json.dumps(r, sort_keys=True) for r in read_records(folder / "results.jsonl"))


def begun(folder):
    return [key for what, key, _ in made(folder) if what == "begun"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A grid that nothing disturbed."""
    folder = tmp_path_factory.mktemp("grids") / "whole"
    console = quiet()
    result = go(make_config(), folder, processes=2, console=console)
    return folder, result, console.file.getvalue()


def test_every_cell_is_made_once_after_its_base(whole):
    folder, result, _ = whole
    assert result == GridResult(num_cells=16, num_done=16, num_failed=0, failures=())
    assert sorted(begun(folder)) == sorted(cell.key for cell in cells(make_config()))
    assert sorted(seed for what, seed, _ in made(folder) if what == "based") == ["0", "1"]
    records = read_records(folder / "results.jsonl")
    seeds = {cell.key: cell.seed for cell in cells(make_config())}
    based = set()
    for record in records:
        if record["kind"] == "base":
            based.add(record["seed"])
        else:
            assert seeds[record["key"]] in based
    assert len(records) == NUM_CELLS + 2
    assert {record["threads"] for record in runs_in(folder)} == {"1"}
    assert len({pid for what, _, pid in made(folder) if what == "begun"}) == 2
    assert load_config(folder) == make_config()


def test_the_lines_say_what_came_out(whole):
    lines = whole[2].splitlines()
    assert lines[0] == "0 of 16 runs are done"
    assert "base seed=0: asking what is known" in lines
    numbers = r"learn [01]\.\d{3}, forget [01]\.\d{3}, text [01]\.\d{3} \(\d s\)"
    assert re.fullmatch(rf"\[16/16\] \S+ lr=\S+ seed=1 draw=\d: {numbers}", lines[-1])
    assert "1 s left" in " ".join(lines)  # half of the 2 s a run that records claim


def test_a_second_call_makes_nothing(whole):
    folder = whole[0]
    before = (folder / "results.jsonl").read_bytes(), (folder / "made.txt").read_bytes()
    assert go(make_config(), folder).num_done == NUM_CELLS
    assert ((folder / "results.jsonl").read_bytes(), (folder / "made.txt").read_bytes()) == before


def start(folder, processes, seconds):
    script = Path(compare_fakes.__file__)
    return subprocess.Popen(
        [sys.executable, script, folder, str(processes), str(seconds)],
        stdout=subprocess.DEVNULL,
        cwd=script.parent,
        start_new_session=True,
    )


def wait_for(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.01)


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # One that has ended and that nobody asked about is a zombie.
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_killed_at_any_moment_it_goes_on_with_what_is_missing(whole, tmp_path):
    folder = tmp_path / "killed"
    finished: set[str] = set()
    for lifetime in (1, 8):
        process = start(folder, 2, 0.1)
        wait_for(lambda n=lifetime: len(runs_in(folder)) >= n, f"{lifetime} runs")
        process.kill()
        process.wait()
        workers = {pid for _, _, pid in made(folder)}
        wait_for(lambda w=workers: all(map(is_gone, w)), "the workers' end")
        finished = {record["key"] for record in runs_in(folder)}
    assert len(finished) < NUM_CELLS, "it was over before the last kill"
    num_begun = len(begun(folder))
    config = make_config(seconds=0.1)
    result = go(config, folder, processes=2)
    assert result.num_done == NUM_CELLS
    later = begun(folder)[num_begun:]
    assert len(later) == len(set(later)) == NUM_CELLS - len(finished)
    assert not finished & set(later)
    undisturbed = tmp_path / "undisturbed"
    go(config, undisturbed, processes=2)
    assert table(folder) == table(undisturbed)


def test_two_calls_share_the_work(tmp_path):
    folder = tmp_path / "shared"
    processes = [start(folder, 1, 0.05), start(folder, 1, 0.05)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert len(begun(folder)) == NUM_CELLS
    assert set(begun(folder)) == {cell.key for cell in cells(make_config(seconds=0.05))}
    assert len(runs_in(folder)) == NUM_CELLS
    assert len({pid for what, _, pid in made(folder) if what == "begun"}) == 2


def test_what_another_holds_is_waited_for_and_taken_over(tmp_path):
    folder = tmp_path / "held"
    config = make_config(("vanilla",), seeds=(0,))
    first, second = cells(config)
    open_folder(config, folder)
    theirs = {"kind": "run", "key": second.key, "scores": {}}

    console = quiet()

    def finish_one_and_die(locks):
        with locks:
            wait_for(lambda: "another process works at" in console.file.getvalue(), "waiting", 20)
            append_record(folder / "results.jsonl", theirs)

    locks = ExitStack()
    for cell in (first, second):
        assert locks.enter_context(locked(folder / "locks" / cell.key))
    other = threading.Thread(target=finish_one_and_die, args=(locks,))
    other.start()
    assert go(config, folder, console=console).num_done == 2
    other.join()
    assert begun(folder) == [first.key]
    assert f"{second.name}: learn –, forget –, text – (done elsewhere)" in console.file.getvalue()


def test_a_cell_that_raises_is_noted_and_tried_again(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    config = make_config(("raises", "vanilla"), seeds=(0,))
    console = quiet()
    result = go(config, folder, console=console)
    assert (result.num_cells, result.num_done, result.num_failed) == (4, 2, 2)
    assert result.failures[0] == "raises lr=0.001 seed=0 draw=0: ValueError: no luck"
    assert "failed: raises lr=0.001 seed=0 draw=0: ValueError: no luck" in console.file.getvalue()
    failures = read_records(folder / "failures.jsonl")
    assert [f["cell"] for f in failures] == [
        "raises lr=0.001 seed=0 draw=0",
        "raises lr=0.003 seed=0 draw=0",
    ]
    assert "compare_fakes.py" in failures[0]["traceback"]
    assert "and a second line" in failures[0]["traceback"]
    assert "no luck" in (folder / failures[0]["log"]).read_text()
    again = go(config, folder)
    assert (again.num_done, again.num_failed) == (2, 2)
    assert len(begun(folder)) == 2 + 2 + 2


def test_a_worker_that_is_killed_is_noted_and_replaced(tmp_path):
    folder = tmp_path / "run"
    config = make_config(("dies", "vanilla"), seeds=(0,), learning_rates=(1e-3,))
    result = go(config, folder)
    assert (result.num_done, result.num_failed) == (1, 1)
    assert "killed by signal 9 (SIGKILL, which is how" in result.failures[0]
    assert [f["cell"] for f in read_records(folder / "failures.jsonl")] == [
        "dies lr=0.001 seed=0 draw=0"
    ]


def test_a_base_that_cannot_be_made_costs_its_seed_only(tmp_path):
    world = WorldConfig("toy", {"seconds": 0.0, "bad_seeds": [0]})
    config = make_config(("vanilla",), world=world)
    result = go(config, tmp_path / "run", processes=2)
    assert (result.num_done, result.num_failed) == (2, 2)
    assert result.failures == (
        "base seed=0: ValueError: the base knows nothing (2 runs of this seed are left out)",
    )


def test_a_runner_that_cannot_be_imported_is_said_at_once(tmp_path):
    with pytest.raises(RuntimeError, match=r"a worker cannot start(.|\n)*no_such_module"):
        run_grid(
            make_config(), tmp_path / "run", places={}, console=quiet(),
            runner=("no_such_module:run", RUNNER[1]),
        )  # fmt: skip


def test_results_that_cannot_be_written_end_the_grid(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="the results cannot be written"):
        go(make_config(("fills", "vanilla"), seeds=(0,)), folder)
    assert len(begun(folder)) == 1
    assert [record["kind"] for record in read_records(folder / "results.jsonl")] == ["base"]
    assert not (folder / "failures.jsonl").exists()


def test_ctrl_c_ends_the_workers_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, compare_fakes.__file__, folder, "2", "0.5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: runs_in(folder), "a run")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all of them
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "runs are done; the same command goes on from there" in out
    assert err.count("Traceback") == 1  # this process's own, from the script
    assert "leaked" not in err
    assert all(is_gone(pid) for _, _, pid in made(folder))


def test_only_some_methods_and_the_number_of_threads(tmp_path):
    folder = tmp_path / "run"
    config = make_config(threads=3)
    before = dict(os.environ)
    assert go(config, folder, only=["vanilla"]).num_cells == 4
    assert dict(os.environ) == before
    assert {record["method"] for record in runs_in(folder)} == {"vanilla"}
    assert {record["threads"] for record in runs_in(folder)} == {"3"}
    with pytest.raises(ValueError, match=r"no method 'vanila' in the configuration; there are van"):
        go(config, folder, only=["vanila"])


def test_a_folder_of_another_comparison_is_left_alone(tmp_path):
    folder = tmp_path / "run"
    config = make_config()
    open_folder(config, folder)
    # Methods, seeds, rates and threads may change.
    other = make_config(("vanilla", "more"), seeds=(0, 4), threads=2)
    open_folder(other, folder)
    assert load_config(folder) == other
    worse = make_config(world=WorldConfig("toy", {"seconds": 1.0, "size": 2}), budget_tokens=8192)
    with pytest.raises(
        ValueError,
        match=r"world.seconds=1.0 \(was 0.0\), world.size=2 \(was None\), budget_tokens=8192 \(was",
    ):
        open_folder(worse, folder)
    assert load_config(folder) == other
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds files and no comparison"):
        open_folder(config, tmp_path / "mine")
    with pytest.raises(OSError, match="is a file"):
        open_folder(config, tmp_path / "mine" / "thesis.tex")
    assert check_folder(config, tmp_path / "new") is None
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="processes=0"):
        go(config, tmp_path / "new", processes=0)


class TestBoard:
    def test_bases_come_first_and_side_by_side(self):
        config = make_config(("vanilla",))
        all_cells = cells(config)
        board = Board(all_cells, done=(), based=())
        first, second = board.next(0.0), board.next(0.0)
        assert (first, second) == (Base(0), Base(1))
        assert board.next(0.0) is None
        board.done(second)
        assert board.next(0.0) == all_cells[2]  # of seed 1, while seed 0 has no base yet
        board.done(first)
        assert board.next(0.0) == all_cells[0]
        assert not board.is_over

    def test_done_seeds_need_no_base_unless_its_record_is_lost(self):
        all_cells = cells(make_config(("vanilla",)))
        done = [cell.key for cell in all_cells]
        assert Board(all_cells, done, based=[0, 1]).is_over
        board = Board(all_cells, done, based=[1])
        assert board.next(0.0) == Base(0)
        board.done(Base(0))
        assert board.is_over

    def test_a_busy_cell_comes_back_after_the_others(self):
        all_cells = cells(make_config(("vanilla",), seeds=(0,)))
        board = Board(all_cells, done=(), based=())
        board.done(board.next(0.0))
        board.busy(board.next(0.0), 0.0)
        assert board.num_waiting == 1
        other = board.next(0.0)
        assert other == all_cells[1]
        board.done(other)
        assert board.next(PATIENCE_SECONDS / 2) is None
        assert not board.is_over
        assert board.next(PATIENCE_SECONDS) == all_cells[0]
