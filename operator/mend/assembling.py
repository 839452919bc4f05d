"""Pure: makes what a gang needs, removes what is in its way, and launches it once all are there."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from mend import machines, tiers
from mend.actions import (
    AnyAction,
    CreateService,
    CreateTls,
    CreateToken,
    CreateWorker,
    Decision,
    DeleteWorker,
    EmitEvent,
    LiftStrikes,
    SendLaunch,
    SendStop,
    StrikeNode,
)
from mend.conditions import with_condition, without_condition
from mend.goodput import account
from mend.heartbeats import AgentState, Heartbeat
from mend.incidents import Tier
from mend.interval import launched
from mend.nodechecks import check_machines
from mend.noted import with_workers
from mend.observation import AgentView, Observation, WorkerPod
from mend.orders import Launch
from mend.presence import ENDED, is_going, is_ready, is_silent, lost_in_reserve, places
from mend.restore import lineage_after
from mend.seats import seats
from mend.snapshots import buddy_urls, holders_of, is_yet_to_hear, plan, wait_for_word
from mend.spec import Spec
from mend.status import RunPhase, RunStatus
from mend.strikes import most_lenient, struck
from mend.transitions import attempt_heard, attempt_of_predecessors, next_attempt

RETRY_SECONDS = 2.0
RESEND_SECONDS = 1.0
REMOVAL_GRACE_SECONDS = 1
FORCE_SECONDS = 10.0  # a pod that is to be replaced is forced off if it has not gone by then
OUTWAIT_SECONDS = 15.0  # and waited for no longer than that: the attempt fences it
MAX_CREATIONS = 50  # in one decision, which other runs wait for
TELL_SECONDS = 600.0  # a strike that the book has not taken by then is let go
LENIENT_SECONDS = 5.0  # a pod must have waited so long for a node before its reasons to avoid some are looked at again
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
    changes = (*missing_objects(spec, seen, now), *removals(spec, seen, now), *strikes_to_tell(seen, now))
    if status.participants:
        actions = (*changes, *_launches(spec, seen), *_stops(seen))
        return Decision(status=status, actions=actions, reason="launching", wake_after=RESEND_SECONDS)
    status = with_workers(spec, status, seen, now)
    seen = replace(seen, status=status)
    waiting = wait_for_storage(seen, now) or _wait(spec, seen, now) or _wait_for_listing(spec, seen)
    if waiting is not None:
        return replace(waiting, actions=(*changes, *_stops(seen), *waiting.actions))
    if (checking := check_machines(spec, seen, now)) is not None:
        return replace(checking, actions=(*changes, *_stops(seen), *checking.actions))
    if (seconds := wait_for_word(spec, seen, _ready_workers(spec, seen, now), now)) > 0:
        why = "hearing which snapshots the workers hold"
        return Decision(status=status, actions=(*changes, *_stops(seen)), reason=why, wake_after=seconds)
    return _launch(spec, seen, changes, now)


def strikes_to_tell(seen: Observation, now: float) -> tuple[StrikeNode, ...]:
    """Entry of this run's new strikes into the book of all; again, until they are found there."""
    fresh = [each for each in seen.status.strikes if now - each.struck_at < TELL_SECONDS and not each.lifted]
    return tuple(StrikeNode(strike=each) for each in fresh if struck(seen.strikes, each) != seen.strikes)


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
    present = len(_ready_workers(spec, seen, now))
    patience = spec.recovery.shrink_after_seconds - waited
    if present < spec.workers.min_replicas or (present < spec.workers.replicas and patience > 0):
        look = spec.health.lost_after_seconds  # a worker may be lost without any news
        if any(agent.connected and is_silent(spec, agent) for agent in seen.agents):
            look = min(look, RETRY_SECONDS)  # that it is heard again would be none either
        if any(pod.avoids for pod in seen.pods):
            look = min(look, RETRY_SECONDS)  # nodes may prove to be short
        return Decision(
            status=status,
            actions=_leniency(spec, seen, now),
            reason="waiting for workers",
            wake_after=min(look, patience) if patience > 0 else look,
        )
    delay = tiers.launch_delay_seconds(status) - waited
    return Decision(status=status, reason="backing off", wake_after=delay) if delay > 0 else None


def _leniency(spec: Spec, seen: Observation, now: float) -> tuple[AnyAction, ...]:
    """Strikes are lifted, the oldest first, when no node is left for a worker of the gang: some machine beats none."""
    held = places(spec, seen.status)
    short = [
        pod for pod in seen.pods if pod.index in held and _finds_no_node(pod) and pod.age_seconds > LENIENT_SECONDS
    ]
    avoided = tuple(dict.fromkeys(node for pod in short for node in pod.avoids))
    given = most_lenient(machines.book(seen), avoided, now)
    if not given:
        return ()
    message = f"no node is left for worker {short[0].index}: the strikes against {given[0].node} are lifted"
    return (
        LiftStrikes(ids=tuple(each.id for each in given)),
        EmitEvent(type="Warning", reason="StrikesLifted", message=message),
    )


def _finds_no_node(pod: WorkerPod) -> bool:
    """Whether the scheduler has found no node for it, and some that would do but for its node affinity."""
    return not pod.node and pod.reason == "Unschedulable" and "node affinity" in pod.message


# ---------------------------------------------------------------- launching
def _launch(spec: Spec, seen: Observation, changes: tuple[AnyAction, ...], now: float) -> Decision:
    seated = seats(spec, seen, now)
    own = seated == tuple(range(spec.workers.replicas))
    participants = _ready_workers(spec, seen, now)
    able = plan(spec, seen, participants)
    status = replace(
        account(seen.status, now),
        participants=participants,
        keep=seen.status.keep if _are_where_they_were(spec, seen, participants) else (),
        places=() if own else seated,
        follows=None,
        interval=launched(spec.checkpoint, seen.status),
        lineage=lineage_after(able[0].state) if able else (),
        restore=tuple(each.state.ref for each in able),
        origins=tuple(each.origin for each in able),
    )
    caution = seen.store.caution
    told = any((each.type, each.status) == ("ConditionalWrites", "False") for each in status.conditions)
    warning = EmitEvent(type="Warning", reason="NoConditionalWrites", message=caution)
    if caution:
        status = with_condition(status, "ConditionalWrites", False, "NoConditionalWrites", caution, now)
    else:
        status = without_condition(status, "ConditionalWrites")
    status = with_condition(status, "StorageReady", True, "Ready", "the checkpoints can be read", now)
    before, seen = seen, replace(seen, status=status)
    return Decision(
        status=status,
        actions=(
            *changes,
            *_launches(spec, seen),
            *_stops(seen),
            *_said_of_spares(spec, before, seated),
            *((warning,) if caution and not told else ()),
        ),
        reason=f"launching attempt {status.attempt}",
        wake_after=RESEND_SECONDS,
    )


def _automatic(spec: Spec, status: RunStatus) -> float:
    """What an automatic interval had come to, for ranks to keep by themselves: the controller may be away."""
    told = status.interval.launched_seconds if status.interval else None
    return told if told is not None else spec.checkpoint.first_interval_seconds


def _ready_workers(spec: Spec, seen: Observation, now: float) -> tuple[int, ...]:
    return tuple(worker for worker in seats(spec, seen, now) if is_ready(spec, seen, worker))


def _are_where_they_were(spec: Spec, seen: Observation, participants: tuple[int, ...]) -> bool:
    """Whether the ranks of the attempt before are those of the coming one, each on the same worker.

    Else none can go on in its process: a spare has taken a place, or the gang has another size.
    """
    size = spec.workers.ranks_per_worker
    held = {
        rank.rank
        for place, worker in enumerate(participants)
        if (agent := seen.agent_of(worker)) is not None and agent.heartbeat is not None
        for rank in agent.heartbeat.ranks
        if agent.heartbeat.attempt == seen.status.follows and rank.rank // size == place
    }
    return held == set(range(size * len(participants)))


def _said_of_spares(spec: Spec, before: Observation, seated: tuple[int, ...]) -> tuple[EmitEvent, ...]:
    """Who takes over from whom; at the first launch nobody does, whoever was there first began."""
    changed = [pair for pair in zip(places(spec, before.status), seated, strict=True) if pair[0] != pair[1]]
    if not before.status.follows or not changed:
        return ()
    message = "; ".join(f"worker {worker} is replaced by spare {spare}" for worker, spare in changed)
    return (EmitEvent(type="Normal", reason="SpareTookOver", message=message),)


def _launches(spec: Spec, seen: Observation) -> tuple[SendLaunch, ...]:
    """Launch orders for the participants that do not yet know of this attempt."""
    status = seen.status
    first = seen.agent_of(status.participants[0])
    master = seen.pod_of(status.participants[0])
    if first is None or first.heartbeat is None or master is None or not master.ip:
        return ()  # also if the watch of pods lags: without an address nobody would find the store
    if is_yet_to_hear(spec, seen):
        return ()
    size = spec.workers.ranks_per_worker
    find, urls = holders_of(spec, seen), buddy_urls(spec, seen)
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
            checkpoint=spec.checkpoint.plan(_automatic(spec, seen.status)),
            holders=find(worker),
            buddy=urls.get(worker, ""),
            keep=status.keep,
            follows=status.open_incident.attempt if status.keep and status.open_incident else 0,
        )
        launches.append(SendLaunch(worker=worker, pod_uid=agent.pod_uid, launch=launch))
    return tuple(launches)


def _stops(seen: Observation) -> tuple[SendStop, ...]:
    """Orders to end what still runs of attempts before; a launch would do so too, but it may be long in coming.

    Once launched, to those only who take no part any more.
    """
    status = seen.status
    if status.keep and not status.participants:
        return ()  # it is to be kept, and waits
    return tuple(
        SendStop(
            worker=agent.worker, pod_uid=agent.pod_uid, attempt=agent.heartbeat.attempt, reason="a new attempt begins"
        )
        for agent in seen.agents
        if agent.worker not in status.participants
        and agent.heartbeat is not None
        and agent.heartbeat.attempt < status.attempt
        and runs_ranks(agent)
    )


def runs_ranks(agent: AgentView) -> bool:
    """Whether it can be told to end ranks, and has some that are not yet ending."""
    beat = agent.heartbeat
    if beat is None or not agent.connected or beat.state is not AgentState.RUNNING:
        return False
    return any(rank.exit is None for rank in beat.ranks)


# ---------------------------------------------------------------- objects
def missing_objects(spec: Spec, seen: Observation, now: float) -> tuple[AnyAction, ...]:
    """Creation of what the run needs and has not, so many at a time: news of these wakes the next look."""
    actions: list[AnyAction] = []
    if not seen.has_token:
        actions.append(CreateToken())
    if not seen.has_tls:
        actions.append(CreateTls())
    if not seen.has_service:
        actions.append(CreateService())
    avoid = machines.excluded(spec, seen, now)
    for worker in _wanted(spec, seen.status):
        pod = seen.pod_of(worker)
        if pod is None or (pod.deleting and not seen.status.participants):
            actions.append(CreateWorker(index=worker, attempt=seen.status.attempt, avoid=avoid))
    return tuple(actions[:MAX_CREATIONS])


def removals(spec: Spec, seen: Observation, now: float) -> tuple[DeleteWorker, ...]:
    """Deletion of pods that stand for no worker, and by force of those that do not go."""
    standing = {pod.uid for worker in _wanted(spec, seen.status) if (pod := seen.pod_of(worker)) is not None}
    avoid = machines.excluded(spec, seen, now)
    found = []
    for pod in seen.pods:
        if pod.uid in seen.status.replacing:
            waited = now - (seen.status.attempt_started_at or now)
            found.append(removal(pod, "to be replaced", force=waited >= FORCE_SECONDS))
        elif pod.uid not in standing:
            found.append(removal(pod, "not needed any more"))
        elif pod.deleting:
            found.append(removal(pod, "told to go"))
        elif not pod.node and pod.age_seconds > LENIENT_SECONDS and not set(pod.avoids) <= set(avoid):
            found.append(removal(pod, "it avoids nodes that need not be avoided any more"))
        elif seen.status.participants and (why := _why_renew(spec, seen, pod, avoid)):
            found.append(removal(pod, why))
    return tuple(each for each in found if each is not None)


def removal(
    pod: WorkerPod, reason: str, *, force: bool = False, grace_seconds: int | None = REMOVAL_GRACE_SECONDS
) -> DeleteWorker | None:
    """Deletion of a pod unless it goes already.

    On a dead node it is forced, as nobody there will confirm its end; so is that of one which has ended: all was said.
    """
    if force or not pod.node_ready or pod.phase in ENDED:
        return DeleteWorker(name=pod.name, uid=pod.uid, grace_seconds=0, reason=reason)
    if pod.deleting:
        return None
    return DeleteWorker(name=pod.name, uid=pod.uid, grace_seconds=grace_seconds, reason=reason)


def _wanted(spec: Spec, status: RunStatus) -> tuple[int, ...]:
    return tuple(sorted({*range(spec.workers.pods), *status.participants}))


def _why_renew(spec: Spec, seen: Observation, pod: WorkerPod, avoid: Sequence[str]) -> str:
    """Why a pod that holds no ranks while others train is made anew; "" if it is well where it is."""
    if pod.index in seen.status.participants or pod.age_seconds <= RENEW_SECONDS:
        return ""
    if pod.node in avoid:
        return f"{pod.node} is kept away from"
    return "it has ended" if pod.phase in ENDED else lost_in_reserve(spec, seen, pod.index)
