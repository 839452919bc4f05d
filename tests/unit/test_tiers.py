"""How to recover: the least disruptive means that can work and has not just failed, or none."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from mend import tiers
from mend.heartbeats import AgentState, Heartbeat, RankExit, RankReport
from mend.incidents import FailureClass, Incident, IncidentKind, IncidentRecord, Tier, Verdict
from mend.listing import StoredCheckpoint, StoreView
from mend.observation import AgentView, Observation, WorkerPod
from mend.spec import Spec
from mend.states import CheckpointRef
from mend.status import RunStatus
from world import a_spec

SPEC = a_spec(2, 2, recovery={"budgets": {"user": 2, "window": "1h"}})


def an_incident(kind: IncidentKind, failure: FailureClass, **more: object) -> Incident:
    """Of attempt 5, nobody known."""
    given = {"ranks": (), "workers": (), "age_seconds": 0.0, "verdict": Verdict(), "summary": "", **more}
    return Incident(kind=kind, failure=failure, attempt=5, **given)


def a_record(number: int, *, recovered: bool, **more: object) -> IncidentRecord:
    """An earlier incident."""
    given = {"kind": IncidentKind.HUNG, "failure": FailureClass.HANG, "attempt": 4, "step": 3, **more}
    at = 100.0 if recovered else None
    return IncidentRecord(id=number, began_at=90.0, detected_at=91.0, recovered_at=at, **given)


def a_run(*steps: int, spoilt: bool = False, **status: object) -> Observation:
    """A run with checkpoints after these steps."""
    stored = tuple(
        StoredCheckpoint(run_uid="u", ref=CheckpointRef(uri=f"s{step}", step=step, attempt=5), quarantined=spoilt)
        for step in steps
    )
    return Observation(
        name="clio",
        namespace="team",
        uid="u",
        generation=1,
        created_at=0.0,
        status=RunStatus(attempt=5, participants=(0, 1), **status),
        store=StoreView(listed=True, checkpoints=stored),
    )


SPIKED = an_incident(IncidentKind.DIVERGED, FailureClass.USER, sound_before=4, fingerprint="loss spike at step 5")
HUNG = an_incident(IncidentKind.HUNG, FailureClass.HANG)
RAISED = an_incident(IncidentKind.CRASHED, FailureClass.USER, fingerprint="ValueError after step 7")
STALE = "OSError: Stale file handle before its first step"
AT_START = an_incident(IncidentKind.CRASHED, FailureClass.USER, fingerprint=STALE, before_stepping=True)
CORRUPT = an_incident(IncidentKind.CORRUPT, FailureClass.INFRASTRUCTURE)
DIVERGED = an_incident(IncidentKind.DIVERGED, FailureClass.USER)
LOST = an_incident(IncidentKind.LOST, FailureClass.INFRASTRUCTURE, workers=(1,))
UNSAVED = an_incident(IncidentKind.CRASHED, FailureClass.INFRASTRUCTURE, of_the_store=True)
FATAL = an_incident(IncidentKind.CRASHED, FailureClass.USER, fatal=True)
SAME = a_record(1, recovered=True, fingerprint="ValueError after step 7")
BACK, BROKEN = a_record(1, recovered=True), a_record(2, recovered=False)
SPENT = {FailureClass.USER: (500.0, 900.0)}

CASES: dict[str, tuple[Observation, Incident, list[IncidentRecord], Tier]] = {
    "a first hang": (a_run(3), HUNG, [], Tier.RESTART_RANKS),
    "another, after the run was back": (a_run(3), HUNG, [BACK], Tier.RESTART_RANKS),
    "another, before it was back": (a_run(3), HUNG, [BACK, BROKEN], Tier.REPLACE_WORKER),
    "a worker is gone": (a_run(3), LOST, [], Tier.REPLACE_WORKER),
    "an exception": (a_run(3), RAISED, [], Tier.RESTART_RANKS),
    "an exception in a recovery: another machine has the same code": (a_run(3), RAISED, [BROKEN], Tier.RESTART_RANKS),
    "the same exception": (a_run(3), RAISED, [SAME, BACK], Tier.GIVE_UP),
    "the same exception at the start, after the run was back": (
        a_run(3),
        AT_START,
        [a_record(1, recovered=True, fingerprint=STALE)],
        Tier.RESTART_RANKS,
    ),
    "the same exception at the start, twice in a row": (
        a_run(3),
        AT_START,
        [a_record(1, recovered=False, fingerprint=STALE)],
        Tier.GIVE_UP,
    ),
    "no budget left": (a_run(3, spent=SPENT), RAISED, [], Tier.GIVE_UP),
    "another class has budget left": (a_run(3, spent=SPENT), HUNG, [], Tier.RESTART_RANKS),
    "trying again cannot help": (a_run(3), FATAL, [], Tier.GIVE_UP),
    "spoilt, but there are older ones": (a_run(3), CORRUPT, [BROKEN], Tier.RESTART_RANKS),
    "a store that takes nothing, again: other pods would not be better off": (
        a_run(3),
        UNSAVED,
        [a_record(1, recovered=False, tier=Tier.RESTART_RANKS)],
        Tier.RESTART_RANKS,
    ),
    "all are spoilt": (a_run(3, spoilt=True), CORRUPT, [], Tier.GIVE_UP),
    "diverged": (a_run(3, 5), DIVERGED, [], Tier.ROLL_BACK),
    "diverged with nothing to roll back to": (a_run(3), DIVERGED, [], Tier.GIVE_UP),
    "a loss that went up after the only checkpoint": (a_run(3), SPIKED, [], Tier.ROLL_BACK),
    "a loss that went up before any": (a_run(4, 5), SPIKED, [], Tier.GIVE_UP),
    "a loss that went up at the same step again": (
        a_run(3),
        SPIKED,
        [a_record(1, recovered=True, fingerprint="loss spike at step 5")],
        Tier.GIVE_UP,
    ),
}


def a_gang(can_rejoin: str = "1111") -> Observation:
    """Four ranks on two workers, of which these could go on in their processes; rank 3 has been killed."""
    ended = RankExit(signal=9)
    ranks = [
        RankReport(rank=n, pid=n + 1, can_rejoin=able == "1", exit=ended if n == 3 else None)
        for n, able in enumerate(can_rejoin)
    ]
    beats = [
        Heartbeat(attempt=5, worker=n, agent_id="a", state=AgentState.RUNNING, sequence=1, ranks=tuple(mine))
        for n, mine in enumerate((ranks[:2], ranks[2:]))
    ]
    return replace(
        a_run(3),
        pods=tuple(WorkerPod(index=n, name=f"p{n}", uid=f"u{n}") for n in range(2)),
        agents=tuple(
            AgentView(worker=n, pod_uid=f"u{n}", connected=True, silent_seconds=0.1, heartbeat=beat)
            for n, beat in enumerate(beats)
        ),
    )


KILLED = an_incident(
    IncidentKind.CRASHED, FailureClass.INFRASTRUCTURE, ranks=(3,), verdict=Verdict(ranks=(3,), confidence=0.95)
)
LATER = a_spec(2, 2, recovery={"firstTier": "restart-ranks"})
MUCH_LATER = a_spec(2, 2, recovery={"firstTier": "replace-worker"})
REJOINING = a_record(2, recovered=False, tier=Tier.REJOIN)


@pytest.mark.parametrize(
    ("spec", "seen", "earlier", "tier"),
    [
        (SPEC, a_gang("1110"), [], Tier.REJOIN),
        (SPEC, a_gang("1110"), [BACK], Tier.REJOIN),
        (SPEC, a_gang("1100"), [], Tier.RESTART_RANKS),
        (SPEC, a_gang("1110"), [REJOINING], Tier.RESTART_RANKS),
        (SPEC, a_gang("1110"), [BROKEN], Tier.REPLACE_WORKER),
        (LATER, a_gang("1110"), [], Tier.RESTART_RANKS),
        (MUCH_LATER, a_gang("1110"), [], Tier.REPLACE_WORKER),
    ],
    ids=["all others can", "after another", "one cannot", "it has just failed", "more has failed", "later", "last"],
)
def test_ranks_rejoin_if_all_but_the_culprit_can(
    spec: Spec, seen: Observation, earlier: list[IncidentRecord], tier: Tier
) -> None:
    """Rejoining comes first where every other rank offers it, it has not just failed, and the spec allows it."""
    assert tiers.choose(spec, seen, KILLED, earlier, 1000.0)[0] is tier
    assert tiers.to_keep(spec, a_gang("1110"), KILLED) == (0, 1, 2)


def test_nobody_rejoins_if_nobody_is_to_blame() -> None:
    """Without a culprit all ranks are suspect: none is kept."""
    assert tiers.to_keep(SPEC, a_gang(), HUNG) == ()


@pytest.mark.parametrize("case", CASES)
def test_the_tier(case: str) -> None:
    """Each kind of incident, with what has happened before, has its tier and a reason for it."""
    seen, incident, earlier, tier = CASES[case]
    chosen, why = tiers.choose(SPEC, seen, incident, earlier, 1000.0)
    assert chosen is tier
    assert why


def test_budgets_are_refilled_as_time_passes() -> None:
    """Only what was spent within the window counts."""
    assert tiers.choose(SPEC, a_run(3, spent=SPENT), RAISED, [], 4300.0)[0] is Tier.RESTART_RANKS


def test_an_old_failure_is_no_proof_that_trying_again_cannot_help() -> None:
    """The same failure at the same step ends a run only within the window in which budgets are counted."""
    assert tiers.choose(SPEC, a_run(3), RAISED, [SAME], 91.0 + 3599.0)[0] is Tier.GIVE_UP
    assert tiers.choose(SPEC, a_run(3), RAISED, [SAME], 91.0 + 3600.0)[0] is Tier.RESTART_RANKS


def test_giving_up_says_which_field_to_raise() -> None:
    """An error that a user can cause names the remedy."""
    _, why = tiers.choose(SPEC, a_run(3, spent=SPENT), RAISED, [], 1000.0)
    assert why == "the budget of 2 for failures of class user is used up (raise spec.recovery.budgets.user)"


@pytest.mark.parametrize(("verdict", "workers"), [((3,), (1,)), ((0, 2), (0, 1)), ((), (0, 1))])
def test_whose_pods_are_replaced(verdict: tuple[int, ...], workers: tuple[int, ...]) -> None:
    """The culprits'; everybody's when nobody is known."""
    incident = an_incident(IncidentKind.HUNG, FailureClass.HANG, verdict=Verdict(ranks=verdict))
    assert tiers.to_replace(SPEC, a_run(3), incident) == workers
    assert tiers.to_replace(SPEC, a_run(3), LOST) == (1,)


@pytest.mark.parametrize(("broken", "seconds"), [(0, 0.0), (1, 0.0), (2, 1.0), (3, 2.0), (5, 8.0), (20, 60.0)])
def test_launches_are_delayed_only_while_recoveries_keep_breaking(broken: int, seconds: float) -> None:
    """The first recovery is at once; then the delay doubles up to a minute."""
    incidents = (BACK, *(a_record(n + 2, recovered=False) for n in range(broken)))
    assert tiers.launch_delay_seconds(RunStatus(incidents=incidents)) == seconds
