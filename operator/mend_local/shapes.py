"""The shape of built-in objects as far as the server itself looks into them, so that nonsense is refused, not stored.

Not Kubernetes' schemas: fields that are not listed here are taken as they are.
"""

from __future__ import annotations

from typing import Any

from mend_local.failures import ApiFailure, bad_request
from mend_local.resources import ResourceType
from mend_local.validation import validate

Object = dict[str, Any]

_TEXT: Object = {"type": "string"}
_NUMBER: Object = {"type": "integer"}
_FLAG: Object = {"type": "boolean"}


def _object(required: tuple[str, ...] = (), **properties: Object) -> Object:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: Object) -> Object:
    return {"type": "array", "items": items, "nullable": True}


def _map(values: Object) -> Object:
    return {"type": "object", "additionalProperties": values, "nullable": True}


_OWNER = _object(
    ("apiVersion", "kind", "name", "uid"), apiVersion=_TEXT, kind=_TEXT, name=_TEXT, uid=_TEXT, blockOwnerDeletion=_FLAG
)
_METADATA = _object(
    name=_TEXT,
    generateName=_TEXT,
    namespace=_TEXT,
    uid=_TEXT,
    resourceVersion=_TEXT,
    labels=_map(_TEXT),
    annotations=_map(_TEXT),
    finalizers=_list(_TEXT),
    ownerReferences=_list(_OWNER),
)
_RESOURCES = _object(limits=_map({}), requests=_map({}))
_CONTAINER = _object(
    name=_TEXT,
    image=_TEXT,
    command=_list(_TEXT),
    args=_list(_TEXT),
    workingDir=_TEXT,
    env=_list(_object(("name",), name=_TEXT, value=_TEXT, valueFrom=_object())),
    envFrom=_list(_object()),
    ports=_list(_object(("containerPort",), containerPort=_NUMBER, name=_TEXT)),
    volumeMounts=_list(_object(("name", "mountPath"), name=_TEXT, mountPath=_TEXT)),
    resources=_RESOURCES,
)
_POD_SPEC = _object(
    containers=_list(_CONTAINER),
    initContainers=_list(_CONTAINER),
    volumes=_list(_object(("name",), name=_TEXT)),
    nodeName=_TEXT,
    nodeSelector=_map(_TEXT),
    restartPolicy=_TEXT,
    terminationGracePeriodSeconds=_NUMBER,
    activeDeadlineSeconds=_NUMBER,
)
_RULES = _list(_object(("verbs",), verbs=_list(_TEXT), apiGroups=_list(_TEXT), resources=_list(_TEXT)))
_BINDING = _object(
    ("roleRef",), roleRef=_object(("kind", "name"), kind=_TEXT, name=_TEXT), subjects=_list(_object(("kind", "name")))
)
_VERSION = _object(
    ("name",),
    name=_TEXT,
    served=_FLAG,
    storage=_FLAG,
    schema=_object(openAPIV3Schema=_object()),
    subresources=_object(),
    additionalPrinterColumns=_list(
        _object(("name", "type", "jsonPath"), name=_TEXT, type=_TEXT, jsonPath=_TEXT, priority=_NUMBER)
    ),
)
_NAMES = _object(
    plural=_TEXT, singular=_TEXT, kind=_TEXT, listKind=_TEXT, shortNames=_list(_TEXT), categories=_list(_TEXT)
)

_SHAPES: dict[str, Object] = {
    "pods": _object(spec=_POD_SPEC, status=_object(phase=_TEXT, containerStatuses=_list(_object()))),
    "services": _object(spec=_object(ports=_list(_object(("port",), port=_NUMBER)), selector=_map(_TEXT))),
    "secrets": _object(data=_map({}), stringData=_map(_TEXT), type=_TEXT),
    "configmaps": _object(data=_map(_TEXT), binaryData=_map(_TEXT)),
    "events": _object(involvedObject=_object(), message=_TEXT, reason=_TEXT, type=_TEXT),
    "events.events.k8s.io": _object(regarding=_object(), note=_TEXT, reason=_TEXT, type=_TEXT),
    "nodes": _object(spec=_object(), status=_object()),
    "leases.coordination.k8s.io": _object(spec=_object(holderIdentity={**_TEXT, "nullable": True})),
    "roles.rbac.authorization.k8s.io": _object(rules=_RULES),
    "clusterroles.rbac.authorization.k8s.io": _object(rules=_RULES),
    "rolebindings.rbac.authorization.k8s.io": _BINDING,
    "clusterrolebindings.rbac.authorization.k8s.io": _BINDING,
    "customresourcedefinitions.apiextensions.k8s.io": _object(
        spec=_object(group=_TEXT, scope=_TEXT, names=_NAMES, versions=_list(_VERSION))
    ),
}
_DELETE_OPTIONS = _object(
    gracePeriodSeconds={**_NUMBER, "minimum": 0, "nullable": True},
    propagationPolicy={**_TEXT, "enum": ["Background", "Foreground", "Orphan"], "nullable": True},
    orphanDependents={**_FLAG, "nullable": True},
    preconditions={**_object(uid={**_TEXT, "nullable": True}, resourceVersion={**_TEXT, "nullable": True})},
    dryRun=_list({**_TEXT, "enum": ["All"]}),
)
_DELETE_OPTIONS["properties"]["preconditions"]["nullable"] = True


def check(kind: ResourceType, body: Any) -> None:
    """Raise a 400 that names the first field of the wrong type. Custom resources have schemas of their own."""
    shape = _SHAPES.get(kind.qualified, {}) if not kind.custom else {}
    properties = {**shape.get("properties", {}), "metadata": _METADATA}
    _refuse({"type": "object", **shape, "properties": properties}, body, kind.kind, kind.version)


def check_delete_options(body: Any) -> None:
    """Raise a 400 for DeleteOptions that cannot be read."""
    _refuse(_DELETE_OPTIONS, body, "DeleteOptions", "v1")


def _refuse(shape: Object, body: Any, kind: str, version: str) -> None:
    for cause in validate(body, shape):
        raise _unreadable(kind, version, str(cause))


def _unreadable(kind: str, version: str, problem: str) -> ApiFailure:
    return bad_request(f'{kind} in version "{version}" cannot be handled as a {kind}: {problem}')
