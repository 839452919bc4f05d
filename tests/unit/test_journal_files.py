"""The journal on disk: appended to by one controller after another, torn by kills, full, and read again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mend import journal
from mend.journal import Entry, Journal, UnreadableJournal, changes_something, read_curve, read_journal, replay
from mend.model import Decision, Observation, RunPhase, RunStatus
from mend.protocol import Point
from mend.spec import parse_spec

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
