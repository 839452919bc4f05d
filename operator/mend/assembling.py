"""Pure: makes what a gang needs, removes what is in its way, and launches it once all are there."""

from __future__ import annotations

from msgspec.structs import replace

from mend import tiers
from mend.conditions import with_condition, without_condition
from mend.goodput import account
from mend.model import (
    AgentView,
    AnyAction,
    CreateService,
    CreateToken,
    CreateWorker,
    Decision,
    DeleteWorker,
    EmitEvent,
    Observation,
    RunPhase,
    RunStatus,
    SendLaunch,
    SendStop,
    Tier,
    WorkerPod,
)
from mend.noted import with_workers
from mend.presence import ENDED, is_going, is_ready, is_silent
from mend.protocol import AgentState, Heartbeat, Launch
from mend.restore import candidates, lineage_after
from mend.spec import Spec
from mend.transitions import attempt_heard, attempt_of_predecessors, next_attempt

RETRY_SECONDS = 2.0
RESEND_SECONDS = 1.0
REMOVAL_GRACE_SECONDS = 1
FORCE_SECONDS = 10.0  # a pod that is to be replaced is forced off if it has not gone by then
OUTWAIT_SECONDS = 15.0  # and waited for no longer than that: the attempt fences it
MAX_CREATIONS = 50  # in one decision, which other runs wait for
RENEW_SECONDS = 30.0  # a worker that ends while the others train without it is made anew so long after it was made


# ---------------------------------------------------------------- rules
def overtaken(spec: Spec, seen: Observation, now: float) -> Decision | None:
    """Agents know of a higher attempt than the status, or have stopped this one: the status was lost or put back.

    An agent that was told to go has stopped, too: that is a preemption. An attempt that is not launched yet also gives
    way to a deleted run of this name that still saves and has come to its number: on one lineage numbers never repeat.
    """
    status = seen.status
    staying = [worker for worker in status.participants if not is_going(seen, worker)]
    beats = [beat for worker in staying if (beat := seen.heartbeat_of(worker)) is not None]
    stopped = any(beat.state is AgentState.IDLE for beat in beats)
    taken = not status.participants and attempt_of_predecessors(seen) >= status.attempt
    if attempt_heard(seen) <= status.attempt and not stopped and not taken:
        return None
    phase = RunPhase.PENDING if status.phase is RunPhase.PENDING else RunPhase.RECOVERING
    status = next_attempt(seen, now, phase)
    return assemble(spec, replace(seen, status=status), now)


def assembling(spec: Spec, seen: Observation, now: float) -> Decision | None:
    """The gang is not complete: not launched, or not all agents know of it."""
    present = seen.status.participants
    if present and all(seen.heartbeat_of(worker) is not None for worker in present):
        return None
    return assemble(spec, seen, now)


def assemble(spec: Spec, seen: Observation, now: float) -> Decision:
    """Makes what is missing, removes what is too much, launches once all are there."""
    uids = {pod.uid for pod in seen.pods}
    status = replace(seen.status, replacing=tuple(uid for uid in seen.status.replacing if uid in uids))
    seen = replace(seen, status=status)
    changes = (*missing_objects(spec, seen), *removals(spec, seen, now))
    if status.participants:
        actions = (*changes, *_launches(spec, seen))
        return Decision(status=status, actions=actions, reason="launching", wake_after=RESEND_SECONDS)
    status = with_workers(spec, status, seen, now)
    seen = replace(seen, status=status)
    waiting = wait_for_storage(seen, now) or _wait(spec, seen, now) or _wait_for_listing(spec, seen)
    if waiting is not None:
        return replace(waiting, actions=(*changes, *_stops(seen), *waiting.actions))
    return _launch(spec, seen, changes, now)


def wait_for_storage(seen: Observation, now: float) -> Decision | None:
    """Without the list of checkpoints nothing is launched: it might start from too old a state, or from none."""
    if seen.store.listed and not seen.store.problem:
        return None
    problem = seen.store.problem or "the checkpoints have not been listed yet"
    reason = seen.store.problem_reason if seen.store.problem else "Unknown"
    status = with_condition(seen.status, "StorageReady", False, reason, problem, now)
    is_news = all((each.type, each.reason) != ("StorageReady", reason) for each in seen.status.conditions)
    event = EmitEvent(type="Warning", reason=reason, message=problem)
    actions = (event,) if seen.store.problem and is_news else ()
    return Decision(status=status, actions=actions, reason=problem, wake_after=RETRY_SECONDS)


def _wait_for_listing(spec: Spec, seen: Observation) -> Decision | None:
    """A checkpoint that was committed with a last breath, and told to nobody, would be off the line for ever.

    Where ranks restart in place, who commits is still there and has told: then nothing is waited for.
    """
    store, present = seen.store, {pod.uid for pod in seen.pods}
    is_fresh = store.listed_for >= seen.status.attempt and present.issuperset(store.listed_beside)
    if is_fresh or _all_is_told(spec, seen):
        return None
    return Decision(status=seen.status, reason="listing what was committed until now", wake_after=RETRY_SECONDS)


def _all_is_told(spec: Spec, seen: Observation) -> bool:
    """Whether the ranks restart in place, beside the agent of rank 0, who is heard and tells of every commit."""
    before, record = seen.status.follows, seen.status.open_incident
    if record is None or record.attempt != before or record.tier not in (Tier.REJOIN, Tier.RESTART_RANKS):
        return False
    return any(
        agent.connected
        and not is_silent(spec, agent)
        and agent.heartbeat.attempt == before
        and _is_first(agent.heartbeat)
        for agent in seen.agents
        if agent.heartbeat is not None
    )


def _is_first(beat: Heartbeat) -> bool:
    """Whether it is of the worker that holds rank 0, the only one that tells of restores and saves."""
    told = beat.save is not None or beat.restored is not None
    return told or any(rank.rank == 0 for rank in beat.ranks)


def _wait(spec: Spec, seen: Observation, now: float) -> Decision | None:
    status = seen.status
    waited = now - (status.attempt_started_at or now)
    if any(pod.uid in status.replacing for pod in seen.pods) and waited < OUTWAIT_SECONDS:
        reason = "waiting for replaced pods to be gone, so that no two attempts train"
        return Decision(status=status, reason=reason, wake_after=RETRY_SECONDS)
    present = len(_ready_workers(spec, seen))
    patience = spec.recovery.shrink_after_seconds - waited
    if present < spec.workers.min_replicas or (present < spec.workers.replicas and patience > 0):
        look = spec.health.lost_after_seconds  # a worker may be lost without any news
        if any(agent.connected and is_silent(spec, agent) for agent in seen.agents):
            look = min(look, RETRY_SECONDS)  # that it is heard again would be none either
        return Decision(
            status=status, reason="waiting for workers", wake_after=min(look, patience) if patience > 0 else look
        )
    delay = tiers.launch_delay_seconds(status) - waited
    return Decision(status=status, reason="backing off", wake_after=delay) if delay > 0 else None


# ---------------------------------------------------------------- launching
def _launch(spec: Spec, seen: Observation, changes: tuple[AnyAction, ...], now: float) -> Decision:
    able = candidates(seen.uid, seen.status, seen.store.checkpoints)
    status = replace(
        account(seen.status, now),
        participants=_ready_workers(spec, seen),
        follows=None,
        lineage=lineage_after(able[0]) if able else (),
        restore=tuple(each.ref for each in able),
    )
    caution = seen.store.caution
    told = any((each.type, each.status) == ("ConditionalWrites", "False") for each in status.conditions)
    warning = EmitEvent(type="Warning", reason="NoConditionalWrites", message=caution)
    if caution:
        status = with_condition(status, "ConditionalWrites", False, "NoConditionalWrites", caution, now)
    else:
        status = without_condition(status, "ConditionalWrites")
    status = with_condition(status, "StorageReady", True, "Ready", "the checkpoints can be read", now)
    seen = replace(seen, status=status)
    return Decision(
        status=status,
        actions=(*changes, *_launches(spec, seen), *((warning,) if caution and not told else ())),
        reason=f"launching attempt {status.attempt}",
        wake_after=RESEND_SECONDS,
    )


def _ready_workers(spec: Spec, seen: Observation) -> tuple[int, ...]:
    return tuple(worker for worker in range(spec.workers.replicas) if is_ready(spec, seen, worker))


def _launches(spec: Spec, seen: Observation) -> tuple[SendLaunch, ...]:
    """Launch orders for the participants that do not yet know of this attempt."""
    status = seen.status
    first = seen.agent_of(status.participants[0])
    master = seen.pod_of(status.participants[0])
    if first is None or first.heartbeat is None or master is None or not master.ip:
        return ()  # also if the watch of pods lags: without an address nobody would find the store
    size = spec.workers.ranks_per_worker
    launches = []
    for place, worker in enumerate(status.participants):
        agent = seen.agent_of(worker)
        if agent is None or not agent.connected or seen.heartbeat_of(worker) is not None:
            continue
        launch = Launch(
            attempt=status.attempt,
            world_size=size * len(status.participants),
            first_rank=size * place,
            ranks=size,
            workers=len(status.participants),
            master_addr=master.ip,
            master_port=first.heartbeat.store_port,
            run=f"{seen.namespace}/{seen.name}",
            run_uid=seen.uid,
            restore=status.restore,
            checkpoint=spec.checkpoint.plan(),
            keep=status.keep,
            follows=status.open_incident.attempt if status.keep and status.open_incident else 0,
        )
        launches.append(SendLaunch(worker=worker, pod_uid=agent.pod_uid, launch=launch))
    return tuple(launches)


def _stops(seen: Observation) -> tuple[SendStop, ...]:
    """Orders to end what still runs of attempts before; a launch would do so too, but it may be long in coming."""
    if seen.status.keep:
        return ()  # it is to be kept, and waits
    return tuple(
        SendStop(
            worker=agent.worker, pod_uid=agent.pod_uid, attempt=agent.heartbeat.attempt, reason="a new attempt begins"
        )
        for agent in seen.agents
        if agent.heartbeat is not None and agent.heartbeat.attempt < seen.status.attempt and runs_ranks(agent)
    )


def runs_ranks(agent: AgentView) -> bool:
    """Whether it can be told to end ranks, and has some that are not yet ending."""
    beat = agent.heartbeat
    if beat is None or not agent.connected or beat.state is not AgentState.RUNNING:
        return False
    return any(rank.exit is None for rank in beat.ranks)


# ---------------------------------------------------------------- objects
def missing_objects(spec: Spec, seen: Observation) -> tuple[AnyAction, ...]:
    """Creation of what the run needs and has not, so many at a time: news of these wakes the next look."""
    actions: list[AnyAction] = []
    if not seen.has_token:
        actions.append(CreateToken())
    if not seen.has_service:
        actions.append(CreateService())
    for worker in _wanted(spec, seen.status):
        pod = seen.pod_of(worker)
        if pod is None or (pod.deleting and not seen.status.participants):
            actions.append(CreateWorker(index=worker, attempt=seen.status.attempt))
    return tuple(actions[:MAX_CREATIONS])


def removals(spec: Spec, seen: Observation, now: float) -> tuple[DeleteWorker, ...]:
    """Deletion of pods that stand for no worker, and by force of those that do not go."""
    standing = {pod.uid for worker in _wanted(spec, seen.status) if (pod := seen.pod_of(worker)) is not None}
    found = []
    for pod in seen.pods:
        if pod.uid in seen.status.replacing:
            waited = now - (seen.status.attempt_started_at or now)
            found.append(removal(pod, "to be replaced", force=waited >= FORCE_SECONDS))
        elif pod.uid not in standing:
            found.append(removal(pod, "not needed any more"))
        elif pod.deleting:
            found.append(removal(pod, "told to go"))
        elif seen.status.participants and _is_to_be_renewed(seen, pod):
            found.append(removal(pod, "it has ended"))
    return tuple(each for each in found if each is not None)


def removal(
    pod: WorkerPod, reason: str, *, force: bool = False, grace_seconds: int | None = REMOVAL_GRACE_SECONDS
) -> DeleteWorker | None:
    """Deletion of a pod unless it goes already. On a dead node it is forced: nobody there will confirm its end."""
    if force or not pod.node_ready:
        return DeleteWorker(name=pod.name, uid=pod.uid, grace_seconds=0, reason=reason)
    if pod.deleting:
        return None
    return DeleteWorker(name=pod.name, uid=pod.uid, grace_seconds=grace_seconds, reason=reason)


def _wanted(spec: Spec, status: RunStatus) -> tuple[int, ...]:
    return tuple(sorted({*range(spec.workers.replicas), *status.participants}))


def _is_to_be_renewed(seen: Observation, pod: WorkerPod) -> bool:
    return pod.index not in seen.status.participants and pod.phase in ENDED and pod.age_seconds > RENEW_SECONDS
