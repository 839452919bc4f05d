"""What is particular to built-in kinds: their defaults, what an update may change, and what is wrong with them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from typing import Any

from mend_local import definitions
from mend_local.failures import Cause
from mend_local.resources import ResourceType

Object = dict[str, Any]

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_SUBDOMAIN_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', "
    "and must start and end with an alphanumeric character (e.g. 'example.com')"
)
_LABEL_RULE = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', "
    "and must start and end with an alphanumeric character (e.g. 'my-name', or '123-abc')"
)
_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_LABEL_NAMES = {"namespaces", "services"}  # their names become one label of a DNS name
_FREE_NAMES = {"rbac.authorization.k8s.io"}  # names such as system:node

_MUTABLE_POD_FIELDS = ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds")


def on_create(kind: ResourceType, value: Object) -> Object:
    """The object as a cluster would complete it before it stores it."""
    if kind.custom:
        return {name: part for name, part in value.items() if name != "status"} if kind.has_status else value
    match kind.qualified:
        case "pods":
            return {**value, "spec": _pod_spec(value.get("spec") or {}), "status": _new_pod_status(value)}
        case "namespaces":
            return {**value, "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}}
        case "secrets":
            return _secret(value)
        case "services":
            return {**value, "spec": _service_spec(value.get("spec") or {}), "status": {"loadBalancer": {}}}
        case "customresourcedefinitions.apiextensions.k8s.io":
            return definitions.establish(definitions.complete(value)) if not problems(kind, value) else value
        case _:
            return value


def on_update(kind: ResourceType, value: Object, old: Object) -> Object:
    """The updated object with what an update of the main resource cannot change put back."""
    if kind.has_status:
        value = {name: part for name, part in value.items() if name != "status"}
        if "status" in old:
            value["status"] = old["status"]
    match kind.qualified:
        case "secrets":
            return _secret(value)
        case "namespaces":
            return {**value, "spec": old.get("spec", {})}
        case "pods":
            return {**value, "spec": _pod_spec(value.get("spec") or {})}
        case "customresourcedefinitions.apiextensions.k8s.io":
            return definitions.establish(definitions.complete(value)) if not problems(kind, value) else value
        case _:
            return value


def problems(kind: ResourceType, value: Object, old: Object | None = None) -> list[Cause]:
    """Everything wrong with an object of any kind, apart from schemas."""
    found = list(_metadata_problems(kind, value))
    if kind.custom:
        return found
    match kind.qualified:
        case "pods":
            found.extend(_pod_problems(value, old))
        case "secrets":
            found.extend(_secret_problems(value))
        case "leases.coordination.k8s.io":
            found.extend(_lease_problems(value))
        case "services":
            found.extend(_service_problems(value))
        case "customresourcedefinitions.apiextensions.k8s.io":
            found.extend(definitions.problems(value))
    return found


def grace_seconds(kind: ResourceType, value: Object, asked: int | None) -> int:
    """How long a deleted object stays: only pods that a kubelet runs need time."""
    if kind.qualified != "pods":
        return 0
    phase = (value.get("status") or {}).get("phase")
    if not value["spec"].get("nodeName") or phase in ("Succeeded", "Failed"):
        return 0
    default = value["spec"].get("terminationGracePeriodSeconds", 30)
    return max(0, default if asked is None else asked)


def _metadata_problems(kind: ResourceType, value: Object) -> Iterator[Cause]:
    metadata = value["metadata"]
    name = metadata["name"]
    if kind.qualified in _LABEL_NAMES:
        if not _LABEL.fullmatch(name):
            yield Cause("metadata.name", "FieldValueInvalid", f'Invalid value: "{name}": {_LABEL_RULE}')
    elif kind.group not in _FREE_NAMES and (len(name) > 253 or not _SUBDOMAIN.fullmatch(name)):
        yield Cause("metadata.name", "FieldValueInvalid", f'Invalid value: "{name}": {_SUBDOMAIN_RULE}')
    for label, text in (metadata.get("labels") or {}).items():
        if not isinstance(text, str) or len(text) > 63 or not _LABEL_VALUE.fullmatch(text):
            detail = f'Invalid value: "{text}": a valid label value is at most 63 letters, digits, "-", "_" or "."'
            yield Cause("metadata.labels", "FieldValueInvalid", f"{detail} (label {label})")


def _pod_spec(spec: Object) -> Object:
    """The defaults that clients read back; what only real nodes need is left out."""
    completed = {
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": 30,
        "dnsPolicy": "ClusterFirst",
        "serviceAccountName": "default",
        "securityContext": {},
        "schedulerName": "default-scheduler",
        "enableServiceLinks": True,
        **spec,
    }
    for field in ("containers", "initContainers"):
        if isinstance(spec.get(field), list):
            completed[field] = [_container(each) if isinstance(each, dict) else each for each in spec[field]]
    return completed


def _container(container: Object) -> Object:
    image = container.get("image", "")
    latest = ":" not in image.rpartition("/")[2] or image.endswith(":latest")
    return {
        "imagePullPolicy": "Always" if latest else "IfNotPresent",
        "resources": {},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        **container,
        **({"ports": [{"protocol": "TCP", **port} for port in container["ports"]]} if container.get("ports") else {}),
    }


def _new_pod_status(value: Object) -> Object:
    containers = (value.get("spec") or {}).get("containers") or []
    wants = [each.get("resources") or {} for each in containers if isinstance(each, dict)]
    return {"phase": "Pending", "qosClass": "Burstable" if any(wants) else "BestEffort"}


def _secret(value: Object) -> Object:
    """stringData is a way to write data; it is never stored."""
    completed = {"type": "Opaque", **{name: part for name, part in value.items() if name != "stringData"}}
    given = value.get("stringData") or {}
    if given:
        encoded = {name: base64.b64encode(str(text).encode()).decode() for name, text in given.items()}
        completed["data"] = {**(value.get("data") or {}), **encoded}
    return completed


def _service_spec(spec: Object) -> Object:
    ports = [{"protocol": "TCP", "targetPort": port.get("port"), **port} for port in spec.get("ports") or []]
    completed = {"type": "ClusterIP", "sessionAffinity": "None", **spec}
    return {**completed, "ports": ports} if ports else completed


def _pod_problems(value: Object, old: Object | None) -> Iterator[Cause]:
    spec = value.get("spec") or {}
    containers = spec.get("containers")
    if not containers:
        yield Cause("spec.containers", "FieldValueRequired", "Required value")
        return
    names: set[str] = set()
    for number, container in enumerate(containers):
        where = f"spec.containers[{number}]"
        for field in ("name", "image"):
            if not container.get(field):
                yield Cause(f"{where}.{field}", "FieldValueRequired", "Required value")
        name = container.get("name", "")
        if name in names:
            yield Cause(f"{where}.name", "FieldValueDuplicate", f'Duplicate value: "{name}"')
        names.add(name)
    policy = spec.get("restartPolicy", "Always")
    if policy not in ("Always", "OnFailure", "Never"):
        detail = f'Unsupported value: "{policy}": supported values: "Always", "OnFailure", "Never"'
        yield Cause("spec.restartPolicy", "FieldValueNotSupported", detail)
    if old is not None and _fixed_part(spec) != _fixed_part(old["spec"]):
        allowed = "`spec.containers[*].image`, `spec.activeDeadlineSeconds`, `spec.tolerations`"
        yield Cause("spec", "FieldValueForbidden", f"Forbidden: pod updates may not change fields other than {allowed}")


def _fixed_part(spec: Object) -> Object:
    """The part of a pod's spec that no update may change; its node is given to it by a binding."""
    fixed = {name: value for name, value in spec.items() if name not in _MUTABLE_POD_FIELDS}
    fixed["containers"] = [
        {name: part for name, part in each.items() if name not in ("image", "imagePullPolicy")}
        for each in spec.get("containers") or []
    ]
    return fixed


def _secret_problems(value: Object) -> Iterator[Cause]:
    for name, text in (value.get("data") or {}).items():
        try:
            base64.b64decode(text or "", validate=True)
        except (binascii.Error, TypeError, ValueError):
            yield Cause(f"data[{name}]", "FieldValueInvalid", "Invalid value: it is not base64 (use stringData)")


def _lease_problems(value: Object) -> Iterator[Cause]:
    spec = value.get("spec") or {}
    duration = spec.get("leaseDurationSeconds")
    if duration is not None and (not isinstance(duration, int) or duration <= 0):
        detail = f"Invalid value: {duration}: must be greater than 0"
        yield Cause("spec.leaseDurationSeconds", "FieldValueInvalid", detail)
    transitions = spec.get("leaseTransitions")
    if transitions is not None and (not isinstance(transitions, int) or transitions < 0):
        detail = f"Invalid value: {transitions}: must be greater than or equal to 0"
        yield Cause("spec.leaseTransitions", "FieldValueInvalid", detail)


def _service_problems(value: Object) -> Iterator[Cause]:
    spec = value.get("spec") or {}
    if not spec.get("ports") and spec.get("clusterIP") != "None" and spec.get("type") != "ExternalName":
        yield Cause("spec.ports", "FieldValueRequired", "Required value")
