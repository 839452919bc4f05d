"""What the controller makes of the snapshots that agents tell of: waits for word, memory limits, what it shows."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from mend.actions import CreateTls, EmitEvent, SendLaunch
from mend.assembling import assemble, missing_objects
from mend.decide import decide
from mend.heard import is_news
from mend.heartbeats import AgentState, Heartbeat, MemoryReport, Phase, RankExit, RankReport, decode_stream
from mend.incidents import FailureClass, IncidentKind, IncidentRecord, Origin
from mend.listing import StoredCheckpoint, StoreView
from mend.noted import noted
from mend.observation import AgentView, Observation, PodPhase, WorkerPod
from mend.protocol import encode
from mend.snapshots import buddy_urls, in_bytes, memories, wait_for_word, with_memory
from mend.spec import Spec
from mend.states import Ancestor, CheckpointRef, Held, Pending
from mend.status import CheckpointStatus, MemoryStatus, RunStatus
from world import EPOCH, a_spec

UID = "run-uid"
BEGUN = EPOCH + 100.0
GIB = 1 << 30


def held(step: int, *ranks: int, size: int = 2) -> Held:
    """Snapshots of these ranks at this step of attempt 1."""
    return Held(save_id=f"s{step}", run_uid=UID, attempt=1, step=step, tokens=0, world_size=size, ranks=ranks)


def an_agent(worker: int, *what: Held, silent: float = 0.0, step: int = 20, **more: Any) -> AgentView:
    """One that is there, whose rank has completed `step`, and that holds this."""
    rank = RankReport(rank=worker, pid=1, phase=Phase.STEP, step=step, steps_done=step)
    beat = Heartbeat(
        attempt=1,
        worker=worker,
        agent_id=f"agent-{worker}",
        state=AgentState.RUNNING,
        sequence=1,
        ranks=(rank,),
        store_port=1,
        saver_port=9000 + worker,
        held=what,
    )
    view = AgentView(worker=worker, pod_uid=f"pod-{worker}", connected=True, silent_seconds=silent)
    return replace(view, heartbeat=replace(beat, **more))


def seen(*agents: AgentView, **status: Any) -> Observation:
    """A run of attempt 2, begun at `BEGUN` after attempt 1, with a pod for each agent."""
    pods = tuple(
        WorkerPod(
            index=each.worker,
            name=f"clio-{each.worker}",
            uid=each.pod_uid,
            phase=PodPhase.RUNNING,
            ip=f"10.0.0.{each.worker}",
            node=f"node-{each.worker}",
        )
        for each in agents
    )
    known = RunStatus(attempt=2, follows=1, attempt_started_at=BEGUN)
    return Observation(
        name="clio",
        namespace="team",
        uid=UID,
        generation=1,
        created_at=EPOCH,
        status=replace(known, **status),
        pods=pods,
        agents=agents,
    )


def an_open_incident(number: int) -> IncidentRecord:
    """A crash that the run is not back from."""
    return IncidentRecord(
        id=number,
        kind=IncidentKind.CRASHED,
        failure=FailureClass.INFRASTRUCTURE,
        attempt=1,
        step=20,
        began_at=EPOCH,
        detected_at=EPOCH,
    )


SPEC = a_spec(2, 1)


def waits(observation: Observation, after: float, spec: Spec = SPEC) -> bool:
    """Whether a launch on workers 0 and 1 waits, so long after the attempt began."""
    return wait_for_word(spec, observation, (0, 1), BEGUN + after) > 0


def test_who_all_say_the_same_are_not_waited_for() -> None:
    """Nor is who says nothing at all: there may be no snapshots."""
    assert not waits(seen(an_agent(0, held(20, 0)), an_agent(1, held(20, 1), silent=0.2)), 0.1)
    assert not waits(seen(an_agent(0), an_agent(1, silent=0.2, step=3)), 0.1)


def test_words_that_are_older_than_the_attempt_and_do_not_fit_are_heard_anew_for_a_second() -> None:
    """One worker tells of step 20, the other of 17: it may hold 20 by now, and no longer what it said."""
    both = seen(an_agent(0, held(19, 0), held(20, 0)), an_agent(1, held(16, 1), held(17, 1), silent=0.25, step=17))
    assert waits(both, 0.1)
    assert not waits(both, 0.3)  # worker 1 was heard after the attempt began
    assert waits(seen(both.agents[0], replace(both.agents[1], silent_seconds=0.85)), 0.8)
    assert not waits(seen(both.agents[0], replace(both.agents[1], silent_seconds=0.85)), 1.0)


def pending(step: int, *ranks: int, seconds: float = 0.5, attempt: int = 1) -> Pending:
    """Snapshots of these ranks of two, published and not yet digested."""
    return Pending(attempt=attempt, step=step, world_size=2, ranks=ranks, step_seconds=seconds)


def digesting(step: int, *, before: int = 19, seconds: float = 0.5, attempt: int = 1) -> Observation:
    """Two workers whose savers take the digests of `step`, and hold the snapshots of a step before."""
    return seen(
        *(
            an_agent(n, held(before, n), pending=pending(step, n, seconds=seconds, attempt=attempt), step=step)
            for n in (0, 1)
        )
    )


def test_a_snapshot_whose_digests_are_being_taken_is_waited_for_as_long_as_its_steps_would_take() -> None:
    """One step of half a second, ten of 20 ms, and never more than a second; then what is held is restored."""
    for there, enough in (
        (digesting(20), 0.5),
        (digesting(29, seconds=0.02), 0.2),
        (digesting(20, seconds=0.02), 0.02),
        (digesting(20, seconds=30.0), 1.0),
    ):
        assert waits(there, enough - 0.01)
        assert not waits(there, enough + 0.01)
    assert wait_for_word(SPEC, digesting(20, seconds=0.02), (0, 1), BEGUN + 0.015) < 0.006
    assert not waits(seen(an_agent(0, held(20, 0)), an_agent(1, held(20, 1))), 0.1), "its digests are there"


def test_what_all_pending_snapshots_do_not_make_whole_is_not_waited_for() -> None:
    """A rank that was killed in the middle of its copy has none of that step; a worker not yet heard again may have."""
    first = an_agent(0, held(19, 0), pending=pending(20, 0))
    torn = an_agent(1, held(19, 1))
    assert not waits(seen(first, torn), 0.1)
    assert waits(seen(first, replace(torn, silent_seconds=0.2)), 0.1)
    assert waits(seen(first, an_agent(1, held(19, 1), held(20, 1))), 0.1), "that worker's saver is done"


def test_pending_snapshots_that_may_not_be_restored_are_not_waited_for() -> None:
    """Those of another attempt, at or beyond a roll back, while only the store is trusted, and if ranks rejoin."""
    assert not waits(digesting(20, attempt=2), 0.1)
    for refused in (
        {"roll_back_before": 20},
        {"keep": (0,)},
        {"incidents": tuple(map(an_open_incident, range(3)))},
    ):
        there = digesting(20)
        assert not waits(replace(there, status=replace(there.status, **refused)), 0.1)


def test_an_agent_that_is_older_than_pending_snapshots_is_understood() -> None:
    """Its heartbeat has no such field: nothing is waited for."""
    beat = an_agent(0, held(19, 0)).heartbeat
    assert beat is not None
    assert b"pending" not in encode(beat)
    assert decode_stream(encode(beat)) == beat


def test_ranks_that_rejoin_wait_for_no_word() -> None:
    """They have a newer state than any snapshot."""
    behind = seen(an_agent(0, held(20, 0)), an_agent(1, held(17, 1), silent=0.25, step=17), keep=(0,))
    assert not waits(behind, 0.1)


def test_a_controller_that_has_just_begun_names_no_holders_before_it_has_heard_of_them() -> None:
    """It finds the launch decided and sends it once every snapshot is known of, or everybody was heard."""
    decided = {"participants": (0, 1), "restore": (CheckpointRef(uri="memory:s20", step=20, attempt=1),)}
    before = an_agent(1, held(20, 1), attempt=1)
    unheard = replace(before, connected=False, heartbeat=None)
    for other, orders in ((unheard, 0), (before, 2), (an_agent(1, attempt=1), 2)):
        told = seen(an_agent(0, held(20, 0), attempt=1), other, **decided)
        told = replace(told, has_token=True, has_tls=True, has_service=True)
        sent = [each for each in assemble(SPEC, told, BEGUN).actions if isinstance(each, SendLaunch)]
        assert len(sent) == orders
    alone = seen(an_agent(0, held(20, 0), held(20, 1), attempt=1), unheard, **decided)
    (order,) = [each for each in assemble(SPEC, alone, BEGUN).actions if isinstance(each, SendLaunch)]
    assert [each.rank for each in order.launch.holders] == [0, 1]


def test_only_workers_that_can_be_asked_count() -> None:
    """Not one that goes, is silent, or has no pod; one that never serves has its snapshots for itself."""
    going = an_agent(1, held(20, 1), terminating=True)
    silent = an_agent(1, held(20, 1), silent=60.0)
    for other in (going, silent):
        assert [each.worker for each in memories(SPEC, seen(an_agent(0, held(20, 0)), other))] == [0]
    (own,) = memories(SPEC, seen(an_agent(0, held(20, 0), saver_port=0)))
    assert (own.url, own.held) == ("", (held(20, 0),))


def test_buddies_are_named_by_their_savers_and_only_if_asked_for() -> None:
    """Who serves nothing keeps no copies."""
    both = seen(an_agent(0), an_agent(1, saver_port=0), participants=(0, 1))
    assert buddy_urls(SPEC, both) == {1: "https://10.0.0.0:9000"}
    alone = replace(SPEC.checkpoint, memory=replace(SPEC.checkpoint.memory, peers=False))
    assert buddy_urls(replace(SPEC, checkpoint=alone), both) == {}


def test_a_run_that_an_older_mend_began_gets_its_certificate() -> None:
    """Its token stays as it is."""
    known = seen(an_agent(0), an_agent(1))
    known = replace(known, has_token=True, has_service=True)
    made = missing_objects(SPEC, known, BEGUN)
    assert made == (CreateTls(),)
    assert missing_objects(SPEC, replace(known, has_tls=True), BEGUN) == ()


def test_a_checkpoint_that_was_passed_over_for_memory_is_the_newest_no_more() -> None:
    """The ranks found step 30 spoilt and began from step 20 in memory: what is shown is the checkpoint before that."""
    refs = [CheckpointRef(uri=f"s3://b/{step}", step=step, attempt=1) for step in (10, 15, 30)]
    stored = tuple(StoredCheckpoint(ref=ref, run_uid=UID, committed_at=EPOCH + ref.step) for ref in refs)
    memory = CheckpointRef(uri="memory:s20", step=20, attempt=1)
    told = seen(
        an_agent(0, attempt=2, restored=memory),
        follows=None,
        participants=(0,),
        lineage=(Ancestor(attempt=1, step=30, uid=UID),),
        restore=(refs[2], memory),
        origins=(Origin.STORE, Origin.PEER),
        checkpoint=CheckpointStatus(step=30, attempt=1, uri="s3://b/30", committed_at=EPOCH + 30),
    )
    status = noted(SPEC, replace(told, store=StoreView(listed=True, checkpoints=stored)), BEGUN)
    assert status.checkpoint == CheckpointStatus(step=15, attempt=1, uri="s3://b/15", committed_at=EPOCH + 15)
    assert (status.restored_step, status.origin) == (20, Origin.PEER)
    assert status.lineage == (Ancestor(attempt=1, step=20, uid=UID),)
    assert noted(SPEC, told, BEGUN).checkpoint is None
    older = replace(told.status, checkpoint=CheckpointStatus(step=15, attempt=1, uri="x", committed_at=EPOCH))
    assert noted(SPEC, replace(told, status=older), BEGUN).checkpoint == older.checkpoint


# ---------------------------------------------------------------- in view
def test_the_status_tells_what_lies_in_memory_and_since_when() -> None:
    """The newest that is whole on the line of the attempt, on how many workers, copied or not."""
    agents = (
        an_agent(0, held(20, 0), held(19, 0), held(19, 1), memory=MemoryReport(needed_bytes=4 * GIB)),
        an_agent(1, held(19, 1), held(19, 0), memory=MemoryReport(needed_bytes=5 * GIB, limit_bytes=64 * GIB)),
    )
    now = seen(*agents, attempt=1, follows=None, participants=(0, 1))
    status = with_memory(SPEC, now.status, now, BEGUN)
    expected = MemoryStatus(
        step=19, attempt=1, seen_at=BEGUN, workers=2, copied=True, needed_bytes=5 * GIB, limit_bytes=64 * GIB
    )
    assert status.memory == expected
    assert with_memory(SPEC, status, now, BEGUN + 5).memory == expected
    one = replace(now, agents=agents[:1])
    assert with_memory(SPEC, status, one, BEGUN).memory == MemoryStatus(
        step=19, attempt=1, seen_at=BEGUN, workers=1, copied=False, needed_bytes=4 * GIB
    )
    newer = (replace(agents[0], heartbeat=replace(agents[0].heartbeat, held=(*agents[0].heartbeat.held, held(20, 1)))),)
    ahead = with_memory(SPEC, status, replace(now, agents=(*newer, agents[1])), BEGUN + 9).memory
    assert ahead is not None
    assert (ahead.step, ahead.seen_at, ahead.copied) == (20, BEGUN + 9, True)  # step 19 lies on both
    alone = replace(one, status=replace(now.status, participants=(0,)))
    known = with_memory(SPEC, alone.status, alone, BEGUN).memory
    assert known is not None
    assert known.copied is None
    assert with_memory(SPEC, status, replace(now, agents=()), BEGUN).memory is None


def a_spec_with_limit(limit: object) -> Spec:
    """Whose trainer has this memory limit."""
    spec = a_spec(2, 1)
    template = {"spec": {"containers": [{"name": "trainer", "resources": {"limits": {"memory": limit}}}]}}
    return replace(spec, workers=replace(spec.workers, template=template))


def test_pods_that_are_too_small_are_told_of_once_with_a_remedy() -> None:
    """By the limit that the agent has found, or else that of the template; a condition, and an event."""
    report = MemoryReport(needed_bytes=12 * GIB)
    told = seen(an_agent(0, memory=report), an_agent(1, memory=report), attempt=1, follows=None, participants=(0, 1))
    for limit in ("8Gi", "8192Mi", 8 * GIB):
        (condition,) = [
            each for each in noted(a_spec_with_limit(limit), told, BEGUN).conditions if each.type == "MemoryFits"
        ]
        assert (condition.status, condition.reason) == ("False", "LimitTooSmall")
        assert "need 12 GiB in each worker" in condition.message
        assert "limit is 8 GiB: raise resources.limits.memory of container trainer" in condition.message
    for limit in ("16Gi", "", None, "8e9", ["8Gi"]):
        conditions = noted(a_spec_with_limit(limit), told, BEGUN).conditions
        assert "MemoryFits" not in {each.type for each in conditions}
    small = a_spec_with_limit("8Gi")
    first = decide(small, told, BEGUN)
    events = [each.reason for each in first.actions if isinstance(each, EmitEvent)]
    assert events.count("LimitTooSmall") == 1
    again = decide(small, replace(told, status=first.status), BEGUN + 1)
    assert [each.reason for each in again.actions if isinstance(each, EmitEvent)].count("LimitTooSmall") == 0
    own = MemoryReport(needed_bytes=12 * GIB, limit_bytes=64 * GIB)
    enough = replace(told, agents=(an_agent(0, memory=own), an_agent(1, memory=own)), status=first.status)
    assert "MemoryFits" not in {each.type for each in noted(small, enough, BEGUN).conditions}


def test_a_new_snapshot_is_no_news_and_a_saver_that_moves_is() -> None:
    """The controller is not woken at every step."""
    agent = an_agent(0, held(20, 0)).heartbeat
    assert agent is not None
    assert not is_news(agent, replace(agent, held=(held(21, 0),), sequence=2))
    assert is_news(agent, replace(agent, saver_port=1))
    assert is_news(agent, replace(agent, memory=MemoryReport(needed_bytes=1)))


def test_digests_that_are_there_are_news_once_nobody_trains() -> None:
    """A launch may wait for them; while ranks train, they come with every snapshot."""
    training = an_agent(0, pending=pending(20, 0)).heartbeat
    assert training is not None
    assert not is_news(training, replace(training, pending=None))
    dead = replace(training, ranks=(replace(training.ranks[0], exit=RankExit(signal=9)),))
    stopped = replace(training, state=AgentState.IDLE, ranks=())
    for beat in (dead, stopped):
        assert is_news(beat, replace(beat, pending=None))


def test_sizes_are_told_in_the_unit_that_fits() -> None:
    """As Kubernetes counts them."""
    assert [in_bytes(size) for size in (0, 1023, 1536, 5 << 20, 3 * GIB // 2)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "5 MiB",
        "1.5 GiB",
    ]
