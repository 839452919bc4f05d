"""When a machine is to blame, and for what it never is."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from mend import machines
from mend.incidents import FailureClass, Incident, IncidentKind, IncidentRecord, Strike, Tier, Verdict
from mend.observation import Observation, PodPhase, WorkerPod
from mend.status import RunStatus
from world import a_spec

SPEC = a_spec(2, 2)
NOW = 50_000.0
SEEN = Observation(
    name="clio",
    namespace="team",
    uid="u",
    generation=1,
    created_at=0.0,
    status=RunStatus(attempt=5, participants=(0, 1)),
    pods=tuple(
        WorkerPod(index=n, name=f"p{n}", uid=f"u{n}", phase=PodPhase.RUNNING, node=f"node-{n}") for n in range(2)
    ),
)
FAULT = {1: "node node-1 is not ready"}
LOST = Incident(
    kind=IncidentKind.LOST,
    failure=FailureClass.INFRASTRUCTURE,
    attempt=5,
    ranks=(2, 3),
    workers=(1,),
    age_seconds=1.0,
    verdict=Verdict(ranks=(2, 3), confidence=0.95),
    summary="lost",
    machine_faults=FAULT,
)
CRASHED = replace(LOST, kind=IncidentKind.CRASHED, ranks=(2,), workers=(), verdict=Verdict(ranks=(2,), confidence=0.95))


def a_record(
    number: int, node: str, tier: Tier = Tier.RESTART_RANKS, ranks: tuple[int, ...] = (2,), **more: object
) -> IncidentRecord:
    """An earlier crash on a node, from which the run is back unless told otherwise."""
    given = {"recovered_at": 100.0, "failure": FailureClass.INFRASTRUCTURE, "confidence": 0.95, **more}
    return IncidentRecord(
        id=number,
        kind=IncidentKind.CRASHED,
        attempt=number,
        step=3,
        culprit_ranks=ranks,
        culprit_nodes=(node,),
        began_at=NOW - 60,
        detected_at=NOW - 60,
        tier=tier,
        **given,
    )


def struck(incident: Incident, *earlier: IncidentRecord) -> list[tuple[str, str, bool]]:
    """Node, reason, and whether it is decisive, of each strike that incident 9 gives."""
    given = machines.strikes_for(SPEC, SEEN, incident, 9, earlier, NOW)
    return [(each.node, each.reason, each.decisive) for each in given]


def test_a_worker_lost_with_its_node_gives_a_strike() -> None:
    """Against the node of the culprit, with the reason, for as long as the spec says, known by run and incident."""
    (strike,) = machines.strikes_for(SPEC, SEEN, LOST, 9, (), NOW)
    assert strike == Strike(
        id="u/9/node-1",
        node="node-1",
        run="team/clio",
        reason="node node-1 is not ready",
        struck_at=NOW,
        expires_at=NOW + 86400,
    )


@pytest.mark.parametrize(
    "incident",
    [
        replace(LOST, machine_faults={}),
        replace(LOST, failure=FailureClass.USER),
        replace(LOST, failure=FailureClass.PREEMPTION, kind=IncidentKind.PREEMPTED),
        replace(LOST, verdict=Verdict(ranks=(2,), confidence=0.7)),
        replace(LOST, verdict=Verdict(reasons=("all ranks wait equally",))),
        replace(LOST, kind=IncidentKind.CORRUPT),
        replace(CRASHED, machine_faults={0: "of somebody else"}),
    ],
    ids=["no fault", "user", "preempted", "not sure", "unknown", "corrupt", "not the culprit"],
)
def test_nobody_is_struck_without_need(incident: Incident) -> None:
    """User errors, preemptions, doubtful and unknown verdicts and bad checkpoints leave every node alone."""
    assert struck(incident) == []


ON_1, ON_0 = a_record(1, "node-1"), a_record(2, "node-0")


@pytest.mark.parametrize(
    ("earlier", "is_struck"),
    [
        ([], False),
        ([ON_1], False),
        ([ON_1, a_record(2, "node-1")], True),
        ([ON_1, a_record(2, "node-1"), ON_0], False),
        ([ON_1, a_record(2, "node-1", failure=FailureClass.USER)], False),
        ([replace(ON_1, detected_at=NOW - 90_000), a_record(2, "node-1")], False),
    ],
    ids=["the first", "the second", "the third", "also elsewhere", "the user's", "long ago"],
)
def test_crashes_on_one_node_only(earlier: list[IncidentRecord], is_struck: bool) -> None:
    """The third crash on one node within the time that strikes count, with none elsewhere, is laid at its door."""
    reason = "worker 1: ranks crash on node-1 again and again, and nowhere else"
    assert struck(replace(CRASHED, machine_faults={}), *earlier) == ([("node-1", reason, False)] if is_struck else [])


def test_a_run_on_one_node_cannot_compare() -> None:
    """With nowhere else to crash, crashes say nothing about the machine."""
    pods = tuple(replace(pod, node="node-1") for pod in SEEN.pods)
    alone = replace(SEEN, pods=pods)
    incident = replace(CRASHED, machine_faults={})
    earlier = [ON_1, a_record(2, "node-1")]
    assert machines.strikes_for(SPEC, alone, incident, 9, earlier, NOW) == ()


IN_VAIN = a_record(2, "node-1", Tier.REPLACE_WORKER, recovered_at=None)


@pytest.mark.parametrize(
    ("last", "is_struck"),
    [
        (a_record(1, "node-1", Tier.REPLACE_WORKER, recovered_at=None), True),
        (a_record(1, "node-1", Tier.EXCLUDE_NODE, recovered_at=None), True),
        (a_record(1, "node-1", Tier.REPLACE_WORKER), False),
        (a_record(1, "node-1", Tier.REPLACE_WORKER, ranks=(), recovered_at=None), False),
        (a_record(1, "node-1", Tier.RESTART_RANKS, recovered_at=None), False),
        (a_record(1, "node-0", Tier.REPLACE_WORKER, recovered_at=None), False),
        (a_record(1, "node-1", Tier.REPLACE_WORKER, recovered_at=None, confidence=0.5), False),
        (a_record(1, "node-1", Tier.REPLACE_WORKER, recovered_at=None, failure=FailureClass.PREEMPTION), False),
        (replace(IN_VAIN, culprit_nodes=("node-0", "node-1")), False),
    ],
    ids=[
        "replaced",
        "excluded",
        "the run was back",
        "not heard then",
        "restarted",
        "elsewhere",
        "not sure then",
        "preempted then",
        "two nodes then",
    ],
)
def test_replaced_in_vain(last: IncidentRecord, is_struck: bool) -> None:
    """A new pod on the same node that goes wrong before the run is back is decisive."""
    reason = "worker 1: a new pod on node-1 went wrong as the one before"
    assert struck(replace(CRASHED, machine_faults={}), last) == ([("node-1", reason, True)] if is_struck else [])


@pytest.mark.parametrize(
    ("incident", "earlier"),
    [
        (replace(CRASHED, verdict=Verdict(ranks=(0, 2), confidence=0.95)), ()),
        (CRASHED, (ON_0,)),
        (CRASHED, (replace(ON_0, kind=IncidentKind.HUNG, failure=FailureClass.HANG),)),
    ],
    ids=["on two nodes at once", "crashed elsewhere before", "hung elsewhere before"],
)
def test_what_goes_with_the_program_is_in_vain_on_any_machine(
    incident: Incident, earlier: tuple[IncidentRecord, ...]
) -> None:
    """A new pod that goes wrong as the one before speaks against no machine where another one saw the same."""
    incident = replace(incident, machine_faults={})
    assert struck(incident, *earlier, IN_VAIN) == []


def test_before_its_first_step_a_machine_is_not_excluded_at_once() -> None:
    """A program that fails at its start does so on any machine: there is a strike, and it is one of those needed."""
    incident = replace(CRASHED, machine_faults={}, before_stepping=True)
    reason = "worker 1: a new pod on node-1 went wrong as the one before"
    assert struck(incident, IN_VAIN) == [("node-1", reason, False)]


PRESUMED = Strike(
    id="u/2/node-0",
    node="node-0",
    run="team/clio",
    reason="again and again",
    struck_at=NOW - 10,
    expires_at=NOW + 86400,
    presumed=True,
)
OPEN = replace(IN_VAIN, culprit_nodes=("node-0",))


@pytest.mark.parametrize(
    ("incident", "strike", "earlier", "is_lifted"),
    [
        (CRASHED, PRESUMED, OPEN, True),
        (LOST, PRESUMED, OPEN, False),
        (replace(CRASHED, failure=FailureClass.USER), PRESUMED, OPEN, False),
        (replace(CRASHED, verdict=Verdict(ranks=(2,), confidence=0.6)), PRESUMED, OPEN, False),
        (replace(CRASHED, verdict=Verdict(ranks=(0,), confidence=0.95)), PRESUMED, OPEN, False),
        (CRASHED, replace(PRESUMED, presumed=False), OPEN, False),
        (CRASHED, replace(PRESUMED, run="team/other"), OPEN, False),
        (CRASHED, replace(PRESUMED, struck_at=NOW - 3600), OPEN, False),
        (CRASHED, PRESUMED, replace(OPEN, recovered_at=NOW - 1), False),
    ],
    ids=["elsewhere", "lost", "user", "doubtful", "there again", "seen", "another run's", "from before", "was back"],
)
def test_what_goes_with_the_program_frees_the_machine(
    incident: Incident, strike: Strike, earlier: IncidentRecord, is_lifted: bool
) -> None:
    """A strike for what came again and again on one node is lifted once it comes elsewhere before the run is back."""
    seen = replace(SEEN, strikes=(strike,))
    found = machines.refuted(SPEC, seen, incident, [earlier], NOW)
    assert found == ((strike,) if is_lifted else ())


@pytest.mark.parametrize(
    ("incident", "is_presumed"),
    [(CRASHED, False), (replace(CRASHED, machine_faults={}), True), (replace(LOST, machine_faults={}), False)],
    ids=["seen, and in vain", "in vain", "lost in vain"],
)
def test_only_what_ranks_do_is_presumed(incident: Incident, is_presumed: bool) -> None:
    """A fault that was seen, and a worker that is lost with its new pod, cannot be refuted by ranks elsewhere."""
    (given,) = machines.strikes_for(SPEC, SEEN, incident, 9, [IN_VAIN], NOW)
    assert (given.decisive, given.presumed) == (True, is_presumed)
