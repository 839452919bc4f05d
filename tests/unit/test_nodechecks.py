"""When machines are measured before an attempt, and which of them are found wanting."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from mend.actions import EmitEvent, SendCheck
from mend.incidents import FailureClass, Incident, IncidentKind, IncidentRecord, Tier, Verdict
from mend.machines import check_due
from mend.nodechecks import in_words, judge
from mend.observation import Observation
from mend.orders import WAY_FIGURE, Checked
from mend.protocol import agent_url
from mend.status import RunPhase, RunStatus
from world import World, a_spec

NOW = 50_000.0
SEEN = Observation(
    name="clio",
    namespace="team",
    uid="u",
    generation=1,
    created_at=0.0,
    status=RunStatus(attempt=5, participants=(0, 1)),
)
HUNG = Incident(
    kind=IncidentKind.HUNG,
    failure=FailureClass.HANG,
    attempt=5,
    ranks=(0, 1, 2, 3),
    workers=(),
    age_seconds=1.0,
    verdict=Verdict(ranks=(2,), confidence=0.95),
    summary="hung",
)
NOBODY = replace(HUNG, verdict=Verdict(reasons=("all ranks wait equally",)))
CRASHED = replace(HUNG, kind=IncidentKind.CRASHED, failure=FailureClass.INFRASTRUCTURE)


def a_record(*workers: int, ago: float = 60.0, kind: IncidentKind = IncidentKind.HUNG) -> IncidentRecord:
    """An earlier incident that blames these workers."""
    at = NOW - ago
    return IncidentRecord(
        id=1,
        kind=kind,
        failure=FailureClass.HANG,
        attempt=4,
        step=3,
        culprit_workers=workers,
        began_at=at,
        detected_at=at,
        tier=Tier.RESTART_RANKS,
    )


PAUSE = replace(a_record(), tier=None)  # it went on by itself


@pytest.mark.parametrize(
    ("incident", "earlier", "suspects"),
    [
        (HUNG, [], None),
        (HUNG, [a_record(1)], (1,)),
        (HUNG, [a_record(0)], None),
        (HUNG, [a_record(1, ago=90_000.0)], None),
        (replace(HUNG, verdict=Verdict(ranks=(2,), confidence=0.98)), [a_record(1)], None),
        (CRASHED, [a_record(1, kind=IncidentKind.CRASHED)], None),
        (HUNG, [a_record(1, kind=IncidentKind.CRASHED)], None),
        (HUNG, [replace(a_record(1), confidence=0.98)], None),
        (NOBODY, [], None),
        (NOBODY, [a_record(1)], None),
        (NOBODY, [a_record()], ()),
        (NOBODY, [a_record(kind=IncidentKind.LOST)], None),
        (NOBODY, [PAUSE], None),
        (NOBODY, [a_record(), PAUSE], ()),
    ],
    ids=[
        "first",
        "again",
        "another",
        "long ago",
        "stopped",
        "crash",
        "crashed before",
        "stopped before",
        "nobody",
        "then one",
        "nobody twice",
        "not a hang",
        "only a pause before",
        "a pause between",
    ],
)
def test_no_check_delays_a_recovery_whose_cause_is_plain(
    incident: Incident, earlier: list[IncidentRecord], suspects: tuple[int, ...] | None
) -> None:
    """Machines are measured when a worker hangs again for an unknown reason, or twice in a row nobody was to blame."""
    check = check_due(a_spec(2, 2), SEEN, incident, earlier, NOW)
    assert (check.suspects if check is not None else None) == suspects


@pytest.mark.parametrize(("word", "is_checked"), [("Never", False), ("Suspects", False), ("Always", True)])
def test_the_spec_may_ask_for_more_or_less(word: str, is_checked: bool) -> None:
    """Always measures before every recovery; Never not even for suspects."""
    spec = a_spec(2, 2, recovery={"nodeCheck": word})
    assert (check_due(spec, SEEN, HUNG, [], NOW) is not None) is is_checked
    assert (check_due(spec, SEEN, HUNG, [a_record(1)], NOW) is None) is (word == "Never")


def answers(*figures: float, problems: dict[int, str] | None = None) -> dict[int, Checked]:
    """What each worker's memory does, and what went wrong."""
    return {
        n: Checked(attempt=5, worker=n, figures={"cpu memory pass": figure}, problem=(problems or {}).get(n, ""))
        for n, figure in enumerate(figures)
    }


@pytest.mark.parametrize(
    ("told", "bad"),
    [
        (answers(10.0, 9.0, 11.0), {}),
        (answers(10.0, 5.5, 11.0), {}),
        (answers(10.0, 4.0, 11.0), {1: "cpu memory pass 0.38x of its peers"}),
        (answers(10.0, 3.0), {1: "cpu memory pass 0.30x of its peers"}),
        (answers(1.0), {}),
        (answers(10.0, 10.0, problems={0: "died"}), {0: "the check died"}),
        (answers(10.0, 10.0, problems={0: "died", 1: "died"}), {}),
        ({}, {}),
    ],
    ids=["alike", "a little less", "less than half", "of two", "alone", "died on one", "died on all", "no answer"],
)
def test_machines_are_compared_with_their_peers(told: dict[int, Checked], bad: dict[int, str]) -> None:
    """Bad is less than half of the middle one of the peers, or a check that goes wrong here and not everywhere."""
    assert judge(told) == bad


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (answers(10.0, 9.0, 11.0), ("no machine is much worse than its peers",)),
        ({}, ("no worker answered (asked: 0, 1, 2)",)),
        (
            answers(10.0, 10.0, problems={0: "died", 1: "hung"}),
            (
                "it went wrong wherever it was answered: worker 0: the check died, worker 1: the check hung",
                "worker 2 did not answer",
            ),
        ),
        (answers(10.0), ("worker 0 has no peer to be compared with", "worker 1 did not answer")),
        (answers(10.0, 3.0), ("worker 1: cpu memory pass 0.30x of its peers", "worker 2 did not answer")),
    ],
    ids=["alike", "no answer", "failed everywhere", "one answer", "a bad one"],
)
def test_a_check_says_what_it_has_not_seen(told: dict[int, Checked], words: tuple[str, ...]) -> None:
    """All is well only where machines were compared; who did not answer is named beside what was found."""
    assert in_words((0, 1, 2), told, judge(told))[: len(words)] == words


def test_unlike_machines_are_not_compared() -> None:
    """A figure that no peer has measured says nothing."""
    told = answers(10.0, 10.0) | {2: Checked(attempt=5, worker=2, figures={"cuda:0 memory pass": 1.0})}
    assert judge(told) == {}


@pytest.mark.parametrize(("share", "is_bad"), [(0.2, True), (0.4, False)])
def test_a_way_must_be_much_worse(share: float, is_bad: bool) -> None:
    """A network is used by others as well: only under a quarter of what the peers have is bad."""
    told = {n: Checked(attempt=5, worker=n, figures={WAY_FIGURE: 100.0 if n else 100.0 * share}) for n in range(3)}
    assert judge(told) == ({0: f"{WAY_FIGURE} {share:.2f}x of its peers"} if is_bad else {})


@pytest.mark.parametrize(
    ("workers", "neighbours"),
    [(4, {0: (3, 1), 1: (0, 2), 2: (1, 3), 3: (2, 0)}), (2, {0: (1,), 1: (0,)}), (1, {0: ()})],
)
def test_neighbours_are_the_ones_beside_in_a_ring(workers: int, neighbours: dict[int, tuple[int, ...]]) -> None:
    """Each is told of the agents of the workers asked before and after it, once each, and never of its own."""
    world = World(a_spec(workers, 1, recovery={"nodeCheck": "Always"})).until_training()
    world.harm_rank(0, "kill")
    asked = lambda world: [a for _, said in world.decisions for a in said.actions if isinstance(a, SendCheck)]  # noqa: E731
    world.until(asked)
    told = {each.worker: each.neighbours for each in asked(world)}
    assert told == {
        worker: tuple(agent_url(f"10.0.0.{other}") for other in others) for worker, others in neighbours.items()
    }


def test_a_check_that_nobody_answers_is_not_waited_for_for_ever() -> None:
    """Orders that are lost cost the time of the check, not the recovery."""
    world = World(a_spec(2, 2, recovery={"nodeCheck": "Always"}), nodes=3, steps=60).until_step(12)
    world.harm_rank(2, "kill")
    world.orders_fail_until = world.now + 30.0
    world.until_end()
    assert (world.status.phase, world.status.recoveries, world.book) == (RunPhase.SUCCEEDED, 1, ())
    assert world.status.incidents[-1].reasons[-1] == "node check: no worker answered (asked: 0, 1)"
    said = [action for _, decision in world.decisions for action in decision.actions if isinstance(action, EmitEvent)]
    assert ("Warning", "NodesNotChecked") in {(event.type, event.reason) for event in said}


def test_an_incident_during_the_check_begins_it_anew() -> None:
    """A worker that is lost while machines are measured is replaced; then all are asked again, for the new attempt."""
    world = World(a_spec(2, 2, recovery={"nodeCheck": "Always"}), nodes=3, steps=60).until_step(12)
    world.harm_rank(2, "kill")
    world.until(lambda world: world.status.check is not None and bool(world.status.check.asked))
    world.kill_agent(0)
    world.until_end()
    assert (world.status.phase, len(world.status.incidents)) == (RunPhase.SUCCEEDED, 2)
    checks = [line for line in world.story if line.startswith("checks workers")]
    assert len(checks) == 2, world.story


def test_the_check_survives_the_controller() -> None:
    """One that dies while machines are measured is followed by one that asks again, and goes on."""
    world = World(a_spec(2, 2, recovery={"nodeCheck": "Always"}), nodes=3, steps=60).until_step(12)
    world.harm_rank(2, "kill")
    world.until(lambda world: world.status.check is not None and bool(world.status.check.asked))
    world.kill_controller(down_for=1.0)
    world.until_end()
    assert (world.status.phase, world.status.recoveries, world.status.check) == (RunPhase.SUCCEEDED, 1, None)
