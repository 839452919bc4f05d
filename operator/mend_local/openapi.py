"""OpenAPI: as much as kubectl reads to let the server validate, and to explain custom resources."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from mend_local.discovery import VERSION
from mend_local.protobuf import encode_field
from mend_local.resources import Registry, ResourceType

Object = dict[str, Any]

_INFO: Object = {"title": "mend-local", "version": VERSION["gitVersion"]}
_OPTIONS = ("dryRun", "fieldManager", "fieldValidation")
PROTOBUF_V2 = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"
PROTOBUF_V2_ANSWER = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"  # Go's MIME parser refuses the @
_METADATA: Object = {
    "type": "object",
    "description": "Standard object's metadata.",
    "x-kubernetes-preserve-unknown-fields": True,
}


def version_2() -> Object:
    """An OpenAPI v2 document that knows no types: kubectl then validates nothing itself."""
    return {"swagger": "2.0", "info": _INFO, "paths": {}, "definitions": {}}


def version_2_protobuf() -> bytes:
    """The same in the protobuf form of gnostic, the only one that kubectl up to 1.26 reads."""
    info = encode_field(1, _INFO["title"]) + encode_field(2, _INFO["version"])
    return encode_field(1, "2.0") + encode_field(2, info) + encode_field(8, b"")


def index(registry: Registry) -> Object:
    """Where the OpenAPI v3 documents are; the hash changes with what a document says."""
    paths = {}
    for group, versions in registry.groups().items():
        for version in versions:
            types = registry.of(group, version)
            said = [(each.plural, each.schema.raw if each.schema else None) for each in types]
            fingerprint = hashlib.sha256(msgspec.json.encode(said)).hexdigest()
            place = types[0].path.lstrip("/")
            paths[place] = {"serverRelativeURL": f"/openapi/v3/{place}?hash={fingerprint[:32].upper()}"}
    return {"paths": paths}


def version_3(registry: Registry, place: str) -> Object | None:
    """The OpenAPI v3 document of a group and version such as `apis/mend.dev/v1alpha1`."""
    types = [each for each in registry if each.path.lstrip("/") == place]
    if not types:
        return None
    paths: Object = {}
    schemas: Object = {}
    for each in types:
        scope = f"{each.path}/namespaces/{{namespace}}" if each.namespaced else each.path
        paths[f"{scope}/{each.plural}"] = {"get": _operation(each, "list"), "post": _operation(each, "post")}
        paths[f"{scope}/{each.plural}/{{name}}"] = {
            verb: _operation(each, verb) for verb in ("get", "put", "patch", "delete")
        }
        schemas[_schema_name(each)] = _schema(each)
    return {"openapi": "3.0.0", "info": _INFO, "paths": paths, "components": {"schemas": schemas}}


def _operation(kind: ResourceType, verb: str) -> Object:
    reference = {"$ref": f"#/components/schemas/{_schema_name(kind)}"}
    return {
        "operationId": f"{verb}{kind.kind}",
        "parameters": [{"name": name, "in": "query", "schema": {"type": "string"}} for name in _OPTIONS],
        "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": reference}}}},
        "x-kubernetes-action": verb,
        "x-kubernetes-group-version-kind": _names(kind),
    }


def _schema_name(kind: ResourceType) -> str:
    group = ".".join(reversed(kind.group.split("."))) if kind.group else "io.k8s.api.core"
    return f"{group}.{kind.version}.{kind.kind}"


def _names(kind: ResourceType) -> Object:
    return {"group": kind.group, "kind": kind.kind, "version": kind.version}


def _schema(kind: ResourceType) -> Object:
    raw: Object = (
        kind.schema.raw if kind.schema else {"type": "object", "description": f"{kind.kind}, as in Kubernetes."}
    )
    properties = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        **(raw.get("properties") or {}),
        "metadata": _METADATA,
    }
    return {**raw, "properties": properties, "x-kubernetes-group-version-kind": [_names(kind)]}
