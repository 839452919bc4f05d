"""Tables: what `kubectl get` prints, as columns and cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from mend_local import jsonpath, times
from mend_local.resources import Column, ResourceType

Object = dict[str, Any]
Cell = Callable[[Object], Any]


def table(kind: ResourceType, values: Sequence[Object], list_metadata: Object, include: str = "Metadata") -> Object:
    """The objects as a meta.k8s.io/v1 Table; `include` says what of each object goes along with its cells."""
    columns = _columns(kind)
    now = datetime.now(UTC)
    rows = []
    for value in values:
        row: Object = {"cells": [_cell(value, column, cell, now) for column, cell in columns]}
        if include == "Object":
            row["object"] = value
        elif include != "None":
            row["object"] = partial(value)
        rows.append(row)
    definitions = [
        {
            "name": column.name,
            "type": "string" if column.type == "date" and not kind.custom else column.type,
            "format": column.format or ("name" if column.name == "Name" else ""),
            "description": column.description,
            "priority": column.priority,
        }
        for column, _ in columns
    ]
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": list_metadata,
        "columnDefinitions": definitions,
        "rows": rows,
    }


def partial(value: Object) -> Object:
    """Only what identifies an object."""
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": value["metadata"]}


def _cell(value: Object, column: Column, cell: Cell | None, now: datetime) -> Any:
    if cell is not None:
        return cell(value)
    found = jsonpath.find(value, column.json_path)
    if not found:
        return "<unknown>" if column.json_path == _AGE.json_path else None
    if column.type == "date":
        moment = times.parse(found[0])
        return times.short_age((now - moment).total_seconds()) if moment else "<invalid>"
    if column.type in ("integer", "number", "boolean"):
        return found[0] if not isinstance(found[0], str) else None
    return ",".join(each if isinstance(each, str) else json.dumps(each) for each in found)


def _columns(kind: ResourceType) -> list[tuple[Column, Cell | None]]:
    name: tuple[Column, Cell | None] = (_NAME, None)
    if kind.custom:
        return [name, *((column, None) for column in kind.columns)]
    return [*([] if kind.plural == "events" else [name]), *_BUILT_IN.get(kind.plural, [(_AGE, None)])]


_NAME = Column(name="Name", type="string", json_path=".metadata.name")
_AGE = Column(name="Age", type="date", json_path=".metadata.creationTimestamp")


def _column(name: str, what: str | Cell, priority: int = 0, *, type_: str = "string") -> tuple[Column, Cell | None]:
    if isinstance(what, str):
        return Column(name=name, type=type_, json_path=what, priority=priority), None
    return Column(name=name, type=type_, json_path="", priority=priority), what


def _statuses(pod: Object) -> list[Object]:
    return list((pod.get("status") or {}).get("containerStatuses") or ())


def _pod_ready(pod: Object) -> str:
    return f"{sum(bool(each.get('ready')) for each in _statuses(pod))}/{len(pod['spec'].get('containers') or ())}"


def _pod_status(pod: Object) -> str:
    """The one word that kubectl shows: the most telling of deletion, container states, reason and phase."""
    status = pod.get("status") or {}
    if pod["metadata"].get("deletionTimestamp"):
        return "Terminating"
    word = status.get("reason") or status.get("phase") or "Unknown"
    for each in _statuses(pod):
        state = each.get("state") or {}
        if reason := (state.get("waiting") or {}).get("reason"):
            word = reason
        elif ended := state.get("terminated"):
            word = ended.get("reason") or (
                f"Signal:{ended['signal']}" if ended.get("signal") else f"ExitCode:{ended.get('exitCode', 0)}"
            )
    return str(word)


def _pod_restarts(pod: Object) -> int:
    return sum(each.get("restartCount", 0) for each in _statuses(pod))


def _or_none(path: str) -> Cell:
    def cell(value: Object) -> str:
        return ",".join(str(each) for each in jsonpath.find(value, path)) or "<none>"

    return cell


def _node_status(node: Object) -> str:
    ready = jsonpath.find(node, '.status.conditions[?(@.type=="Ready")].status')
    word = "Ready" if ready == ["True"] else "NotReady" if ready else "Unknown"
    return word + (",SchedulingDisabled" if (node.get("spec") or {}).get("unschedulable") else "")


def _service_ports(service: Object) -> str:
    ports = (service.get("spec") or {}).get("ports") or ()
    return ",".join(f"{port.get('port')}/{port.get('protocol', 'TCP')}" for port in ports) or "<none>"


def _event_object(event: Object) -> str:
    about = event.get("involvedObject") or event.get("regarding") or {}
    return f"{str(about.get('kind', '')).lower()}/{about.get('name', '')}"


def _event_last_seen(event: Object) -> str:
    last = event.get("lastTimestamp") or event.get("deprecatedLastTimestamp") or event.get("eventTime")
    last = (event.get("series") or {}).get("lastObservedTime") or last or event["metadata"]["creationTimestamp"]
    moment = times.parse(last)
    return times.short_age((datetime.now(UTC) - moment).total_seconds()) if moment else "<unknown>"


def _event_message(event: Object) -> str:
    return str(event.get("message") or event.get("note") or "").strip()


def _data_size(value: Object) -> int:
    return len(value.get("data") or ()) + len(value.get("binaryData") or ())


def _role_ref(binding: Object) -> str:
    reference = binding.get("roleRef") or {}
    return f"{reference.get('kind')}/{reference.get('name')}"


_AGE_COLUMN: tuple[Column, Cell | None] = (_AGE, None)
_BUILT_IN: dict[str, list[tuple[Column, Cell | None]]] = {
    "pods": [
        _column("Ready", _pod_ready),
        _column("Status", _pod_status),
        _column("Restarts", _pod_restarts, type_="integer"),
        _AGE_COLUMN,
        _column("IP", _or_none(".status.podIP"), 1),
        _column("Node", _or_none(".spec.nodeName"), 1),
        _column("Nominated Node", _or_none(".status.nominatedNodeName"), 1),
        _column("Readiness Gates", lambda pod: "<none>", 1),
    ],
    "nodes": [
        _column("Status", _node_status),
        _column("Roles", lambda node: "<none>"),
        _AGE_COLUMN,
        _column("Version", _or_none(".status.nodeInfo.kubeletVersion")),
        _column("Internal-IP", _or_none('.status.addresses[?(@.type=="InternalIP")].address'), 1),
    ],
    "namespaces": [_column("Status", ".status.phase"), _AGE_COLUMN],
    "services": [
        _column("Type", ".spec.type"),
        _column("Cluster-IP", _or_none(".spec.clusterIP")),
        _column("External-IP", _or_none(".spec.externalIPs[*]")),
        _column("Port(s)", _service_ports),
        _AGE_COLUMN,
        _column("Selector", lambda value: _labels((value.get("spec") or {}).get("selector")), 1),
    ],
    "secrets": [_column("Type", ".type"), _column("Data", _data_size, type_="integer"), _AGE_COLUMN],
    "configmaps": [_column("Data", _data_size, type_="integer"), _AGE_COLUMN],
    "events": [
        _column("Last Seen", _event_last_seen),
        _column("Type", ".type"),
        _column("Reason", ".reason"),
        _column("Object", _event_object),
        _column("Source", _or_none(".source.component"), 1),
        _column("Message", _event_message),
        _column("Count", ".count", 1, type_="integer"),
        _column("Name", ".metadata.name", 1),
    ],
    "serviceaccounts": [_column("Secrets", lambda value: 0, type_="integer"), _AGE_COLUMN],
    "leases": [_column("Holder", _or_none(".spec.holderIdentity")), _AGE_COLUMN],
    "roles": [_column("Created At", ".metadata.creationTimestamp")],
    "clusterroles": [_column("Created At", ".metadata.creationTimestamp")],
    "rolebindings": [_column("Role", _role_ref), _AGE_COLUMN],
    "clusterrolebindings": [_column("Role", _role_ref), _AGE_COLUMN],
    "customresourcedefinitions": [_column("Created At", ".metadata.creationTimestamp")],
}


def _labels(labels: Object | None) -> str:
    return ",".join(f"{name}={value}" for name, value in (labels or {}).items()) or "<none>"
