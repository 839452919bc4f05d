"""What people are told of a run: `mend explain`, `get` and `describe`, and the status as it lies in the resource."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mend.chart import by_attempt, draw_run
from mend.crstatus import UnreadableStatus, from_resource, to_resource
from mend.heartbeats import Phase, Point
from mend.incidents import FailureClass, IncidentKind, IncidentRecord, Origin, Strike, Tier
from mend.journal import CurvePoint
from mend.observation import Observation, PodPhase, WorkerPod
from mend.observe import own_word
from mend.show import age, description, runs_table
from mend.states import Ancestor, CheckpointRef
from mend.status import (
    CheckpointStatus,
    Condition,
    IntervalInForce,
    Ledger,
    LimitInForce,
    MemoryStatus,
    RunPhase,
    RunStatus,
    SaveWish,
    Score,
    Straggler,
    WishState,
)
from mend.story import tell
from world import a_spec

NOW = 1_800_000_000.0
HANG = IncidentRecord(
    id=1,
    kind=IncidentKind.HUNG,
    failure=FailureClass.HANG,
    attempt=1,
    step=41,
    culprit_ranks=(3,),
    culprit_workers=(1,),
    confidence=0.9,
    reasons=("rank 3 is stopped (state T)",),
    summary="no rank has progressed for 2.0 s",
    began_at=NOW - 100,
    detected_at=NOW - 98,
    tier=Tier.RESTART_RANKS,
    restored_step=39,
    recovered_at=NOW - 97,
    steps_lost=2,
)
STATUS = RunStatus(
    phase=RunPhase.RUNNING,
    attempt=2,
    step=63,
    loss=1.25,
    recoveries=1,
    started_at=NOW - 200,
    lineage=(Ancestor(attempt=1, step=39),),
    participants=(0, 1),
    checkpoint=CheckpointStatus(step=59, attempt=2, uri="s3://b/clio/step-59", committed_at=NOW - 30),
    incidents=(HANG,),
    ledger=Ledger(productive=150.0, recovering=1.0, goodput=0.75),
    conditions=(Condition(type="StorageReady", status="True", reason="Ready", since=NOW - 150),),
)


def an_observation(status: RunStatus) -> Observation:
    return Observation(name="clio", namespace="ml", uid="u", generation=1, created_at=NOW - 300, status=status)


def printed(*parts: object) -> str:
    out = io.StringIO()
    console = Console(file=out, width=160, highlight=False)
    for part in parts:
        console.print(part)
    return out.getvalue()


def test_the_story_of_a_hang() -> None:
    """Who, why, what was done and what it cost, in sentences."""
    told = "\n".join(tell("ml/clio", STATUS))
    assert told.startswith("ml/clio: Running, attempt 2, step 63, loss 1.2500, checkpoint of step 59 (committed)")
    for words in (
        "hung in attempt 1 after step 41: no rank has progressed for 2.0 s",
        "noticed  2.00 s after it began",
        "blamed   rank 3 on worker 1, 90% sure",
        "- rank 3 is stopped (state T)",
        "done     restart-ranks, from the checkpoint of step 39",
        "cost     3.00 s from the fault to the first new step, 2 steps lost",
        "Goodput 75.0%",
    ):
        assert words in told


def test_nobody_is_blamed_without_evidence() -> None:
    """An unknown culprit is said to be unknown, an incident that goes on has no price yet."""
    open_one = IncidentRecord(
        id=1, kind=IncidentKind.HUNG, failure=FailureClass.HANG, attempt=1, step=3, began_at=1.0, detected_at=2.0
    )
    told = "\n".join(tell("ml/clio", RunStatus(incidents=(open_one,))))
    assert "blamed   nobody: the evidence does not say" in told
    assert "done     evidence is being gathered" in told
    assert "cost     not known yet" in told


def test_a_failed_run_says_why_first() -> None:
    """The reason of the end, and what is wrong with storage, stand above everything else."""
    conditions = (
        Condition(type="Failed", status="True", reason="GaveUp", message="the same failure twice"),
        Condition(type="StorageReady", status="False", reason="Forbidden", message="s3://b: denied"),
    )
    told = list(tell("ml/clio", RunStatus(phase=RunPhase.FAILED, conditions=conditions)))
    assert told[1:3] == ["  ! GaveUp: the same failure twice", "  ! StorageReady: Forbidden: s3://b: denied"]


def test_a_row_of_mend_get() -> None:
    """One line holds where the run is and what went wrong last; a run that has not begun shows dashes."""
    lines = printed(
        runs_table([an_observation(STATUS), an_observation(RunStatus())], NOW, with_namespace=True)
    ).splitlines()
    assert lines[0].split()[:8] == ["NAMESPACE", "NAME", "PHASE", "STEP", "LOSS", "ATTEMPT", "RECOVERIES", "CHECKPOINT"]
    assert lines[1].split()[:7] == ["ml", "clio", "Running", "63", "1.2500", "2", "1"]
    assert "step 59, 30s ago" in lines[1]
    assert "no rank has progressed for 2.0 s" in lines[1]
    assert lines[2].split() == ["ml", "clio", "Pending", "-", "-", "0", "0", "-", "-", "5m"]


def test_a_run_that_cannot_be_read_has_its_row() -> None:
    """One status that another version wrote does not hide the other runs; its row says which field it is."""
    meta = {"namespace": "ml", "name": "newer", "uid": "u", "creationTimestamp": "2027-01-15T07:55:00Z"}
    unreadable = own_word({"metadata": meta, "status": {"phase": "Thinking"}}, 1_800_000_000.0)
    lines = printed(runs_table([unreadable, an_observation(STATUS)], NOW, with_namespace=True)).splitlines()
    assert lines[1].split()[:10] == ["ml", "newer", "Unreadable", *"------", "5m"]
    assert "status: Invalid enum value 'Thinking' - at `$.phase`; if a new" in lines[1]
    assert lines[2].split()[:3] == ["ml", "clio", "Running"]


def test_mend_describe() -> None:
    """Workers with their pods, conditions, lineage, checkpoint and the story; markup in messages stays text."""
    pods = [
        WorkerPod(index=1, name="clio-1-a2", uid="u1", phase=PodPhase.RUNNING, node="n2", attempt=2),
        WorkerPod(index=2, name="clio-2-a2", uid="u2", phase=PodPhase.PENDING, attempt=2, reason="ErrImagePull [red]"),
    ]
    told = printed(*description(an_observation(STATUS), pods, NOW))
    for words in ("clio-1-a2", "takes part", "ErrImagePull [red]", "StorageReady", "2m30s", "attempt 1 to step 39"):
        assert words in told
    assert "Checkpoint: step 59, 30s ago, s3://b/clio/step-59" in told
    assert "blamed   rank 3 on worker 1" in told


def test_mend_describe_shows_what_lies_in_memory_and_where_this_attempt_came_from() -> None:
    """The newest step that memory would bring back, how safe it is, what it needs; and the origin of the state."""
    memory = MemoryStatus(
        step=62, attempt=2, seen_at=NOW - 4, workers=4, copied=True, needed_bytes=12 << 30, limit_bytes=64 << 30
    )
    ref = CheckpointRef(uri="memory:0a1b", step=39, attempt=1)
    status = msgspec.structs.replace(STATUS, memory=memory, restored_step=39, origin=Origin.PEER, restore=(ref,))
    told = printed(*description(an_observation(status), [], NOW))
    began = "this attempt began from the snapshot of step 39, with copies that a buddy kept"
    assert f"Lineage: attempt 1 to step 39; {began}" in told
    assert "In memory: step 62 of attempt 2 on 4 workers, copied to buddies, for 4s" in told
    assert "Snapshots need 12 GiB in each worker of its limit of 64 GiB" in told
    assert "May restart from: step 39 of attempt 1, in the memory of workers" in told
    bare = MemoryStatus(step=62, attempt=2, workers=1, copied=False, needed_bytes=1 << 20)
    told = printed(*description(an_observation(msgspec.structs.replace(STATUS, memory=bare)), [], NOW))
    assert "In memory: step 62 of attempt 2 on 1 worker, NOT copied to buddies yet" in told
    assert "Snapshots need 1 MiB in each worker, which has no limit" in told
    assert "Lineage: attempt 1 to step 39; this attempt has not said yet what it begins with" in told


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (Origin.RANKS, "from step 39 in the memory of its peers"),
        (Origin.MEMORY, "from the snapshot of step 39 in its workers' own memory"),
        (Origin.PEER, "from the snapshot of step 39, with copies that a buddy kept"),
        (Origin.STORE, "from the checkpoint of step 39"),
        (None, "from the checkpoint of step 39"),
    ],
)
def test_the_story_says_where_the_state_came_from(origin: Origin | None, words: str) -> None:
    """An older mend did not note it: then it was a checkpoint."""
    back = msgspec.structs.replace(HANG, origin=origin)
    told = list(tell("ml/clio", msgspec.structs.replace(STATUS, incidents=(back,))))
    assert any(line.endswith(f"restart-ranks, {words}") for line in told)


def test_mend_describe_tells_how_often_a_run_saves_and_why() -> None:
    """The interval that mend chose with its reasons, what became of a wish, and the best checkpoints."""
    status = msgspec.structs.replace(
        STATUS,
        interval=IntervalInForce(
            seconds=147.0, cost_seconds=0.5, commit_seconds=8.0, failures=3, active_seconds=7200.0
        ),
        wish=SaveWish(id="x", step=58, asked_at=NOW - 90, state=WishState.GIVEN_UP),
        scores=(Score(name="acc", step=59, attempt=2, value=0.5),),
    )
    told = " ".join(printed(*description(an_observation(status), [], NOW)).split())
    assert "Saves every 147 s: a save stops the loop for 0.5 s and is committed after 8 s; 3 recoveries in 2 h" in told
    assert "Save asked for 1m30s ago, at step 58: given-up" in told
    assert "Score: acc 0.5, step 59 of attempt 2" in told


def test_mend_describe_shows_strikes() -> None:
    """Those that the run gave, as long as they count or were lifted; one that has expired is of no concern."""
    given = [
        Strike(id=f"u/{n}", node=f"node-{n}", run="ml/clio", reason="not ready", struck_at=NOW - 7200, expires_at=until)
        for n, until in enumerate((NOW + 3600, NOW - 1))
    ]
    told = printed(*description(an_observation(msgspec.structs.replace(STATUS, strikes=tuple(given))), [], NOW))
    assert "Strike: node-0: not ready (run ml/clio, 2.0 h ago, for another 1.0 h)" in told
    assert "node-1" not in told


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-3, "0s"), (59.9, "59s"), (60, "1m"), (119, "1m59s"), (700, "11m"), (3700, "1h1m"), (90000, "1d1h")],
)
def test_ages_read_as_kubectl_shows_them(seconds: float, shown: str) -> None:
    """Two units at most, and a clock that was set back shows no negative age."""
    assert age(seconds) == shown


@given(st.floats(min_value=0, max_value=4e9), st.floats(min_value=0, max_value=4e9))
def test_a_status_survives_the_resource(at: float, since: float) -> None:
    """Times become RFC 3339 and come back to the microsecond; all else comes back as it was."""
    at, since = round(at, 6), round(since, 6)
    status = RunStatus(
        attempt=3, started_at=at, conditions=(Condition(type="A", status="True", reason="R", since=since),)
    )
    back = from_resource(to_resource(status))
    assert back.started_at == pytest.approx(at, abs=2e-6)
    assert back.conditions[0].since == pytest.approx(since, abs=2e-6)
    assert (back.attempt, back.phase, back.incidents) == (3, status.phase, ())


def test_columns_find_their_fields() -> None:
    """What kubectl's columns show is there even while it has its default."""
    raw = to_resource(RunStatus())
    assert (raw["phase"], raw["attempt"], raw["step"], raw["recoveries"]) == ("Pending", 0, -1, 0)


@pytest.mark.parametrize("raw", [{"attempt": "x"}, {"startedAt": "yesterday"}, [], "text", {"conditions": [3]}])
def test_a_status_of_somebody_else_is_refused(raw: object) -> None:
    """With the remedy, rather than to start the run from scratch."""
    with pytest.raises(UnreadableStatus, match="delete the status or restore it from a backup"):
        from_resource(raw or "text")


def test_the_picture_of_a_restarted_run(tmp_path: Path) -> None:
    """One curve per attempt, points without a finite loss and other curves left out."""
    points = [
        CurvePoint(attempt=attempt, point=Point(step=step, loss=loss, tokens=0, seconds=0.1, name=name))
        for attempt, step, loss, name in [
            (2, 1, 0.5, "loss"),
            (1, 1, 0.5, "loss"),
            (1, 0, 0.9, "loss"),
            (1, 2, None, "loss"),
            (1, 1, 0.7, "accuracy"),
        ]
    ]
    assert by_attempt(points) == {1: [(0, 0.9), (1, 0.5)], 2: [(1, 0.5)]}
    draw_run(points, [HANG], "clio", tmp_path / "deep" / "run.png", unbroken=points[1:3])
    assert (tmp_path / "deep" / "run.png").read_bytes()[:4] == b"\x89PNG"


def test_describe_says_which_limits_hold_and_what_they_come_from() -> None:
    """The spec as it was understood, both bounds of each phase with their samples, and who is slow since when."""
    limits = (
        LimitInForce(
            phase=Phase.STEP,
            limit_seconds=1.0,
            patience_seconds=6.0,
            samples=64,
            median_seconds=0.5,
            longest_seconds=0.75,
        ),
        LimitInForce(phase=Phase.SAVING, limit_seconds=600.0, patience_seconds=600.0),
    )
    slow = Straggler(rank=3, worker=1, factor=1.5, work_seconds=0.3, began_at=NOW - 60)
    kept = msgspec.json.encode(a_spec(2, 2)).decode()
    status = msgspec.structs.replace(STATUS, limits=limits, stragglers=(slow,), accepted_spec=kept)
    text = " ".join(printed(*description(an_observation(status), [], NOW)).split())
    assert "Workers: 2 of 2 ranks Saves: to s3://bucket/clio, every 10 steps" in text
    assert "step 1 s 6 s 64 samples: median 0.5 s, longest 0.75 s" in text
    assert "saving 600 s 600 s nothing yet: the spec's" in text
    assert "rank 3 1 1.50x 0.3 s 1m" in text
