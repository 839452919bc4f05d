"""What `mend local status` shows: nodes, pods and their processes, controller, object store, and faults in force."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mend_local.client import Api
from mend_local.cluster import Places, cluster_id
from mend_local.kubelet import FAULT_NOTE, SYSTEM
from mend_local.processes import owned_by, owner_of

Json = dict[str, Any]


def processes_by_owner(places: Places) -> dict[str, list[int]]:
    """PIDs of the cluster's processes by the pod's uid, or `system/NAME` for what is no pod."""
    identity = cluster_id(places)
    found: dict[str, list[int]] = {}
    for each in owned_by(f"{identity}/"):
        _, owner, part = (*owner_of(each.identity.pid).split("/", 2), "", "")[:3]
        found.setdefault(f"{SYSTEM}/{part}" if owner == SYSTEM else owner, []).append(each.identity.pid)
    return found


async def report(api: Api, processes: Mapping[str, list[int]]) -> list[str]:
    """The state of the cluster in lines."""
    nodes, _ = await api.list("/api/v1/nodes")
    pods, _ = await api.list("/api/v1/pods")
    faults = await api.get("/mend-local/faults")
    lines = [f"node {each['metadata']['name']}: {_readiness(each)}{_fault(each)}" for each in nodes]
    lines += [_pod_line(each, processes) for each in pods] or ["no pods"]
    for service in ("controller", "object-store"):
        pids = processes.get(f"{SYSTEM}/{service}")
        lines.append(f"{service}: " + (f"running (PID {_pids(pids)})" if pids else "not running"))
    meaningless = set() if faults.get("errors") else {"errorCode"}
    in_force = ", ".join(f"{name} {value}" for name, value in faults.items() if value and name not in meaningless)
    lines.append(f"faults of the API server: {in_force or 'none'}")
    return lines


def _readiness(node: Json) -> str:
    ready = [each for each in node.get("status", {}).get("conditions", []) if each["type"] == "Ready"]
    word = {"True": "Ready", "False": "NotReady"}.get(ready[0]["status"] if ready else "", "Unknown")
    return word + (", cordoned" if node["spec"].get("unschedulable") else "")


def _pod_line(pod: Json, processes: Mapping[str, list[int]]) -> str:
    metadata, status = pod["metadata"], pod.get("status") or {}
    pids = processes.get(metadata["uid"], [])
    where = f" on {pod['spec']['nodeName']} at {status.get('podIP', '?')}" if pod["spec"].get("nodeName") else ""
    held = f", processes {_pids(pids)}" if pids else ""
    going = ", terminating" if metadata.get("deletionTimestamp") else ""
    phase = status.get("phase", "Pending")
    return f"pod {metadata['namespace']}/{metadata['name']}: {phase}{where}{held}{going}{_fault(pod)}"


def _pids(pids: list[int]) -> str:
    shown = ", ".join(str(pid) for pid in sorted(pids)[:8])
    return shown if len(pids) <= 8 else f"{shown} and {len(pids) - 8} more"


def _fault(each: Json) -> str:
    fault = (each["metadata"].get("annotations") or {}).get(FAULT_NOTE)
    return f", fault: {fault}" if fault else ""
