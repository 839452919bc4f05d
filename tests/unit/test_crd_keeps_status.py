"""A status that is written into the CR comes back unharmed: nothing is pruned, nothing is refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from crds import sample, schema
from mend.crstatus import from_resource, to_resource
from mend.heartbeats import Phase
from mend.incidents import FailureClass, IncidentKind, IncidentRecord, Origin, Strike, Tier
from mend.states import Ancestor, CheckpointRef
from mend.status import (
    CheckpointStatus,
    Condition,
    Evaluation,
    IntervalInForce,
    Ledger,
    LimitInForce,
    MemoryStatus,
    NodeCheck,
    RunPhase,
    RunStatus,
    SaveWish,
    Score,
    Straggler,
    WishState,
    WorkerCounts,
)
from mend_local.schema import Schema

INCIDENT = IncidentRecord(
    id=7,
    kind=IncidentKind.HUNG,
    failure=FailureClass.HANG,
    attempt=3,
    step=120,
    culprit_ranks=(3,),
    culprit_workers=(1,),
    confidence=0.98,
    reasons=("rank 3 is stopped (state T)",),
    summary="rank 3 is stopped",
    fingerprint="x",
    began_at=1_000_000.25,
    detected_at=1_000_001.5,
    gather_until=1_000_003.5,
    tier=Tier.REPLACE_WORKER,
    restored_step=110,
    origin=Origin.PEER,
    recovered_at=1_000_009.75,
    steps_lost=10,
)
FULL = RunStatus(
    phase=RunPhase.RECOVERING,
    observed_generation=2,
    attempt=4,
    attempt_started_at=1_000_002.5,
    follows=3,
    saving_until=1_000_020.5,
    lineage=(Ancestor(attempt=1, step=50, uid="uid-0"), Ancestor(attempt=3, step=110)),
    participants=(0, 1),
    places=(0, 2),
    check=NodeCheck(why="again", suspects=(1,), asked=(0, 1), round=2, doubted=(1,), until=1_000_020.5),
    strikes=(
        Strike(
            id="uid/1/n1",
            node="n1",
            run="default/clio",
            reason="node n1 is not ready",
            struck_at=1_000_001.5,
            expires_at=1_086_401.5,
            decisive=True,
            presumed=True,
            lifted=True,
        ),
    ),
    restore=(CheckpointRef(uri="s3://b/x/step-110", step=110, attempt=3),),
    origins=(Origin.STORE,),
    keep=(0, 1, 3),
    restored_step=110,
    origin=Origin.PEER,
    roll_back_before=200,
    step=120,
    loss=2.5,
    tokens=4096,
    recoveries=3,
    started_at=999_000.0,
    finished_at=1_000_100.0,
    reported_at=1_000_010.0,
    accounted_at=1_000_010.5,
    checkpoint=CheckpointStatus(step=110, attempt=3, uri="s3://b/x", committed_at=999_999.5, verified=True),
    wish=SaveWish(
        id="ask-1",
        step=121,
        asked_at=1_000_003.5,
        by_interval=True,
        state=WishState.GIVEN_UP,
        attempt=4,
        told_at=1_000_004.5,
        times=3,
    ),
    interval=IntervalInForce(
        seconds=90.5, launched_seconds=80.5, cost_seconds=0.25, commit_seconds=8.5, failures=3, active_seconds=7200.0
    ),
    evaluations=(Evaluation(name="acc", attempt=3, step=100, value=0.5),),
    scores=(Score(name="acc", attempt=3, step=110, value=0.5),),
    swept_at=1_000_006.5,
    memory=MemoryStatus(
        step=118, attempt=3, seen_at=1_000_000.5, workers=2, copied=True, needed_bytes=1 << 33, limit_bytes=1 << 36
    ),
    notices=("pod clio-1-a2 was told to go", "node-1 has taint karpenter.sh/disrupted"),
    incidents=(INCIDENT,),
    spent={FailureClass.HANG: (1_000_001.5,)},
    replacing=("uid-1",),
    workers=WorkerCounts(desired=2, ready=1, participating=2, spares=1),
    ledger=Ledger(productive=900.0, lost=10.0, goodput=0.9),
    limits=(
        LimitInForce(
            phase=Phase.STEP,
            limit_seconds=1.0,
            patience_seconds=6.0,
            samples=64,
            median_seconds=0.5,
            longest_seconds=0.75,
        ),
    ),
    stragglers=(Straggler(rank=3, worker=1, factor=1.5, work_seconds=0.75, began_at=1_000_005.5),),
    accepted_spec='{"annotation":{"restartedAt":"x"}}',
    conditions=(Condition(type="Accepted", status="True", reason="Valid", message="m", since=999_000.0),),
)


def written(status: RunStatus) -> dict[str, Any]:
    """A run with this status as it arrives at the API server, that is, as JSON."""
    run: dict[str, Any] = json.loads(json.dumps(sample() | {"status": to_resource(status)}))
    return run


def test_the_api_server_keeps_every_field_of_a_status() -> None:
    """Nothing that the controller remembers is pruned, refused, or changed on its way into the CR and back."""
    rules = Schema(schema())
    stored, unknown = rules.admit(written(FULL))
    assert unknown == []
    assert [str(cause) for cause in rules.problems(stored, None)] == []
    assert from_resource(stored["status"]) == FULL


def test_a_fresh_status_comes_back_as_fresh() -> None:
    """The defaults that the schema fills in are those that the code leaves out."""
    rules = Schema(schema())
    stored, _ = rules.admit(written(RunStatus()))
    assert rules.problems(stored, None) == []
    assert from_resource(stored["status"]) == RunStatus()


def test_the_full_status_here_is_full() -> None:
    """A field that is new in the code must appear in the sample above, or it would not be tested."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(RunStatus)}
    missing = {name for name, default in defaults.items() if getattr(FULL, name) == default}
    assert missing == set()
