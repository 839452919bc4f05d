"""Pure: a gang that is complete: reports, retention, and the change to another size."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from mend.actions import AnyAction, Decision, EmitEvent, PruneCheckpoints, SendSaveNow, SendStop, SweepLeftovers
from mend.assembling import assemble, missing_objects, removals, runs_ranks, strikes_to_tell
from mend.diagnose import seconds_until_diagnosis
from mend.goodput import account
from mend.interval import interval_in_force
from mend.noted import newly_slow, with_health, with_progress, with_suspects, with_workers
from mend.observation import Observation
from mend.presence import gone, is_ready, world_size
from mend.records import closed
from mend.restore import expendable
from mend.saving import save_report, saving
from mend.scores import with_scores
from mend.seats import seats
from mend.snapshots import with_memory
from mend.spec import Spec
from mend.status import RunPhase, RunStatus
from mend.story import start
from mend.transitions import next_attempt

REPORT_SECONDS = 5.0  # how often step, loss and ledger are written while nothing else changes
SWEEP_SECONDS = 6 * 3600.0  # how often leftovers are looked for, which lists every object
SAID_NOTICES = 8
LOOK_SECONDS = 1.0  # how often to look whether a gang that was asked to end has ended


def training(spec: Spec, seen: Observation, now: float) -> Decision:
    """The gang is complete and nothing is wrong."""
    before = seen.status
    status = with_suspects(spec, with_workers(spec, before, seen, now), seen, now)
    actions: list[AnyAction] = [
        *missing_objects(spec, seen, now),
        *removals(spec, seen, now),
        *strikes_to_tell(seen, now),
    ]
    if before.phase is not RunPhase.RUNNING and _has_stepped(spec, seen):
        status = _back(status, seen, now)
        actions.append(EmitEvent(type="Normal", reason="Training", message=_said_on_start(status)))
    if status.phase is RunPhase.RUNNING:
        if why := _wants_other_size(spec, seen, now):
            return _resize(spec, replace(seen, status=status), why, now)
        status, asking = _save_before_they_go(status, seen)
        actions += asking
        status, order = saving(spec.checkpoint, replace(seen, status=status), status, now)
        actions += order
        status = with_scores(spec.checkpoint, status, seen)
        if now - (status.swept_at if status.swept_at is not None else now) >= SWEEP_SECONDS:
            actions.append(SweepLeftovers(attempt=status.attempt))
            status = replace(status, swept_at=now)
        old = expendable(seen.uid, status, spec.checkpoint, seen.store.checkpoints)
        if old and not seen.store.problem and not _may_roll_back(spec, seen):
            actions.append(PruneCheckpoints(uris=tuple(each.ref.uri for each in old)))
    due = now - status.reported_at >= REPORT_SECONDS
    if due or status.phase is not before.phase:
        status = with_memory(spec, with_progress(account(status, now), seen), seen, now)
        status = replace(with_health(spec, status, seen, now), reported_at=now)
        chosen = interval_in_force(spec.checkpoint, status, save_report(seen))
        status = replace(status, interval=chosen, swept_at=now if status.swept_at is None else status.swept_at)
        actions += newly_slow(before, status)
    wake = min(seconds_until_diagnosis(spec, seen), max(0.05, REPORT_SECONDS - (now - status.reported_at)))
    return Decision(status=status, actions=tuple(actions), reason="training", wake_after=wake)


def _may_roll_back(spec: Spec, seen: Observation) -> bool:
    """Whether the loss is above its bound: until that is called a spike, or noise, what was saved before it is kept."""
    return spec.health.loss_spike.roll_back and seen.losses is not None and seen.losses.above > 0


def _has_stepped(spec: Spec, seen: Observation) -> bool:
    """Every rank of the gang has completed a step in this attempt."""
    ranks = seen.ranks
    return len(ranks) == world_size(spec, seen) and all(rank.steps_done > 0 for rank in ranks)


def _back(status: RunStatus, seen: Observation, now: float) -> RunStatus:
    """The status of a gang that has made its first step."""
    if status.restored_step is None:  # a loop that does not tell what it restored
        status = replace(status, restored_step=min(rank.step - rank.steps_done for rank in seen.ranks))
    status = replace(account(status, now), phase=RunPhase.RUNNING)
    return closed(status, _median_step_seconds(seen), now)


def _median_step_seconds(seen: Observation) -> float:
    times = sorted(seen.step_times.seconds) or sorted(rank.step_seconds for rank in seen.ranks)
    return times[len(times) // 2] if times else 0.0


def _said_on_start(status: RunStatus) -> str:
    step = -1 if status.restored_step is None else status.restored_step
    return f"attempt {status.attempt} trains, {start(step, status.origin)}"


# ---------------------------------------------------------------- workers that will go
def _save_before_they_go(status: RunStatus, seen: Observation) -> tuple[RunStatus, tuple[AnyAction, ...]]:
    """Asks all ranks to save when it is known that a worker will go, once for each notice."""
    notices = tuple(notice for worker in status.participants for notice in _notices(seen, worker))
    fresh = [notice for notice in notices if notice not in status.notices]
    status = replace(status, notices=notices)
    if not fresh:
        return status, ()
    asks = tuple(
        SendSaveNow(worker=agent.worker, pod_uid=agent.pod_uid, attempt=status.attempt)
        for agent in seen.connected(status.participants)
    )
    message = f"{'; '.join(fresh[:SAID_NOTICES])}: all ranks save at the end of this step"
    return status, (*asks, EmitEvent(type="Normal", reason="SavingEarly", message=message))


def _notices(seen: Observation, worker: int) -> Iterator[str]:
    """What says that this worker will go, in words that are the same at each look: no pod's name is used twice."""
    pod = seen.pod_of(worker)
    if pod is not None and pod.deleting:
        yield f"pod {pod.name} was told to go"
    if pod is not None and pod.node_leaves:
        yield f"{pod.node} has {pod.node_leaves}"


# ---------------------------------------------------------------- another size
def _wants_other_size(spec: Spec, seen: Observation, now: float) -> str:
    """Why the gang should be relaunched with other workers; "" if not."""
    present = seen.status.participants
    if seen.store.problem or any(each.reason == "SaveFailed" for each in seen.status.conditions):
        return ""  # what cannot be saved would be lost
    wanted = spec.workers
    if len(present) > wanted.replicas or any(worker >= wanted.pods for worker in present):
        return f"spec.workers is now {wanted.replicas} replicas and {wanted.spares} spares"
    seated = seats(spec, seen, now)
    joined = [worker for worker in seated if worker not in present]
    if len(present) < wanted.replicas and all(is_ready(spec, seen, worker) for worker in seated):
        return f"workers {', '.join(map(str, joined))} are there"
    return ""


def _resize(spec: Spec, seen: Observation, why: str, now: float) -> Decision:
    """Asks the ranks to save and end. It is planned, so it costs no budget."""
    patience = spec.health.limits.saving_seconds
    stops = tuple(
        SendStop(
            worker=agent.worker,
            pod_uid=agent.pod_uid,
            attempt=seen.status.attempt,
            reason=why,
            grace_seconds=patience,
        )
        for agent in seen.connected(seen.status.participants)
    )
    status = replace(with_progress(account(seen.status, now), seen), saving_until=now + patience)
    event = EmitEvent(type="Normal", reason="Resizing", message=f"{why}: saving, then going on with another gang")
    return Decision(status=status, actions=(*stops, event), reason=why, wake_after=LOOK_SECONDS)


def resizing(spec: Spec, seen: Observation, now: float) -> Decision | None:
    """The ranks were asked to save and end: the next gang is assembled once they have, or the time is up.

    Orders are not sent again, since each would begin another save; if one was lost, the time runs out and a few steps
    are done twice. That ranks end now is no incident.
    """
    until = seen.status.saving_until
    if until is None or gone(spec, seen) is not None:
        return None
    agents = [seen.agent_of(worker) for worker in seen.status.participants]
    working = any(agent is not None and runs_ranks(agent) for agent in agents)
    if working and 0 < until - now <= spec.health.limits.saving_seconds:
        return Decision(status=seen.status, reason="the ranks save before they end", wake_after=LOOK_SECONDS)
    status = next_attempt(seen, now, RunPhase.RECOVERING)
    return assemble(spec, replace(seen, status=status), now)
