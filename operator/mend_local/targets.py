"""What a request is about: its path and method taken apart as Kubernetes does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mend_local.selectors import named

_NAMESPACE_SUBRESOURCES = ("status", "finalize")
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The resource, or with an empty `plural` the plain path, that a request is about, and the verb."""

    path: str
    verb: str
    group: str = ""
    version: str = ""
    namespace: str = ""
    plural: str = ""
    name: str = ""
    subresource: str = ""

    @property
    def is_resource(self) -> bool:
        """Whether this is about objects (rather than discovery, health and the like)."""
        return bool(self.plural)


def parse(method: str, path: str, query: Mapping[str, str]) -> Target:
    """Take a request apart."""
    parts = [part for part in path.split("/") if part]
    if parts[:1] == ["api"] and len(parts) > 2:
        group, version, rest = "", parts[1], parts[2:]
    elif parts[:1] == ["apis"] and len(parts) > 3:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return Target(path=path, verb=method.lower())
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in _NAMESPACE_SUBRESOURCES:
        namespace, rest = rest[1], rest[2:]
    plural, name, subresource = [*rest, "", ""][:3]
    return Target(
        path=path,
        verb=_verb(method, bool(name), query),
        group=group,
        version=version,
        namespace=namespace,
        plural=plural,
        # A list or watch of one name may be allowed where one of all names is not.
        name=name or named(query.get("fieldSelector", "")),
        subresource=subresource,
    )


def _verb(method: str, has_name: bool, query: Mapping[str, str]) -> str:
    match method:
        case "GET" | "HEAD":
            if query.get("watch") in ("true", "1"):
                return "watch"
            return "get" if has_name else "list"
        case "DELETE":
            return "delete" if has_name else "deletecollection"
        case _:
            return _VERBS.get(method, method.lower())
