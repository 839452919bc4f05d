"""The journal on disk: appended to by one controller after another, torn by kills, full, and read again."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec
import pytest

from mend import journal
from mend.actions import Decision
from mend.heartbeats import Point
from mend.journal import Entry, Journal, UnreadableJournal, changes_something, read_curve, read_journal, replay
from mend.observation import Observation
from mend.room import make_room
from mend.spec import parse_spec
from mend.status import RunPhase, RunStatus

RUN = "ml/clio"
SPEC = parse_spec(
    {
        "workers": {
            "replicas": 1,
            "template": {"spec": {"containers": [{"name": "trainer", "image": "i", "command": ["c"]}]}},
        },
        "checkpoint": {"uri": "s3://bucket/clio"},
    }
)


def an_entry(attempt: int, before: int = 1) -> Entry:
    seen = Observation(
        name="clio", namespace="ml", uid="u", generation=1, created_at=0, status=RunStatus(attempt=before)
    )
    return Entry(now=5.0, spec=SPEC, seen=seen, decision=Decision(status=RunStatus(attempt=attempt)))


def points(*steps: int, name: str = "loss") -> tuple[Point, ...]:
    return tuple(Point(step=step, loss=1.0 / (step + 1), tokens=step, seconds=0.1, name=name) for step in steps)


def written(folder: Path) -> list[tuple[int, int, str]]:
    path = Journal(folder).curve_path(RUN)
    return [(each.attempt, each.point.step, each.point.name) for each in read_curve(path)]


def test_points_are_written_once(tmp_path: Path) -> None:
    """An agent tells its whole attempt to each new listener, a new controller too; each point is kept once."""
    first = Journal(tmp_path)
    first.measured(RUN, 1, points(0, 1, 2))
    first.measured(RUN, 1, points(0, 1, 2, 3))
    Journal(tmp_path).measured(RUN, 1, points(0, 1, 2, 3, 4))
    assert written(tmp_path) == [(1, step, "loss") for step in range(5)]


def test_curves_of_other_names_have_points_of_their_own(tmp_path: Path) -> None:
    """An evaluation at a step whose loss is known already is no repetition."""
    journal = Journal(tmp_path)
    journal.measured(RUN, 1, points(0, 1))
    journal.measured(RUN, 1, points(1, name="held_out_loss"))
    assert written(tmp_path) == [(1, 0, "loss"), (1, 1, "loss"), (1, 1, "held_out_loss")]


def test_steps_done_again_by_a_later_attempt_are_kept(tmp_path: Path) -> None:
    """That is what the picture of a restarted run shows."""
    journal = Journal(tmp_path)
    journal.measured(RUN, 1, points(0, 1, 2))
    journal.measured(RUN, 2, points(1, 2))
    assert written(tmp_path)[3:] == [(2, 1, "loss"), (2, 2, "loss")]


def test_a_run_made_anew_is_another_story(tmp_path: Path) -> None:
    """What an earlier run of the name has left is put aside, not mixed in and not lost."""
    journal = Journal(tmp_path)
    journal.decided(RUN, an_entry(attempt=9))
    journal.measured(RUN, 9, points(100))
    journal.decided(RUN, an_entry(attempt=1, before=0))
    journal.measured(RUN, 1, points(0))
    assert written(tmp_path) == [(1, 0, "loss")]
    assert [each.decision.status.attempt for each in read_journal(journal.path(RUN))] == [1]
    assert (tmp_path / "ml_clio.curve.before.jsonl").exists()


def test_the_older_half_goes_when_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its limit a file begins anew; the curve is read with its older half."""
    monkeypatch.setattr(journal, "ROTATE_BYTES", 200)
    mine = Journal(tmp_path)
    for step in range(10):
        mine.measured(RUN, 1, points(step))
    steps = [step for _, step, _ in written(tmp_path)]
    assert steps == list(range(steps[0], 10))
    assert 2 <= len(steps) < 10


def test_the_folder_keeps_its_bound(tmp_path: Path) -> None:
    """However much is written, for however many runs, all files stay below the bound together; the newest is whole."""
    mine = Journal(tmp_path, most_bytes=20_000)
    for number in range(100):
        for attempt in (2, 3):
            mine.decided(f"ml/run-{number}", an_entry(attempt))
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
    entries = list(read_journal(mine.path("ml/run-99")))
    assert [each.decision.status.attempt for each in entries] == [2, 3]


def test_the_past_of_runs_that_are_gone_goes_first(tmp_path: Path) -> None:
    """Then the older halves of the living, oldest first; what is not the journal's is left alone."""
    ages = {
        "ml_here.journal.jsonl": 9,
        "ml_here.journal.1.jsonl": 8,
        "ml_here.curve.before.jsonl": 7,
        "ml_gone.journal.jsonl": 1,
        "ml_gone.curve.1.jsonl": 2,
        "notes.jsonl": 20,
    }
    for name, age in ages.items():
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    order = ["ml_gone.curve.1", "ml_gone.journal", "ml_here.journal.1", "ml_here.curve.before", "ml_here.journal"]
    for count in range(len(order) + 1):
        assert make_room(tmp_path, 500 - 100 * count, lambda stem: stem == "ml_here") == tuple(
            tmp_path / f"{name}.jsonl" for name in order[max(0, count - 1) : count]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.jsonl"]


def test_a_journal_asks_which_runs_are_there(tmp_path: Path) -> None:
    """By the names that they have in the cluster; a run whose name has a dot is itself."""
    asked = set()
    line_bytes = len(msgspec.json.encode(an_entry(2)))
    mine = Journal(tmp_path, most_bytes=10 * line_bytes)
    mine.follow_runs(lambda run: asked.add(run) is None and run == "ml/clio.3b")
    for attempt in range(2, 5):
        mine.decided("ml/clio.3b", an_entry(attempt))
    for attempt in range(2, 15):
        mine.decided("ml/old", an_entry(attempt))
    assert asked == {"ml/clio.3b", "ml/old"}
    assert mine.path("ml/clio.3b").exists()


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    """A controller that was killed while it wrote spoils one line; the others are read."""
    journal = Journal(tmp_path)
    journal.decided(RUN, an_entry(attempt=2))
    with journal.path(RUN).open("ab") as file:
        file.write(b'{"now":5.0,"spe\n')
    journal.decided(RUN, an_entry(attempt=3))
    with journal.path(RUN).open("ab") as file:
        file.write(b'{"now":5.0,"sp')
    assert [each.decision.status.attempt for each in read_journal(journal.path(RUN))] == [2, 3]


def test_a_file_of_something_else_is_named_with_the_line(tmp_path: Path) -> None:
    """Valid JSON that is no entry is refused: it was written by another version, or is another file."""
    path = tmp_path / "x.journal.jsonl"
    path.write_text('{"now": "then"}\n')
    with pytest.raises(UnreadableJournal, match=r"x\.journal\.jsonl:1: .*was it written by this version of mend"):
        list(read_journal(path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The controller goes on without its journal, and complains once."""
    journal = Journal(tmp_path)
    journal.path(RUN).symlink_to("/dev/full")
    with caplog.at_level(logging.ERROR):
        journal.decided(RUN, an_entry(attempt=2))
        journal.decided(RUN, an_entry(attempt=3))
    assert ["No space left on device" in each.message for each in caplog.records] == [True]


def test_what_is_worth_a_line() -> None:
    """Progress alone is none; a new phase, attempt or action is."""
    seen = an_entry(attempt=1).seen
    assert not changes_something(seen, Decision(status=RunStatus(attempt=1, step=7)))
    assert changes_something(seen, Decision(status=RunStatus(attempt=2)))
    assert changes_something(seen, Decision(status=RunStatus(attempt=1, phase=RunPhase.FAILED)))


def test_replay_tells_where_todays_code_would_decide_otherwise(tmp_path: Path) -> None:
    """A line that nobody's code has decided differs, and is named by its number."""
    journal = Journal(tmp_path)
    journal.decided(RUN, an_entry(attempt=77))
    different = list(replay(journal.path(RUN)))
    assert [each.line for each in different] == [1]
    assert different[0].then.status.attempt == 77
    assert different[0].today.status.attempt != 77
