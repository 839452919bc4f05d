"""Translates what the API server tells about a run into facts."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mend import nodehealth
from mend.crstatus import UnreadableStatus, from_resource
from mend.dial import Target
from mend.names import ANNOTATION_AVOIDS, ANNOTATION_SAVE_NOW, LABEL_ATTEMPT, LABEL_WORKER, TRAINER_CONTAINER
from mend.observation import Observation, PodPhase, WorkerPod
from mend.protocol import AGENT_PORT

JsonObject = Mapping[str, Any]
LOG_LINES = 20
SAVE_NOW_LIMIT = 64  # of the annotation, which is kept in the status


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A run whose status cannot be read, how old it is, and what is wrong."""

    namespace: str
    name: str
    age_seconds: float
    problem: str


def bare_observation(run: JsonObject, now: float) -> Observation:
    """A run by its own word alone. Raises `UnreadableStatus`."""
    meta = run["metadata"]
    return Observation(
        name=meta["name"],
        namespace=meta["namespace"],
        uid=meta["uid"],
        generation=meta.get("generation") or 0,
        created_at=_seconds(meta.get("creationTimestamp"), now),
        status=from_resource(run.get("status")),
        deleting=bool(meta.get("deletionTimestamp")),
        save_now=str((meta.get("annotations") or {}).get(ANNOTATION_SAVE_NOW) or "")[:SAVE_NOW_LIMIT],
    )


def own_word(run: JsonObject, now: float) -> Observation | Unreadable:
    """As `bare_observation`, for who has more runs to show than this one."""
    try:
        return bare_observation(run, now)
    except UnreadableStatus as error:
        meta = run["metadata"]
        age_seconds = now - _seconds(meta.get("creationTimestamp"), now)
        return Unreadable(meta["namespace"], meta["name"], age_seconds, str(error))


def worker_pod(pod: JsonObject, nodes: Mapping[str, JsonObject], now: float) -> WorkerPod:
    """One pod as a fact; `nodes` are the cluster's by name. An unknown node counts as ready: no news is no evidence."""
    meta, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
    state = _trainer_state(status)
    ended = state.get("terminated") or {}
    node = spec.get("nodeName") or ""
    labels = meta.get("labels") or {}
    return WorkerPod(
        index=_number(labels.get(LABEL_WORKER), -1),
        name=meta["name"],
        uid=meta["uid"],
        phase=PodPhase(status.get("phase") or PodPhase.PENDING),
        ip=status.get("podIP") or "",
        node=node,
        node_ready=nodehealth.is_ready(nodes.get(node, {})),
        node_problems=nodehealth.problems(nodes.get(node, {})),
        node_conditions=nodehealth.unusual_conditions(nodes.get(node, {})),
        node_leaves=nodehealth.leaving(nodes.get(node, {})),
        rack=nodehealth.rack(nodes.get(node, {})),
        avoids=tuple(filter(None, ((meta.get("annotations") or {}).get(ANNOTATION_AVOIDS) or "").split(","))),
        attempt=_number(labels.get(LABEL_ATTEMPT), 0),
        deleting=bool(meta.get("deletionTimestamp")),
        age_seconds=max(0.0, now - _seconds(meta.get("creationTimestamp"), now)),
        exit_code=ended.get("exitCode"),
        reason=_reason(status, state),
        message=_message(status, state),
    )


def belongs_to(thing: JsonObject, uid: str) -> bool:
    """Whether an object is of the run with this uid, and not of one that had its name before."""
    return any(owner.get("uid") == uid for owner in thing["metadata"].get("ownerReferences") or ())


def targets(pods: Iterable[WorkerPod], token: str | None) -> list[Target]:
    """The agents that should answer: of pods that have an address and have not ended."""
    return [
        Target(pod.index, pod.uid, pod.ip, AGENT_PORT, token, started=pod.phase is PodPhase.RUNNING)
        for pod in pods
        if token and pod.ip and pod.phase in (PodPhase.PENDING, PodPhase.RUNNING)
    ]


def decoded(secret: JsonObject, names: Iterable[str]) -> dict[str, str]:
    """The plain text under these names of a Secret; what else is in it, binary perhaps, is nobody's business here."""
    data = secret.get("data") or {}
    return {name: base64.b64decode(data[name]).decode(errors="replace") for name in names if data.get(name)}


def _trainer_state(status: JsonObject) -> JsonObject:
    statuses: Iterable[JsonObject] = status.get("containerStatuses") or ()
    for container in statuses:
        if container.get("name") == TRAINER_CONTAINER:
            state: JsonObject = container.get("state") or {}
            return state
    return {}


def _reason(status: JsonObject, state: JsonObject) -> str:
    """The most telling word: a disruption, the pod's own, why the trainer ended or waits, why nothing took the pod."""
    conditions = {each.get("type"): each for each in status.get("conditions") or ()}
    if (conditions.get("DisruptionTarget") or {}).get("status") == "True":
        return "DisruptionTarget"
    scheduled = conditions.get("PodScheduled") or {}
    return str(
        status.get("reason")
        or (state.get("terminated") or {}).get("reason")
        or (state.get("waiting") or {}).get("reason")
        or (scheduled.get("reason") if scheduled.get("status") == "False" else "")
        or ""
    )


def _message(status: JsonObject, state: JsonObject) -> str:
    """What is said about that: of the pod, of its trainer's end, of what it waits for, of why no node took it."""
    refused = [each for each in status.get("conditions") or () if _is_refusal(each)]
    parts: Iterable[JsonObject] = (status, state.get("terminated") or {}, state.get("waiting") or {}, *refused)
    return next((str(each["message"]) for each in parts if each.get("message")), "")


def _is_refusal(condition: JsonObject) -> bool:
    return (condition.get("type"), condition.get("status")) == ("PodScheduled", "False")


def _number(label: str | None, default: int) -> int:
    """A label that somebody has spoilt must not stop the run: a pod of no worker is removed and made anew."""
    return int(label) if label and label.isascii() and label.isdigit() else default


def _seconds(timestamp: str | None, default: float) -> float:
    return datetime.fromisoformat(timestamp).timestamp() if timestamp else default
