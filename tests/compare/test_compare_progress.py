from io import StringIO

import pytest
from compare_fakes import make_config
from rich.console import Console

from gradloc.compare.grid import cells
from gradloc.compare.messages import Base
from gradloc.compare.progress import GridProgress, duration, result_line, seconds_left

ALL = cells(make_config(("vanilla", "tgl-fp"), seeds=(0,)))


def record(learn, seconds=60.0, method="vanilla"):
    probes = {"updated": {"nll": learn}, "new": {"nll": learn}, "unchanged": {"nll": 0.5}}
    scores = {"1": {"probes": probes, "text": {"old": {"nll": 3.25}}}}
    return {"method": method, "scores": scores, "seconds": {"total": seconds}}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (61, "1:01 min"), (3599, "59:59 min"), (12_000, "3:20 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_is_by_the_median_of_each_method():
    assert seconds_left(["a", "b"], [], 1) is None
    done = [
        *(record(1.0, seconds, "a") for seconds in (10.0, 20.0, 600.0)),
        record(1.0, 50.0, "b"),
        {"method": "b"},  # one without a time
    ]
    # c has none of its own and counts as the median of all, 35.
    assert seconds_left(["a", "a", "b", "c"], done, 2) == (20 + 20 + 50 + 35) / 2
    assert seconds_left([], done, 2) == 0


def test_a_result_in_a_line():
    assert result_line(record(1.25)) == "learn 1.250, forget 0.500, text 3.250"
    assert result_line({}) == "learn –, forget –, text –"


def test_a_terminal_shows_bar_workers_and_last_results():
    console = Console(file=StringIO(), force_terminal=True, width=100, height=30, no_color=True)
    done = {ALL[0].key: record(1.0)}

    def shown(progress):
        # On paper: the terminal also gets what moves the cursor.
        paper = Console(file=StringIO(), width=100)
        paper.print(progress._rendered())
        return [line.rstrip() for line in paper.file.getvalue().splitlines()]

    with GridProgress(console, ALL, done, num_workers=2) as progress:
        head, first, second = shown(progress)
        assert "1/4 runs  0 s, 1:30 min left" in head
        assert first.split() == ["1", "starting", "0", "s"]
        progress.began(1, Base(0))
        progress.note(1, "asking [what] is known")
        progress.began(2, ALL[1])
        progress.step(2, 30, 100)
        head, first, second = shown(progress)
        assert "base seed=0" in first
        assert "asking [what] is known" in first
        assert "tgl-fp lr=0.001 seed=0 draw=0" in second
        assert "━" in second
        assert "30/100" in second
        progress.done(2, record(2.0), elsewhere=False)
        progress.waiting(1)
        progress.failed("base seed=0: no luck", ALL[2:3])
        head, first, second, *last = shown(progress)
        assert "2/4 runs, 1 failed, 1 in work elsewhere  0 s, 30 s left" in head
        assert "waiting" in second
        assert last == [
            "tgl-fp lr=0.001 seed=0 draw=0: learn 2.000, forget 0.500, text 3.250 (0 s)"
        ]
    assert "failed: base seed=0: no luck" in console.file.getvalue()


def test_nothing_to_do_shows_nothing():
    console = Console(file=StringIO())
    with GridProgress(console, ALL, {cell.key: record(1.0) for cell in ALL}, num_workers=0):
        pass
    assert console.file.getvalue() == ""
