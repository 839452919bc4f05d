"""Pure: what Kubernetes, and the tools that watch machines, say of a node: what is wrong, whether it goes, its rack."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

JsonObject = Mapping[str, Any]

MAX_PROBLEMS = 8  # of one node
# Conditions that are True when something is wrong: node-problem-detector's own, its plugins' for GPUs, NVSentinel's.
PROBLEM_CONDITIONS = re.compile(
    r"KernelDeadlock|ReadonlyFilesystem|CorruptDockerOverlay2|CperHardwareErrorFatal|XfsShutdown|DiskBadBlock"
    r"|Frequent(Kubelet|Docker|Containerd)Restart|FrequentUnregisterNetDevice|(Kubelet|ContainerRuntime)Unhealthy"
    r"|MemoryError|HardwareError|IBLinkFlapping|(GPU|Gpu)(XIDError|XidError|EccError|Missing)"
    r"|Gpu(Mem|NvLink|Pcie|Thermal|Inforom)Watch|SysLogs(XIDError|SXIDError|GPUFallenOff)"
)
# Taints by which such tools, and Kubernetes itself, keep pods off a broken machine. A cordon alone says nothing.
PROBLEM_TAINTS = re.compile(
    r"^node\.kubernetes\.io/unreachable$|nvsentinel|xid"
    r"|gpu-?(unhealthy|error|failure|faulty)|unhealthy-?gpu|hardware-?(error|failure)"
)
# Conditions and taints by which clouds, and what watches them, say that a node will be gone within minutes.
LEAVING_CONDITIONS = re.compile(r"(VMEvent|Terminate|Preempt|Redeploy)Scheduled")
LEAVING_TAINTS = re.compile(
    r"^aws-node-termination-handler/|^cloud\.google\.com/impending-node-termination$|^karpenter\.sh/disrupt(ed|ion)$"
    r"|^ToBeDeletedByClusterAutoscaler$"
)
# Labels that name what a node shares with others, and may fail with: the narrowest that is there is taken.
RACKS = (
    "topology.kubernetes.io/rack",
    "cloud.provider.com/topology-rack",
    "topology.k8s.aws/network-node-layer-3",
    "cloud.google.com/gce-topology-subblock",
    "topology.kubernetes.io/zone",
)
PRESSURES = ("MemoryPressure", "DiskPressure", "PIDPressure", "NetworkUnavailable")


def is_ready(node: JsonObject) -> bool:
    """Whether its kubelet is heard and well."""
    ready = next((each for each in _conditions(node) if each.get("type") == "Ready"), {"status": "True"})
    return bool(ready.get("status") == "True")


def problems(node: JsonObject) -> tuple[str, ...]:
    """What is known to be wrong with the machine, in words. That it is not ready is another matter."""
    ill = {f"condition {each.get('type')}" for each in _conditions(node) if _is_problem(each)}
    tainted = {f"taint {each.get('key')}" for each in _taints(node) if _is_of_a_broken_one(each)}
    return tuple(sorted(ill | tainted)[:MAX_PROBLEMS])


def leaving(node: JsonObject) -> str:
    """What says that the node will soon be gone, in words; "" if nothing does."""
    told = [f"condition {each.get('type')}" for each in _conditions(node) if _is_of_one_that_goes(each)]
    told += [f"taint {each.get('key')}" for each in _taints(node) if LEAVING_TAINTS.search(each.get("key") or "")]
    return min(told, default="")


def rack(node: JsonObject) -> str:
    """What it shares with other nodes, by its labels; "" if none tells."""
    labels = (node.get("metadata") or {}).get("labels") or {}
    return next((f"{name}={labels[name]}" for name in RACKS if labels.get(name)), "")


def unusual_conditions(node: JsonObject) -> tuple[str, ...]:
    """Each condition that is not as on every healthy node, as "Type=Status"."""
    shown = {f"{each.get('type')}={each.get('status')}" for each in _conditions(node) if not _is_usual(each)}
    return tuple(sorted(shown)[:MAX_PROBLEMS])


def fingerprint(node: JsonObject) -> object:
    """Equal as long as nothing that is told here has changed, however many heartbeats the node has sent."""
    return is_ready(node), problems(node), unusual_conditions(node), leaving(node)


def _is_problem(condition: JsonObject) -> bool:
    return condition.get("status") == "True" and _tells_of_problems(condition)


def _is_of_one_that_goes(condition: JsonObject) -> bool:
    return condition.get("status") == "True" and LEAVING_CONDITIONS.fullmatch(condition.get("type") or "") is not None


def _tells_of_problems(condition: JsonObject) -> bool:
    return PROBLEM_CONDITIONS.fullmatch(condition.get("type") or "") is not None


def _is_usual(condition: JsonObject) -> bool:
    kind, status = condition.get("type"), condition.get("status")
    if kind == "Ready":
        return bool(status == "True")
    return status == "False" and (kind in PRESSURES or _tells_of_problems(condition))


def _is_of_a_broken_one(taint: JsonObject) -> bool:
    return taint.get("effect") in ("NoSchedule", "NoExecute") and bool(PROBLEM_TAINTS.search(taint.get("key") or ""))


def _conditions(node: JsonObject) -> list[JsonObject]:
    return list((node.get("status") or {}).get("conditions") or ())


def _taints(node: JsonObject) -> list[JsonObject]:
    return list((node.get("spec") or {}).get("taints") or ())
