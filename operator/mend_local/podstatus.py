"""Pure: from the states of a pod's containers to its phase, conditions and status, as Kubernetes words them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

Json = dict[str, Any]

OWN_CONDITIONS: Final = ("PodScheduled", "Initialized", "ContainersReady", "Ready")


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not running, but it will or may be."""

    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Running:
    """Its process is there."""

    started_at: str


@dataclass(frozen=True, slots=True)
class Terminated:
    """Its process has ended, or could not be started."""

    exit_code: int
    reason: str
    started_at: str
    finished_at: str
    signal: int | None = None
    message: str = ""


State = Waiting | Running | Terminated


@dataclass(frozen=True, slots=True)
class ContainerState:
    """A container now, how it ended the time before, and how often it was started anew."""

    name: str
    image: str
    container_id: str = ""
    state: State = Waiting("ContainerCreating")
    last: Terminated | None = None
    restarts: int = 0


def now_rfc3339() -> str:
    """The time as the API writes it, in whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def exit_of(code: int, started_at: str, *, oom_killed: bool = False, message: str = "") -> Terminated:
    """How a process ended, from its exit code, or minus the signal that ended it."""
    number = -code if code < 0 else None
    plain = code if number is None else 128 + number
    reason = "OOMKilled" if oom_killed else "Completed" if plain == 0 else "Error"
    return Terminated(plain, reason, started_at, now_rfc3339(), number, message)


def wants_restart(policy: str, ended: Terminated) -> bool:
    """Whether a container that ended so is started again."""
    return policy == "Always" or (policy == "OnFailure" and ended.exit_code != 0)


def phase_of(init: Sequence[ContainerState], main: Sequence[ContainerState], policy: str) -> str:
    """The pod's phase."""
    if policy == "Never" and any(isinstance(each.state, Terminated) and each.state.exit_code for each in init):
        return "Failed"
    states = [each.state for each in main]
    ended = [each for each in states if isinstance(each, Terminated)]
    if len(ended) == len(states) and not any(wants_restart(policy, each) for each in ended):
        return "Failed" if any(each.exit_code for each in ended) else "Succeeded"
    begun = any(isinstance(each, Running | Terminated) for each in states) or any(each.last for each in main)
    return "Running" if begun else "Pending"


def status_of(
    init: Sequence[ContainerState],
    main: Sequence[ContainerState],
    *,
    policy: str,
    start_time: str,
    pod_ip: str,
    host_ip: str,
    conditions_before: Iterable[Json],
    final: tuple[str, str] | None = None,
) -> Json:
    """The whole status. `final` is (reason, message) of a pod that is made to fail as a whole."""
    phase = "Failed" if final else phase_of(init, main, policy)
    done = phase in ("Succeeded", "Failed")
    initialized = all(isinstance(each.state, Terminated) and each.state.exit_code == 0 for each in init)
    ready = all(isinstance(each.state, Running) for each in main) and not done
    why_not = "PodCompleted" if phase == "Succeeded" else "PodFailed" if done else "ContainersNotReady"
    truths = {
        "PodScheduled": (True, ""),
        "Initialized": (initialized, "ContainersNotInitialized"),
        "ContainersReady": (ready, why_not),
        "Ready": (ready, why_not),
    }
    status: Json = {
        "phase": phase,
        "startTime": start_time,
        "hostIP": host_ip,
        "podIP": pod_ip,
        "podIPs": [{"ip": pod_ip}],
        "qosClass": "BestEffort",
        "conditions": merge_conditions(conditions_before, truths),
        "containerStatuses": [container_status(each) for each in main],
    }
    if init:
        status["initContainerStatuses"] = [container_status(each, init=True) for each in init]
    if final:
        status["reason"], status["message"] = final
    return status


def merge_conditions(before: Iterable[Json], truths: Mapping[str, tuple[bool, str]]) -> list[Json]:
    """Conditions with `truths` (true or why not) in them; a transition time moves only when the truth does."""
    known = {each["type"]: each for each in before}
    merged = [each for name, each in known.items() if name not in truths]
    for name, (holds, reason) in truths.items():
        wanted = "True" if holds else "False"
        old = known.get(name, {})
        condition = {
            "type": name,
            "status": wanted,
            "lastTransitionTime": old["lastTransitionTime"] if old.get("status") == wanted else now_rfc3339(),
        }
        merged.append(condition | ({"reason": reason} if reason and not holds else {}))
    return merged


def container_status(container: ContainerState, *, init: bool = False) -> Json:
    """One entry of containerStatuses."""
    state = container.state
    started = isinstance(state, Running)
    ready = started if not init else isinstance(state, Terminated) and state.exit_code == 0
    return {
        "name": container.name,
        "image": container.image,
        "imageID": "",
        "containerID": container.container_id,
        "ready": ready,
        "started": started,
        "restartCount": container.restarts,
        "state": state_json(state),
        "lastState": state_json(container.last) if container.last else {},
    }


def state_json(state: State) -> Json:
    """A container's state as the API shows it."""
    match state:
        case Waiting(reason, message):
            return {"waiting": {"reason": reason} | ({"message": message} if message else {})}
        case Running(started_at):
            return {"running": {"startedAt": started_at}}
        case Terminated():
            ended: Json = {
                "exitCode": state.exit_code,
                "reason": state.reason,
                "startedAt": state.started_at,
                "finishedAt": state.finished_at,
            }
            if state.signal is not None:
                ended["signal"] = state.signal
            if state.message:
                ended["message"] = state.message
            return {"terminated": ended}
