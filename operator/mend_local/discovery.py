"""What is served: the documents by which clients find groups, versions and resources."""

from __future__ import annotations

from typing import Any

from mend_local.resources import Registry, ResourceType

Object = dict[str, Any]

VERSION: Object = {
    "major": "1",
    "minor": "32",
    "gitVersion": "v1.32.0-mend-local",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "1970-01-01T00:00:00Z",
    "goVersion": "none",
    "compiler": "none",
    "platform": "linux/amd64",
}
_SUBRESOURCE_VERBS: dict[str, tuple[str, ...]] = {
    "status": ("get", "patch", "update"),
    "log": ("get",),
    "binding": ("create",),
    "token": ("create",),
}
_SUBRESOURCE_KINDS = {"binding": ("v1", "Binding"), "token": ("authentication.k8s.io/v1", "TokenRequest")}


def document(registry: Registry, path: str) -> Object | None:
    """The discovery document at a path, or None."""
    match path.strip("/").split("/"):
        case ["version"]:
            return VERSION
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        case ["apis"]:
            groups = [_group(name, versions) for name, versions in registry.groups().items() if name]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        case ["api", version]:
            return _resources(registry, "", version)
        case ["apis", group]:
            versions = registry.groups().get(group)
            return {**_group(group, versions), "kind": "APIGroup", "apiVersion": "v1"} if versions else None
        case ["apis", group, version]:
            return _resources(registry, group, version)
        case _:
            return None


def _group(name: str, versions: list[str]) -> Object:
    listed = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def _resources(registry: Registry, group: str, version: str) -> Object | None:
    types = registry.of(group, version)
    if not types:
        return None
    listed = [entry for each in types for entry in _entries(each)]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": types[0].api_version,
        "resources": listed,
    }


def _entries(kind: ResourceType) -> list[Object]:
    entry: Object = {
        "name": kind.plural,
        "singularName": kind.singular or kind.kind.lower(),
        "namespaced": kind.namespaced,
        "kind": kind.kind,
        "verbs": list(kind.verbs),
    }
    if kind.short_names:
        entry["shortNames"] = list(kind.short_names)
    if kind.categories:
        entry["categories"] = list(kind.categories)
    return [entry, *(_subresource(kind, name) for name in kind.subresources)]


def _subresource(kind: ResourceType, name: str) -> Object:
    entry: Object = {
        "name": f"{kind.plural}/{name}",
        "singularName": "",
        "namespaced": kind.namespaced,
        "kind": kind.kind,
        "verbs": list(_SUBRESOURCE_VERBS[name]),
    }
    if name in _SUBRESOURCE_KINDS:
        api_version, entry["kind"] = _SUBRESOURCE_KINDS[name]
        group, _, version = api_version.rpartition("/")
        entry |= {"group": group, "version": version}
    return entry
