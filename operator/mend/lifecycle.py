"""Pure: the beginning, the pauses and the end of a run."""

from __future__ import annotations

from msgspec.structs import replace

from mend.actions import AnyAction, Decision, DeleteRun, DeleteWorker, EmitEvent, SendStop
from mend.assembling import RETRY_SECONDS, assemble, removal, wait_for_storage
from mend.conditions import with_condition, without_condition
from mend.exitcodes import ExitCode
from mend.goodput import account, suspended_seconds
from mend.names import CONTROLLER_NAME
from mend.noted import with_progress
from mend.observation import Observation, PodPhase, WorkerPod
from mend.presence import ENDED, has_finished
from mend.records import closed
from mend.spec import Spec
from mend.status import RunPhase
from mend.transitions import failed, next_attempt, with_actions

PREDECESSORS_SECONDS = 60.0  # what they save later is not taken up
LINGER_SECONDS = 60.0  # a pod that has not stopped by then is deleted


def why_not_ours(spec: Spec, seen: Observation) -> str:
    """Why this run is none of our business; "" if it is."""
    if seen.deleting:
        return "the run is being deleted; its pods follow, checkpoints stay"
    if spec.managed_by != CONTROLLER_NAME:
        return f"managed by {spec.managed_by}"
    return ""


# ---------------------------------------------------------------- the end
def after_the_end(spec: Spec, seen: Observation, now: float) -> Decision | None:
    """What is left of a run that has ended is ended too, and after its time to live the run itself."""
    status = seen.status
    if not status.phase.is_final:
        return None
    ended_for = now - (status.finished_at if status.finished_at is not None else now)
    ttl = spec.ttl_seconds_after_finished
    if ttl is not None and ended_for >= ttl:
        return Decision(status=status, actions=(DeleteRun(),), reason=f"finished {ended_for:.0f} s ago")
    actions = [action for pod in seen.pods if (action := _dismissal(seen, pod, ended_for)) is not None]
    waits = [ttl - ended_for] if ttl is not None else []
    waits += [RETRY_SECONDS] if any(pod.phase not in ENDED for pod in seen.pods) else []
    return Decision(status=status, actions=tuple(actions), reason="after the end", wake_after=min(waits, default=None))


def _dismissal(seen: Observation, pod: WorkerPod, ended_for: float) -> AnyAction | None:
    """Agents are told to exit, so that pods and their logs stay; who cannot be told is deleted in the end."""
    if pod.phase in ENDED:
        return None
    agent = next((each for each in seen.agents if each.pod_uid == pod.uid), None)
    lingers = ended_for > LINGER_SECONDS  # told or not: a stopped process keeps its connections
    if agent is not None and agent.connected and not pod.deleting and not lingers:
        succeeded = seen.status.phase is RunPhase.SUCCEEDED
        return SendStop(
            worker=pod.index,
            pod_uid=pod.uid,
            attempt=seen.status.attempt,
            reason=f"the run has {seen.status.phase.lower()}",
            exit=True,
            exit_code=ExitCode.SUCCEEDED if succeeded else ExitCode.STOPPED,
        )
    if lingers or pod.phase is PodPhase.PENDING:
        return removal(pod, "the run has ended")
    return None


def expired(spec: Spec, seen: Observation, now: float) -> Decision | None:
    """The run was active for longer than it may."""
    left = seconds_until_deadline(spec, seen, now)
    if left is None or left > 0:
        return None
    seen = replace(seen, status=with_progress(seen.status, seen))
    message = f"active for longer than {spec.active_deadline_seconds} s (spec.activeDeadlineSeconds)"
    return failed(seen, "DeadlineExceeded", message, now)


def seconds_until_deadline(spec: Spec, seen: Observation, now: float) -> float | None:
    """Seconds of activity that are left; None without a deadline, and while the run is suspended or has ended."""
    limit, status = spec.active_deadline_seconds, seen.status
    if limit is None or status.started_at is None or spec.suspend or status.phase.is_final:
        return None
    return limit - (now - status.started_at - suspended_seconds(status, now))


def completed(spec: Spec, seen: Observation, now: float) -> Decision | None:
    """All ranks of the gang have done their work."""
    present = seen.status.participants
    if not present or not all(has_finished(spec, seen, worker) for worker in present):
        return None
    status = closed(with_progress(account(seen.status, now), seen), 0.0, now)
    status = replace(status, phase=RunPhase.SUCCEEDED, finished_at=now, reported_at=now, saving_until=None)
    status = with_condition(status, "Succeeded", True, "Completed", f"all ranks finished at step {status.step}", now)
    event = EmitEvent(type="Normal", reason="Completed", message=f"finished at step {status.step}")
    return Decision(status=status, actions=(event,), reason="all ranks have finished", wake_after=0.0)


# ---------------------------------------------------------------- pauses and the beginning
def suspended(spec: Spec, seen: Observation, now: float) -> Decision | None:
    """The run is to hold no pods; its ranks save as the pods go."""
    if not spec.suspend:
        return None
    status = seen.status
    if status.phase is RunPhase.SUSPENDED:
        return Decision(status=status, actions=_clearance(seen), reason="suspended")
    status = with_progress(account(status, now), seen)
    status = replace(status, phase=RunPhase.SUSPENDED, participants=(), replacing=(), saving_until=None)
    status = with_condition(status, "Suspended", True, "Suspended", "spec.suspend is true", now)
    event = EmitEvent(type="Normal", reason="Suspended", message=f"suspended after step {status.step}")
    return Decision(status=status, actions=(*_clearance(seen), event), reason="spec.suspend is true")


def _clearance(seen: Observation) -> tuple[DeleteWorker, ...]:
    """Deletion of all pods, with the grace that their templates give for saving."""
    found = [removal(pod, "the run is suspended", grace_seconds=None) for pod in seen.pods]
    return tuple(each for each in found if each is not None)


def begin(spec: Spec, seen: Observation, now: float) -> Decision | None:
    """The first attempt, or the first after a suspension."""
    status = seen.status
    if status.attempt > 0 and status.phase is not RunPhase.SUSPENDED:
        return None
    if status.phase is RunPhase.SUSPENDED and seen.pods:
        why = "resumes once the pods of before are gone, since they may yet save"
        return Decision(status=status, actions=_clearance(seen), reason=why)
    if status.attempt == 0 and seen.predecessors and now - seen.created_at < PREDECESSORS_SECONDS:
        why = f"begins once {', '.join(seen.predecessors[:8])} of the run that had this name before are gone"
        return Decision(status=status, reason=why, wake_after=RETRY_SECONDS)
    if (waiting := wait_for_storage(seen, now)) is not None:
        return waiting
    status = next_attempt(seen, now, RunPhase.PENDING)
    status = without_condition(status, "Suspended")
    status = replace(status, started_at=now if status.started_at is None else status.started_at)
    event = EmitEvent(
        type="Normal",
        reason="Resumed" if seen.status.attempt > 0 else "Started",
        message=f"attempt {status.attempt} with {spec.workers.replicas} workers",
    )
    return with_actions(assemble(spec, replace(seen, status=status), now), event)
