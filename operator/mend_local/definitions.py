"""CustomResourceDefinitions: checked, established, and turned into the resource types that they define."""

from __future__ import annotations

from typing import Any

from mend_local import metaschema
from mend_local.failures import Cause
from mend_local.resources import Column, Registry, ResourceType
from mend_local.rules import BadRule
from mend_local.schema import Schema
from mend_local.times import timestamp

Object = dict[str, Any]

_NO_SCHEMA: Object = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
CLEANUP_FINALIZER = "customresourcecleanup.apiextensions.k8s.io"


def complete(definition: Object) -> Object:
    """The definition with the names and settings that may be left out."""
    spec = dict(definition.get("spec") or {})
    names = dict(spec.get("names") or {})
    kind = names.get("kind", "")
    names.setdefault("singular", kind.lower())
    names.setdefault("listKind", f"{kind}List")
    spec["names"] = names
    spec.setdefault("conversion", {"strategy": "None"})
    metadata = dict(definition["metadata"])
    finalizers = metadata.get("finalizers") or []
    if not metadata.get("deletionTimestamp") and CLEANUP_FINALIZER not in finalizers:
        metadata["finalizers"] = [*finalizers, CLEANUP_FINALIZER]
    return {**definition, "metadata": metadata, "spec": spec}


def problems(definition: Object) -> list[Cause]:
    """Why a definition cannot be served."""
    spec = definition.get("spec") or {}
    names = spec.get("names") or {}
    required = {
        "spec.group": spec.get("group"),
        "spec.scope": spec.get("scope"),
        "spec.names.plural": names.get("plural"),
        "spec.names.kind": names.get("kind"),
        "spec.versions": spec.get("versions"),
    }
    found = [Cause(field, "FieldValueRequired", "Required value") for field, value in required.items() if not value]
    if found:
        return found
    expected = f"{names['plural']}.{spec['group']}"
    if definition["metadata"]["name"] != expected:
        detail = f'Invalid value: "{definition["metadata"]["name"]}": must be spec.names.plural+"."+spec.group'
        found.append(Cause("metadata.name", "FieldValueInvalid", detail))
    if spec["scope"] not in ("Namespaced", "Cluster"):
        detail = f'Unsupported value: "{spec["scope"]}": supported values: "Cluster", "Namespaced"'
        found.append(Cause("spec.scope", "FieldValueNotSupported", detail))
    if sum(bool(each.get("storage")) for each in spec["versions"]) != 1:
        detail = "Invalid value: must have exactly one version marked as storage version"
        found.append(Cause("spec.versions", "FieldValueInvalid", detail))
    for number, version in enumerate(spec["versions"]):
        found.extend(_schema_problems(version, f"spec.versions[{number}].schema.openAPIV3Schema"))
    return found


def _schema_problems(version: Object, path: str) -> list[Cause]:
    raw = (version.get("schema") or {}).get("openAPIV3Schema")
    if raw is None:
        return [Cause(path, "FieldValueRequired", "Required value: schemas are required")]
    if raw.get("type") != "object":
        return [Cause(f"{path}.type", "FieldValueInvalid", f'Invalid value: "{raw.get("type", "")}": must be object')]
    if found := list(metaschema.problems(raw, path)):
        return found
    try:
        Schema(raw)
    except BadRule as error:
        return [Cause(path, "FieldValueInvalid", f"Invalid value: {error}")]
    return []


def establish(definition: Object) -> Object:
    """The definition with the status of one whose names are accepted and which is served."""
    spec = definition["spec"]
    old = definition.get("status") or {}
    now = timestamp()
    conditions = old.get("conditions") or [
        {
            "type": kind,
            "status": "True",
            "lastTransitionTime": now,
            "reason": reason,
            "message": message,
        }
        for kind, reason, message in (
            ("NamesAccepted", "NoConflicts", "no conflicts found"),
            ("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        )
    ]
    storage = next(version["name"] for version in spec["versions"] if version.get("storage"))
    stored = list(dict.fromkeys([*(old.get("storedVersions") or []), storage]))
    return {
        **definition,
        "status": {"acceptedNames": spec["names"], "conditions": conditions, "storedVersions": stored},
    }


def types_of(definition: Object) -> list[ResourceType]:
    """One resource type for every served version, the storage version first."""
    spec = definition["spec"]
    names = spec["names"]
    served = [version for version in spec["versions"] if version.get("served")]
    return [
        ResourceType(
            group=spec["group"],
            version=version["name"],
            plural=names["plural"],
            singular=names["singular"],
            kind=names["kind"],
            list_kind=names["listKind"],
            namespaced=spec["scope"] == "Namespaced",
            short_names=tuple(names.get("shortNames") or ()),
            categories=tuple(names.get("categories") or ()),
            subresources=tuple(name for name in ("status",) if name in (version.get("subresources") or {})),
            unconditional_update=False,
            custom=True,
            columns=tuple(_columns(version)),
            schema=Schema((version.get("schema") or {}).get("openAPIV3Schema") or _NO_SCHEMA),
        )
        for version in sorted(served, key=lambda version: not version.get("storage"))
    ]


def _columns(version: Object) -> list[Column]:
    given = version.get("additionalPrinterColumns")
    if not given:
        return [Column(name="Age", type="date", json_path=".metadata.creationTimestamp")]
    return [
        Column(
            name=column["name"],
            type=column["type"],
            json_path=column["jsonPath"],
            description=column.get("description", ""),
            priority=column.get("priority", 0),
            format=column.get("format", ""),
        )
        for column in given
    ]


def serve(registry: Registry, definition: Object, *, served: bool = True) -> None:
    """Make the registry serve what a definition defines, or stop doing so."""
    spec = definition["spec"]
    registry.replace_custom(spec["group"], spec["names"]["plural"], types_of(definition) if served else ())
