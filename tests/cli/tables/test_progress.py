"""Progress on stderr: what must be legible at any width, and how long the rest is said to take."""

import io
import re
import sys

import pytest
from rich.console import Console

from advmoe_deploy.cli.tables.progress import PlainProgress, RichProgress, Tasks
from tests.cli.command_line import Capture

FIGURES = {
    "loss": 1.907,
    "clean_accuracy": 0.725,
    "pgd_accuracy": 0.175,
    "robust_accuracy": 0.0775,
    "router_flips_after": 0.25,
}


def test_plain_progress_is_a_line_per_task(capsys: Capture) -> None:
    progress = PlainProgress(sys.stderr, every=0.0)
    progress.start("train", 4)
    progress.advance("train", 2, loss=0.5)
    progress.advance("train", 2, robust_accuracy=0.25)
    progress.finish("train")
    assert capsys.readouterr().err.splitlines() == [
        "train 2/4, 0:00 left loss 0.5",
        "train 4/4, 0:00 left loss 0.5  robust accuracy 25.0 %",
        "train 4/4 loss 0.5  robust accuracy 25.0 %",
    ]
    quiet = PlainProgress(sys.stderr)
    quiet.start("train", 4)
    quiet.advance("train")
    assert capsys.readouterr().err == ""


def test_rich_progress_draws_tasks_within_tasks(capsys: Capture) -> None:
    progress = RichProgress(sys.stderr)
    progress.start("outer [x]", 2)
    progress.start("inner", 3)
    progress.advance("inner", 3, loss=0.125)
    progress.finish("inner")
    progress.note("a [note]")
    progress.advance("outer [x]", robust_accuracy=0.5)
    progress.finish("outer [x]")
    progress.pause()
    err = capsys.readouterr().err
    for text in ("outer [x]", "1/2", "robust accuracy 50.0 %", "a [note]"):
        assert text in err


def test_figures_may_come_while_others_are_drawn(capsys: Capture) -> None:
    class Late(float):
        """A figure in whose drawing the work goes on, as a thread's may at any point."""

        def __format__(self, how: str) -> str:
            progress.advance("train", 0, accuracy=0.5)
            return super().__format__(how)

    progress = PlainProgress(sys.stderr, every=1e9)
    progress.start("train", 1)
    progress.advance("train", loss=Late(2.0))
    progress.finish("train")
    assert capsys.readouterr().err == "train 1/1 loss 2\n"


def test_the_time_left_counts_what_a_part_has_done_of_its_step() -> None:
    tasks = Tasks()
    tasks.start("verify", 4, done=1)
    (verify,) = tasks.running
    verify.since -= 30
    assert tasks.seconds_left(verify) is None
    tasks.advance("verify", 1, {})
    tasks.start("other: train", 10, done=0)  # beside it, not a part
    tasks.start("pgd", 8, done=0)
    tasks.advance("pgd", 4, {})
    # Half of the third step: 1.5 steps took 30 s, 1.5 are left.
    assert tasks.seconds_left(verify) == pytest.approx(30, abs=1)
    # At the last step, the part alone tells: a quarter took 20 s.
    tasks.advance("verify", 2, {})
    tasks.running[-1].since -= 20
    tasks.running[-1].done = 2
    assert tasks.seconds_left(verify) == pytest.approx(60, abs=1)
    assert tasks.is_part("pgd")
    assert not tasks.is_part("other: train")
    tasks.advance("pgd", 9, {})
    assert tasks.running[-1].count == "8/8"


def test_a_second_part_of_one_step_does_not_tell_how_far_it_is() -> None:
    tasks = Tasks()
    tasks.start("export", 1, 0)
    tasks.start("attack", 100, 0)
    export = tasks.running[0]
    export.since = export.stepped = export.since - 100
    tasks.advance("attack", 100, {})
    tasks.finish("attack")
    tasks.start("pathways", 100, 0)
    tasks.running[-1].since -= 10
    tasks.advance("pathways", 1, {})
    # One of a hundred in 10 s; that the hundred seconds before bought 1 % would be another hour.
    assert tasks.seconds_left(export) == pytest.approx(990, abs=5)
    tasks.finish("pathways")
    tasks.advance("export", 1, {})
    assert tasks.seconds_left(export) == pytest.approx(0, abs=1)


def test_second_parts_of_later_steps_go_by_whole_steps() -> None:
    tasks = Tasks()
    tasks.start("sweep", 6, 0)
    sweep = tasks.running[0]
    for done, gone in ((0, 110), (1, 230)):  # runs of 120 s, in the test half way through
        sweep.done, sweep.since = done, sweep.since - gone
        sweep.stepped = sweep.since + 120 * done
        tasks.start("train", 10, 0)
        tasks.finish("train")
        tasks.start("test", 20, 0)
        tasks.running[-1].since -= 10
        tasks.advance("test", 10, {})
        assert tasks.seconds_left(sweep) == pytest.approx(10 + 120 * (5 - done), abs=1)
        tasks.finish("test")
        sweep.parts_over, sweep.since = 0, sweep.since + gone


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_bar_count_and_time_left_stay_on_one_line(width: int, capsys: Capture) -> None:
    progress = RichProgress(sys.stderr)
    progress._console.width = width
    progress.start("pgd-100 straight-through margin 9 targets x3", 12_345, done=9_999)
    progress.advance("pgd-100 straight-through margin 9 targets x3", 1, **FIGURES)
    console = Console(width=width, file=io.StringIO())
    console.print(progress._drawn())
    progress.pause()
    bar, *figures = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(bar.rstrip()) <= width
    assert re.search(r"^pgd-10.*━+.* +10000/12345 0:00 eta \d+:\d\d$", bar.rstrip())
    told = " ".join(figures)
    assert all(len(line) <= width for line in figures)
    for text in ("clean accuracy 72.5 %", "PGD accuracy 17.5 %", "router flips after 0.25"):
        assert text in told
