"""Which heartbeats wake the controller, and what is learnt from them about the length of steps."""

from __future__ import annotations

import msgspec
import pytest

from fake_agent import a_heartbeat, a_rank
from mend.heard import EVALUATIONS, SAMPLES, Evaluations, StepSamples, is_news, is_stale
from mend.heartbeats import AgentState, Heartbeat, Phase, Point, RankError, RankExit, SaveReport
from mend.states import CheckpointRef

REF = CheckpointRef(uri="s3://b/p/step-1/x", step=1, attempt=1)
BEFORE = a_heartbeat(save=SaveReport(failures=0))


@pytest.mark.parametrize(
    "after",
    [
        a_heartbeat(state=AgentState.FINISHED),
        a_heartbeat(attempt=2),
        a_heartbeat(agent_id="agent-2"),
        a_heartbeat(terminating=True),
        a_heartbeat(restored=REF),
        a_heartbeat(quarantined=("s3://b/p/step-1/x",)),
        a_heartbeat(standbys_ready=1),
        a_heartbeat(save=SaveReport(committed=REF)),
        a_heartbeat(save=SaveReport(failures=1)),
        a_heartbeat(ranks=1),
        a_heartbeat(reports=(a_rank(0), a_rank(1, exit=RankExit(signal=9)))),
        a_heartbeat(reports=(a_rank(0), a_rank(1, error=RankError(type="ValueError", message="no")))),
        a_heartbeat(reports=(a_rank(0), a_rank(1, nonfinite=True))),
        a_heartbeat(reports=(a_rank(0), a_rank(1, steps_done=0))),
    ],
)
def test_changes_that_a_decision_may_depend_on_are_news(after: Heartbeat) -> None:
    """Exits, errors, states, attempts, checkpoints and first steps wake the controller."""
    assert is_news(BEFORE, after)


@pytest.mark.parametrize(
    "after",
    [
        a_heartbeat(sequence=2),
        a_heartbeat(reports=(a_rank(0, 7, 0.4, loss=1.5), a_rank(1, 7, progress_seconds=0.2))),
        a_heartbeat(save=SaveReport(committed_age_seconds=3.0)),
    ],
)
def test_mere_progress_is_no_news(after: Heartbeat) -> None:
    """Steps, losses and ages change in every heartbeat and wake nobody."""
    assert not is_news(BEFORE, after)


@pytest.mark.parametrize(
    ("new", "stale"),
    [
        (a_heartbeat(attempt=3, sequence=6), False),
        (a_heartbeat(attempt=2, sequence=6), False),
        (a_heartbeat(attempt=1, sequence=6), True),
        (a_heartbeat(attempt=2, sequence=4), True),
        (a_heartbeat(attempt=3, sequence=4), True),
        (a_heartbeat(attempt=0, sequence=0, agent_id="agent-2"), False),
    ],
)
def test_attempts_and_sequences_of_one_agent_only_grow(new: Heartbeat, stale: bool) -> None:
    """What is older than the last heartbeat of the same agent is stale; a restarted agent starts over."""
    assert is_stale(a_heartbeat(attempt=2, sequence=5), new) is stale


def test_step_times_hold_one_sample_for_each_step_of_the_gang() -> None:
    """Whichever rank tells a step first gives its length; repeats, first steps and other attempts give nothing."""
    samples = StepSamples(attempt=1)
    samples.add(a_heartbeat(reports=(a_rank(0, 1, 9.0), a_rank(1, 1, 9.0))))  # the first step
    samples.add(a_heartbeat(reports=(a_rank(0, 2, 0.2), a_rank(1, 2, 0.3))))
    samples.add(a_heartbeat(reports=(a_rank(0, 2, 0.2), a_rank(1, 3, 0.4))))
    samples.add(a_heartbeat(attempt=2, reports=(a_rank(0, 9, 7.0),)))
    assert samples.times().seconds == (0.2, 0.4)


def test_the_longest_gap_of_any_rank_is_learnt_once_for_all_attempts() -> None:
    """A phase is as slow as its slowest rank; the next attempt knows it too, but learns its steps anew."""
    samples = StepSamples(attempt=1)
    for rank, gap in ((0, 0.5), (1, 2.0), (0, 1.0)):
        report = msgspec.structs.replace(a_rank(rank, 2, 0.2), longest_gaps={Phase.SAVING: gap})
        samples.add(a_heartbeat(reports=(report,)))
    assert samples.times().longest_gaps == {Phase.SAVING: 2.0}
    samples.add(a_heartbeat(reports=(a_rank(0, 3, 0.2),)))
    following = StepSamples(2, samples).times()
    assert following.longest_gaps == {Phase.SAVING: 2.0}
    assert following.seconds == ()


def test_step_times_are_bounded_and_positive() -> None:
    """Only the newest samples are kept, and lengths that cannot be are left out."""
    samples = StepSamples(attempt=1)
    for step in range(2, 200):
        samples.add(a_heartbeat(reports=(a_rank(0, step, step_seconds=float(step) if step % 2 else -1.0),)))
    assert len(samples.times().seconds) == SAMPLES
    assert samples.times().seconds[-1] == 199.0


def test_evaluations_that_are_told_again_are_no_news() -> None:
    """Each listener hears all points of the attempt anew; the newest of each metric are kept, the loss is none."""

    def points(*steps: int, name: str = "acc") -> list[Point]:
        return [Point(step=step, loss=step / 10, tokens=0, seconds=0.0, name=name) for step in steps]

    heard = Evaluations(attempt=3)
    assert not heard.add(points(1, 2, 3, name="loss"))
    assert heard.add(points(10, 20))
    assert not heard.add(points(10, 20))
    assert heard.add([*points(10, 20, 30), *points(10, name="f1")])
    assert [(each.step, each.value, each.attempt) for each in heard.told("acc")] == [
        (10, 1.0, 3),
        (20, 2.0, 3),
        (30, 3.0, 3),
    ]
    assert [each.step for each in heard.told("f1")] == [10]
    assert heard.told("loss") == ()
    assert not heard.add([Point(step=40, loss=None, tokens=0, seconds=0.0, name="acc")])
    assert heard.add(points(*range(40, 40 + 10 * EVALUATIONS, 10)))
    assert not heard.add(points(10, 20))
    assert len(heard.told("acc")) == EVALUATIONS
