"""Pure: which node a pod goes to. Honours cordons, taints, node selectors and gates, and spreads by count.

Requests for CPU, memory or devices are not weighed: everything here shares one machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]


def wants_a_node(pod: Json) -> bool:
    """Whether the pod waits for a node: it has none, is not going, and nothing holds it back."""
    spec = pod["spec"]
    return (
        not spec.get("nodeName")
        and not pod["metadata"].get("deletionTimestamp")
        and not spec.get("schedulingGates")
        and (spec.get("schedulerName") or "default-scheduler") == "default-scheduler"
    )


def choose_node(pod: Json, nodes: Sequence[Json], pods_on: Mapping[str, int]) -> tuple[str | None, str]:
    """The node with the fewest pods of those that will have this one; or None and why no node will."""
    reasons: dict[str, int] = {}
    fitting: list[str] = []
    for node in nodes:
        if why_not := _why_not(pod, node):
            reasons[why_not] = reasons.get(why_not, 0) + 1
        else:
            fitting.append(node["metadata"]["name"])
    if fitting:
        return min(fitting, key=lambda name: (pods_on.get(name, 0), name)), ""
    listed = ", ".join(f"{count} node(s) {reason}" for reason, count in sorted(reasons.items()))
    return None, f"0/{len(nodes)} nodes are available: {listed or 'there is none'}."


def _why_not(pod: Json, node: Json) -> str:
    labels = node["metadata"].get("labels") or {}
    for key, value in (pod["spec"].get("nodeSelector") or {}).items():
        if labels.get(key) != value:
            return "didn't match Pod's node affinity/selector"
    if not _matches_affinity(pod, labels):
        return "didn't match Pod's node affinity/selector"
    if node["spec"].get("unschedulable"):
        return "were unschedulable"
    for taint in node["spec"].get("taints") or []:
        if taint["effect"] in ("NoSchedule", "NoExecute") and not tolerates(pod, taint):
            return f"had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"
    return ""


def tolerates(pod: Json, taint: Json) -> bool:
    """Whether one of the pod's tolerations covers the taint."""
    for each in pod["spec"].get("tolerations") or []:
        if each.get("effect") and each["effect"] != taint["effect"]:
            continue
        if each.get("operator", "Equal") == "Exists":
            if not each.get("key") or each["key"] == taint["key"]:
                return True
        elif each.get("key") == taint["key"] and each.get("value", "") == taint.get("value", ""):
            return True
    return False


def _matches_affinity(pod: Json, labels: Mapping[str, str]) -> bool:
    """Required node affinity: one term must match, with all of its expressions. Node exclusion is written so."""
    node_affinity = ((pod["spec"].get("affinity") or {}).get("nodeAffinity")) or {}
    required = node_affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if not required:
        return True
    return any(
        all(_matches_expression(each, labels) for each in term.get("matchExpressions") or [])
        for term in required.get("nodeSelectorTerms") or []
    )


def _matches_expression(expression: Json, labels: Mapping[str, str]) -> bool:
    key, values = expression["key"], expression.get("values") or []
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
        case "Gt":
            return key in labels and int(labels[key]) > int(values[0])
        case "Lt":
            return key in labels and int(labels[key]) < int(values[0])
        case _:
            return False
