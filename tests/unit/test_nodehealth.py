"""What is taken for a complaint about a machine, and what is not."""

from __future__ import annotations

from typing import Any

import pytest

from mend.nodehealth import RACKS, fingerprint, is_ready, leaving, problems, rack, unusual_conditions


def a_node(*conditions: str, taints: tuple[str, ...] = ()) -> dict[str, Any]:
    """A node with conditions given as "Type=Status" and taints as "key:effect"."""
    return {
        "metadata": {"name": "n1", "labels": {}},
        "spec": {"taints": [dict(zip(("key", "effect"), each.rsplit(":", 1), strict=True)) for each in taints]},
        "status": {"conditions": [dict(zip(("type", "status"), each.split("="), strict=True)) for each in conditions]},
    }


HEALTHY = ("Ready=True", "MemoryPressure=False", "DiskPressure=False", "KernelDeadlock=False")


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (a_node(*HEALTHY), ()),
        (a_node("Ready=True", "KernelDeadlock=True"), ("condition KernelDeadlock",)),
        (a_node("FrequentKubeletRestart=True"), ("condition FrequentKubeletRestart",)),
        (
            a_node("SysLogsXIDError=True", "GpuNvLinkWatch=True"),
            ("condition GpuNvLinkWatch", "condition SysLogsXIDError"),
        ),
        (a_node("KernelDeadlock=Unknown"), ()),
        (a_node("DiskPressure=True"), ()),
        (a_node("SomethingGood=True"), ()),
        (a_node(taints=("node.kubernetes.io/unreachable:NoExecute",)), ("taint node.kubernetes.io/unreachable",)),
        (a_node(taints=("nvidia.com/gpu-unhealthy:NoSchedule",)), ("taint nvidia.com/gpu-unhealthy",)),
        (a_node(taints=("nvsentinel.nvidia.com/fatal:NoExecute",)), ("taint nvsentinel.nvidia.com/fatal",)),
        (a_node(taints=("nvidia.com/gpu:NoSchedule",)), ()),
        (a_node(taints=("node.kubernetes.io/unschedulable:NoSchedule",)), ()),
        (a_node(taints=("nvsentinel.nvidia.com/fatal:PreferNoSchedule",)), ()),
        ({}, ()),
    ],
)
def test_what_is_wrong_with_a_machine(node: dict[str, Any], said: tuple[str, ...]) -> None:
    """Conditions and taints of the known tools, when they hold; no cordon, pressure, pool taint, or unknown word."""
    assert problems(node) == said


def test_conditions_that_rules_can_ask_for() -> None:
    """All that is not as on every healthy node, whoever invented the type."""
    assert unusual_conditions(a_node(*HEALTHY)) == ()
    node = a_node("Ready=Unknown", "KernelDeadlock=True", "MyCheck=False")
    assert unusual_conditions(node) == ("KernelDeadlock=True", "MyCheck=False", "Ready=Unknown")


def test_a_heartbeat_is_no_news() -> None:
    """Only what is told here changes the fingerprint, not the time of a heartbeat."""
    node, later = a_node(*HEALTHY), a_node(*HEALTHY)
    later["status"]["conditions"][0]["lastHeartbeatTime"] = "2027-01-15T08:00:00Z"
    assert fingerprint(node) == fingerprint(later)
    assert fingerprint(node) != fingerprint(a_node("Ready=Unknown"))
    assert not is_ready(a_node("Ready=Unknown"))


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (a_node(*HEALTHY), ""),
        (
            a_node(taints=("aws-node-termination-handler/spot-itn:NoSchedule",)),
            "taint aws-node-termination-handler/spot-itn",
        ),
        (
            a_node(taints=("cloud.google.com/impending-node-termination:NoSchedule",)),
            "taint cloud.google.com/impending-node-termination",
        ),
        (a_node(taints=("karpenter.sh/disrupted:NoSchedule",)), "taint karpenter.sh/disrupted"),
        (a_node(taints=("ToBeDeletedByClusterAutoscaler:NoSchedule",)), "taint ToBeDeletedByClusterAutoscaler"),
        (a_node("PreemptScheduled=True"), "condition PreemptScheduled"),
        (a_node("PreemptScheduled=False"), ""),
        (a_node(taints=("DeletionCandidateOfClusterAutoscaler:PreferNoSchedule",)), ""),
        (a_node(taints=("node.kubernetes.io/unschedulable:NoSchedule",)), ""),
        ({}, ""),
    ],
)
def test_what_says_that_a_node_will_be_gone(node: dict[str, Any], said: str) -> None:
    """The words of clouds and autoscalers that mean it; neither a cordon nor a mere candidate."""
    assert leaving(node) == said


def test_a_notice_is_news() -> None:
    """Whoever trains on the node is looked at at once."""
    taint = "karpenter.sh/disrupted:NoSchedule"
    assert fingerprint(a_node(*HEALTHY)) != fingerprint(a_node(*HEALTHY, taints=(taint,)))


def test_the_narrowest_label_names_the_rack() -> None:
    """A zone is taken only where nothing better is known."""
    labels = {RACKS[-1]: "zone-a", "topology.kubernetes.io/region": "r"}
    assert rack({"metadata": {"labels": labels}}) == f"{RACKS[-1]}=zone-a"
    assert rack({"metadata": {"labels": labels | {RACKS[0]: "r7"}}}) == f"{RACKS[0]}=r7"
    assert rack(a_node()) == rack({}) == ""
