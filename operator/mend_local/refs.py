"""Pure: short questions about a pod as the API server shows it."""

from __future__ import annotations

from mend_local.podspec import Json

_DEFAULT_GRACE_SECONDS = 30.0


def path_of(pod: Json) -> str:
    """Where the pod is served."""
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def full_name(pod: Json) -> str:
    """`namespace/name`."""
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"


def node_of(pod: Json) -> str:
    """The node it is bound to; "" if to none."""
    return str(pod["spec"].get("nodeName") or "")


def same(pod: Json) -> Json:
    """Metadata of a patch that must meet this very pod, not its successor of the same name."""
    return {"uid": pod["metadata"]["uid"]}


def conditions_of(pod: Json) -> list[Json]:
    """Its conditions."""
    found: list[Json] = (pod.get("status") or {}).get("conditions") or []
    return found


def is_over(pod: Json) -> bool:
    """It has succeeded or failed: nothing of it will run again."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def grace_of(pod: Json) -> float:
    """Seconds that it wants between SIGTERM and SIGKILL."""
    seconds = pod["spec"].get("terminationGracePeriodSeconds")
    return _DEFAULT_GRACE_SECONDS if seconds is None else float(seconds)
