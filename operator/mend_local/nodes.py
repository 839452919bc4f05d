"""Pure: the Node objects that the kubelet registers, alive and lost."""

from __future__ import annotations

import os
import platform
from typing import Any, Final

from mend_local.podstatus import now_rfc3339

Json = dict[str, Any]

LEASES: Final = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
MEMORY_NOTE: Final = "local.mend.dev/memory-limits"
ADDRESS_NOTE: Final = "local.mend.dev/pod-addresses"
LEASE_SECONDS: Final = 40
_UNREACHABLE: Final = "node.kubernetes.io/unreachable"


def node_names(count: int) -> tuple[str, ...]:
    """The names of so many nodes."""
    return tuple(f"mend-local-{index}" for index in range(count))


def node_object(name: str, notes: dict[str, str]) -> Json:
    """A Node as its kubelet registers it."""
    labels = {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": notes},
        "spec": {},
    }


def live_status(address: str) -> Json:
    """The status of a node whose kubelet is well."""
    resources = {
        "cpu": str(os.cpu_count() or 1),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 1024}Ki",
        "pods": "110",
    }
    return {
        "capacity": resources,
        "allocatable": resources,
        "addresses": [{"type": "InternalIP", "address": address}],
        "conditions": [_ready("True", "KubeletReady", "mend local runs pods as processes")],
        "nodeInfo": {
            "architecture": platform.machine(),
            "operatingSystem": "linux",
            "osImage": "mend local (pods are processes)",
            "kernelVersion": platform.release(),
            "kubeletVersion": "v1.32.0-mend-local",
            "kubeProxyVersion": "",
            "containerRuntimeVersion": "process://1",
            "machineID": "",
            "systemUUID": "",
            "bootID": "",
        },
    }


def lost_status() -> Json:
    """The status that Kubernetes gives a node from which nothing is heard."""
    return {"conditions": [_ready("Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.")]}


def lost_taints(now: list[Json]) -> list[Json]:
    """The taints that Kubernetes puts on such a node."""
    return [*live_taints(now), *({"key": _UNREACHABLE, "effect": each} for each in ("NoSchedule", "NoExecute"))]


def live_taints(now: list[Json]) -> list[Json]:
    """The taints without those."""
    return [each for each in now if each["key"] != _UNREACHABLE]


def lease_object(node: str, now_micro: str) -> Json:
    """The node's heartbeat."""
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": node, "namespace": "kube-node-lease"},
        "spec": {"holderIdentity": node, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": now_micro},
    }


def _ready(truth: str, reason: str, message: str) -> Json:
    now = now_rfc3339()
    return {
        "type": "Ready",
        "status": truth,
        "reason": reason,
        "message": message,
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }
