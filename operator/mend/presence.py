"""Pure: which workers of a run are there, silent, going or gone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf

from mend import culprit
from mend.exitcodes import FATAL_EXIT_CODES, ExitCode
from mend.heartbeats import Phase, RankReport
from mend.incidents import FailureClass, Incident, IncidentKind, Verdict
from mend.observation import AgentView, Observation, PodPhase, WorkerPod
from mend.spec import Spec
from mend.status import RunStatus
from mend.watchdog import until_bounds

SUSPECT_HEARTBEATS = 3
CONFIRM_SECONDS = 1.0  # a refused connection must last so long before a worker counts as lost
SAID_CHARACTERS = 200  # of a line that a user's program wrote: it may be of any length
SAID_WORKERS = 8
ENDED = (PodPhase.SUCCEEDED, PodPhase.FAILED)
DISRUPTIONS = frozenset(
    {"Evicted", "Preempting", "Preempted", "NodeShutdown", "Terminated", "DisruptionTarget", "TaintManagerEviction"}
)
CANNOT_START = frozenset({"StartError", "ContainerCannotRun"})  # of containerd and cri-o; of docker
# What runc says of a command that the image does not have. Hooks and mounts, which are the node's, fail in other words.
UNUSABLE_COMMAND = re.compile(
    r"\bexec:? .*(executable file not found|no such file|permission denied|exec format error|is a directory)",
    re.IGNORECASE,
)
KILLED = 137  # the container's exit code after a SIGKILL
# What an agent's process ends with for reasons that lie outside the image: it, and what mend or the kernel made of it.
NOT_OF_THE_IMAGE = frozenset({ExitCode.SUCCEEDED, ExitCode.AGENT_FAILED, ExitCode.STOPPED, KILLED})
STEPPING = frozenset({Phase.DATA, Phase.STEP, Phase.COLLECTIVE})


# ---------------------------------------------------------------- who is where
def places(spec: Spec, status: RunStatus) -> tuple[int, ...]:
    """The worker that has each place of the gang, and with it its rank numbers: its own, but where a spare took over.

    Spares are the workers that have none.
    """
    held = tuple(worker for worker in status.places if worker < spec.workers.pods)[: spec.workers.replicas]
    free = tuple(worker for worker in range(spec.workers.pods) if worker not in held)
    return (*held, *free[: spec.workers.replicas - len(held)])


def ranks_of(spec: Spec, seen: Observation, worker: int) -> tuple[int, ...]:
    """The ranks that a worker holds in this attempt; none if it takes no part."""
    if worker not in seen.status.participants:
        return ()
    size = spec.workers.ranks_per_worker
    first = seen.status.participants.index(worker) * size
    return tuple(range(first, first + size))


def world_size(spec: Spec, seen: Observation) -> int:
    """How many ranks this attempt has."""
    return spec.workers.ranks_per_worker * len(seen.status.participants)


def workers_of(spec: Spec, seen: Observation, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The workers that hold these ranks in this attempt."""
    places = sorted({rank // spec.workers.ranks_per_worker for rank in ranks})
    present = seen.status.participants
    return tuple(present[place] for place in places if place < len(present))


def gang_step(seen: Observation) -> int:
    """The newest step that any rank tells of: they step together, so who tells of an older one has not been heard."""
    told = [rank.step for rank in seen.ranks if rank.steps_done > 0 or rank_has_finished(rank)]
    return max(told, default=seen.status.step)


def suspects(spec: Spec, seen: Observation) -> tuple[int, ...]:
    """Participants that have been silent for three heartbeats: no reason to act yet, but to be shown."""
    return tuple(worker for worker in seen.status.participants if is_silent(spec, seen.agent_of(worker)))


def is_silent(spec: Spec, agent: AgentView | None) -> bool:
    """Whether nothing was heard of it for three heartbeats."""
    return agent is None or agent.silent_seconds > suspect_after(spec)


def suspect_after(spec: Spec) -> float:
    """Seconds of silence that are remarkable."""
    return SUSPECT_HEARTBEATS * spec.health.heartbeat_seconds


def is_ready(spec: Spec, seen: Observation, worker: int) -> bool:
    """Whether its agent is connected, heard, and able to take ranks: a stopped process keeps its connections."""
    pod, agent = seen.pod_of(worker), seen.agent_of(worker)
    if pod is None or pod.deleting or agent is None or not agent.connected or agent.heartbeat is None:
        return False
    if is_silent(spec, agent):
        return False
    return agent.heartbeat.store_port > 0 and not agent.heartbeat.terminating


def is_going(seen: Observation, worker: int) -> bool:
    """Whether it was told to go, by whomever."""
    pod, agent = seen.pod_of(worker), seen.agent_of(worker)
    told = agent is not None and agent.heartbeat is not None and agent.heartbeat.terminating
    return told or (pod is not None and pod.deleting)


def has_finished(spec: Spec, seen: Observation, worker: int) -> bool:
    """Whether all its ranks have done their work."""
    pod, beat = seen.pod_of(worker), seen.heartbeat_of(worker)
    if pod is not None and pod.phase is PodPhase.SUCCEEDED:
        return True  # an agent ends so only when all its ranks did
    return (
        beat is not None
        and len(beat.ranks) == spec.workers.ranks_per_worker
        and all(rank_has_finished(rank) for rank in beat.ranks)
    )


def rank_has_finished(rank: RankReport) -> bool:
    """Whether its process ended as it should."""
    return rank.exit is not None and rank.exit.code == ExitCode.SUCCEEDED


def rank_has_failed(rank: RankReport) -> bool:
    """Whether its process ended as it should not, or is about to."""
    return rank.error is not None or (rank.exit is not None and not rank_has_finished(rank))


def never_ran(pod: WorkerPod) -> bool:
    """Whether its container could not even be started: there is no log, only the container runtime's word."""
    return pod.reason in CANNOT_START


# ---------------------------------------------------------------- who is gone
@dataclass(frozen=True, slots=True)
class Loss:
    """A worker that cannot come back by itself, and why. `blamed` is false where the fault is probably elsewhere."""

    worker: int
    kind: IncidentKind
    why: str
    age_seconds: float
    failure: FailureClass = FailureClass.INFRASTRUCTURE
    fatal: bool = False
    blamed: bool = True
    machine: str = ""  # what is wrong with its node, if that explains it


def gone(spec: Spec, seen: Observation) -> Incident | None:
    """The incident of workers that are gone: of participants once launched, else of those that will be needed."""
    launched = seen.status.participants
    if launched:
        losses = [loss for worker in launched if (loss := _loss(spec, seen, worker)) is not None]
    else:
        losses = [loss for n in places(spec, seen.status) if (loss := _loss_before_launch(spec, seen, n))]
    if not losses:
        return None
    worst = next((loss for loss in losses if loss.kind is IncidentKind.LOST), losses[0])
    blamed = tuple(loss.worker for loss in losses if loss.blamed)
    reasons = tuple(f"worker {loss.worker}: {loss.why}" for loss in losses[:SAID_WORKERS])
    if len(losses) > SAID_WORKERS:
        reasons += (f"and {len(losses) - SAID_WORKERS} more workers",)
    return Incident(
        kind=worst.kind,
        failure=worst.failure,
        attempt=seen.status.attempt,
        ranks=tuple(rank for loss in losses for rank in ranks_of(spec, seen, loss.worker)),
        workers=tuple(loss.worker for loss in losses),
        age_seconds=max(loss.age_seconds for loss in losses),
        verdict=Verdict(
            ranks=tuple(rank for worker in blamed for rank in ranks_of(spec, seen, worker)),
            confidence=0.95 if blamed else 0.0,
            reasons=reasons,
        ),
        summary="; ".join(reasons),
        fatal=any(loss.fatal for loss in losses),
        machine_faults={loss.worker: f"worker {loss.worker}: {loss.machine}" for loss in losses if loss.machine},
    )


def lost_in_reserve(spec: Spec, seen: Observation, worker: int) -> str:
    """Why a worker that holds no ranks, while others train, will hold none any more; "" if it may. No incident."""
    pod, loss = seen.pod_of(worker), _loss_before_launch(spec, seen, worker)
    return loss.why if loss is not None and pod is not None and pod.phase not in ENDED else ""


def _loss(spec: Spec, seen: Observation, worker: int) -> Loss | None:
    """What became of a worker that holds ranks."""
    pod, agent = seen.pod_of(worker), seen.agent_of(worker)
    silent = agent.silent_seconds if agent else 0.0
    if pod is None:
        return Loss(worker, IncidentKind.PREEMPTED, "its pod was deleted", silent, FailureClass.PREEMPTION)
    if has_finished(spec, seen, worker):
        return None
    if pod.phase in ENDED:
        return _ended(worker, pod, silent)
    if is_going(seen, worker) and not _may_yet_save(spec, seen, agent):
        why = f"it was told to go {pod.reason}".rstrip()
        return Loss(worker, IncidentKind.PREEMPTED, why, silent, FailureClass.PREEMPTION)
    if agent is None or not is_silent(spec, agent):
        return None
    if (loss := _confirmed_silence(spec, worker, pod, agent)) is not None:
        return loss
    if len(suspects(spec, seen)) == len(seen.status.participants):
        if silent <= max(spec.health.lost_after_seconds, spec.health.limits.ceiling_seconds):
            return None
        why = f"silent for {silent:.0f} s, and nobody else is heard: the controller itself may have been cut off"
        return Loss(worker, IncidentKind.LOST, why, silent, blamed=False)
    if silent > _patience(spec, seen, worker, pod):
        fault = node_fault(pod)
        why = f"silent for {silent:.1f} s while the gang stands still" + (f", and {fault}" if fault else "")
        return Loss(worker, IncidentKind.LOST, why, silent, machine=fault)
    return None


def _loss_before_launch(spec: Spec, seen: Observation, worker: int) -> Loss | None:
    """What became of a worker that was to take ranks. One that is just not there (yet) is simply made again."""
    pod, agent = seen.pod_of(worker), seen.agent_of(worker)
    if pod is None or pod.deleting:
        return None
    if pod.phase in ENDED:
        return _ended(worker, pod, 0.0, image_has_worked=seen.status.step >= 0)
    if agent is None or agent.heartbeat is None:
        return _never_heard(spec, worker, pod, agent)
    if not is_silent(spec, agent):
        return None
    if (loss := _confirmed_silence(spec, worker, pod, agent)) is not None:
        return loss
    silent = agent.silent_seconds
    if silent > spec.health.lost_after_seconds:
        return Loss(worker, IncidentKind.LOST, f"silent for {silent:.1f} s", silent)
    return None


def _never_heard(spec: Spec, worker: int, pod: WorkerPod, agent: AgentView | None) -> Loss | None:
    """An agent of which nothing was heard yet may still be starting, but not for ever, nor on a dead node."""
    if not pod.node_ready and pod.age_seconds > spec.health.lost_after_seconds:
        why = f"node {pod.node} is not ready"
        return Loss(worker, IncidentKind.LOST, why, 0.0, machine=why)
    if agent is not None and agent.silent_seconds > spec.health.limits.start_seconds:
        why = f"its agent has not been heard in {agent.silent_seconds:.0f} s: {agent.problem or 'no answer'}"
        return Loss(worker, IncidentKind.LOST, why, agent.silent_seconds)
    return None


def _confirmed_silence(spec: Spec, worker: int, pod: WorkerPod, agent: AgentView) -> Loss | None:
    """A silence that the node or the connection explains."""
    silent = agent.silent_seconds
    if not pod.node_ready:
        fault = node_fault(pod)
        return Loss(worker, IncidentKind.LOST, f"silent for {silent:.1f} s, and {fault}", silent, machine=fault)
    if not agent.connected and agent.problem == "refused" and silent > max(suspect_after(spec), CONFIRM_SECONDS):
        return Loss(worker, IncidentKind.LOST, f"its agent is gone: refused for {silent:.1f} s", silent)
    return None


def node_fault(pod: WorkerPod) -> str:
    """What the API server knows to be wrong with the node of a pod; "" if nothing."""
    if not pod.node_ready:
        return f"node {pod.node} is not ready"
    return f"node {pod.node} has {', '.join(pod.node_problems[:SAID_WORKERS])}" if pod.node_problems else ""


def _patience(spec: Spec, seen: Observation, worker: int, pod: WorkerPod) -> float:
    """How long a silence is borne that nothing else explains.

    Ranks that step in turn prove each other alive: while the others step on, the silent one does too, however long
    its agent says nothing. Once they stand still for clearly longer than their limit (what slows steps may hold up
    heartbeats, too), or complain that a peer is gone, three heartbeats are enough. While they load or save, each by
    itself, they prove nothing; then a complaint about the machine explains the silence.
    """
    mine = ranks_of(spec, seen, worker)
    others = tuple(rank for rank in seen.ranks if rank.rank not in mine)
    soon = max(suspect_after(spec), CONFIRM_SECONDS)
    if any(culprit.is_symptom(rank) for rank in others):
        return soon
    left = until_bounds(others, seen.step_times, spec.health.limits)
    if left is None:
        return spec.health.lost_after_seconds
    if left.limit <= -soon:
        return soon
    if all(rank.steps_done and rank.phase in STEPPING for rank in others if rank.exit is None):
        return inf
    return soon if pod.node_problems else spec.health.lost_after_seconds


def _ended(worker: int, pod: WorkerPod, silent: float, *, image_has_worked: bool = True) -> Loss:
    if pod.reason in DISRUPTIONS or pod.exit_code == ExitCode.TERMINATED:
        why = f"its pod was {pod.reason or 'terminated'}: {pod.message[:SAID_CHARACTERS]}".rstrip(": ")
        return Loss(worker, IncidentKind.PREEMPTED, why, silent, FailureClass.PREEMPTION)
    said = pod.log_tail[-1] if pod.log_tail else pod.message
    said = f": {said[:SAID_CHARACTERS]}" if said else ""
    code = f"exit code {pod.exit_code}" if pod.exit_code is not None else str(pod.phase)
    why = f"its agent ended with {code}" + (f" ({pod.reason})" if pod.reason else "") + said
    # The same step would need the same memory again, and the same image would not start on another node.
    unusable = never_ran(pod) and UNUSABLE_COMMAND.search(pod.message) is not None
    fatal = unusable or pod.exit_code in FATAL_EXIT_CODES
    is_users = fatal or pod.reason == "OOMKilled" or (not image_has_worked and _ended_by_itself(pod))
    failure = FailureClass.USER if is_users else FailureClass.INFRASTRUCTURE
    fault = "" if is_users else node_fault(pod)
    why += f"; {fault}" if fault else ""
    return Loss(worker, IncidentKind.LOST, why, silent, failure, fatal=fatal, machine=fault)


def _ended_by_itself(pod: WorkerPod) -> bool:
    """Whether what runs before the first rank does is at fault, and so would be on any node: an import that fails."""
    return pod.exit_code is not None and pod.exit_code not in NOT_OF_THE_IMAGE and not never_ran(pod)


def _may_yet_save(spec: Spec, seen: Observation, agent: AgentView | None) -> bool:
    """Whether a worker that was told to go may still save: the gang is not yet broken by its going.

    The wait is bounded by the pod's grace period, at the end of which the kubelet kills it.
    """
    if agent is None or not agent.connected or agent.heartbeat is None or is_silent(spec, agent):
        return False
    mine = ranks_of(spec, seen, agent.worker)
    broken = any(rank_has_failed(each) for each in seen.ranks if each.rank in mine or culprit.is_symptom(each))
    return any(rank.exit is None for rank in agent.heartbeat.ranks) and not broken
