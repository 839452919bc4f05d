"""Pure: what Kubernetes, and the tools that watch machines for it, say to be wrong with a node."""

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


def unusual_conditions(node: JsonObject) -> tuple[str, ...]:
    """Each condition that is not as on every healthy node, as "Type=Status"."""
    shown = {f"{each.get('type')}={each.get('status')}" for each in _conditions(node) if not _is_usual(each)}
    return tuple(sorted(shown)[:MAX_PROBLEMS])


def fingerprint(node: JsonObject) -> object:
    """Equal as long as nothing that is told here has changed, however many heartbeats the node has sent."""
    return is_ready(node), problems(node), unusual_conditions(node)


def _is_problem(condition: JsonObject) -> bool:
    return condition.get("status") == "True" and _tells_of_problems(condition)


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
