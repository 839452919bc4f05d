"""The resource types that are served: the built-in ones, and those that CustomResourceDefinitions add."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mend_local.schema import Schema

Object = dict[str, Any]

ALL_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of `kubectl get`: `json_path` as in additionalPrinterColumns; priority above 0 shows with -o wide."""

    name: str
    type: str
    json_path: str
    description: str = ""
    priority: int = 0
    format: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceType:
    """One resource in one version. Types with equal `storage_name` show the same objects."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    singular: str = ""
    list_kind: str = ""
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ALL_VERBS
    subresources: tuple[str, ...] = ()
    stored_as: str = ""
    unconditional_update: bool = True  # whether an update may leave out the resourceVersion
    custom: bool = False
    columns: tuple[Column, ...] = ()
    schema: Schema | None = None  # of custom resources

    @property
    def api_version(self) -> str:
        """`v1` or `apps/v1`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def storage_name(self) -> str:
        """The name under which objects of any version of this resource are kept."""
        return self.stored_as or self.qualified

    @property
    def qualified(self) -> str:
        """`pods`, or `trainingruns.mend.dev`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def has_status(self) -> bool:
        """Whether status is written through its own subresource only."""
        return "status" in self.subresources

    @property
    def path(self) -> str:
        """Where the group and version are served."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"


_CREATE_ONLY = ("create",)
_RBAC = "rbac.authorization.k8s.io"

BUILT_IN: tuple[ResourceType, ...] = (
    ResourceType(
        group="",
        version="v1",
        plural="namespaces",
        kind="Namespace",
        namespaced=False,
        short_names=("ns",),
        subresources=("status",),
        verbs=("create", "delete", "get", "list", "patch", "update", "watch"),
    ),
    ResourceType(
        group="",
        version="v1",
        plural="pods",
        kind="Pod",
        short_names=("po",),
        categories=("all",),
        subresources=("status", "log", "binding"),
    ),
    ResourceType(
        group="",
        version="v1",
        plural="services",
        kind="Service",
        short_names=("svc",),
        categories=("all",),
        subresources=("status",),
    ),
    ResourceType(group="", version="v1", plural="secrets", kind="Secret"),
    ResourceType(group="", version="v1", plural="configmaps", kind="ConfigMap", short_names=("cm",)),
    ResourceType(group="", version="v1", plural="events", kind="Event", short_names=("ev",)),
    ResourceType(
        group="",
        version="v1",
        plural="nodes",
        kind="Node",
        namespaced=False,
        short_names=("no",),
        subresources=("status",),
    ),
    ResourceType(
        group="",
        version="v1",
        plural="serviceaccounts",
        kind="ServiceAccount",
        short_names=("sa",),
        subresources=("token",),
    ),
    ResourceType(
        group="events.k8s.io", version="v1", plural="events", kind="Event", short_names=("ev",), stored_as="events"
    ),
    ResourceType(group="coordination.k8s.io", version="v1", plural="leases", kind="Lease", unconditional_update=False),
    ResourceType(group=_RBAC, version="v1", plural="roles", kind="Role"),
    ResourceType(group=_RBAC, version="v1", plural="rolebindings", kind="RoleBinding"),
    ResourceType(group=_RBAC, version="v1", plural="clusterroles", kind="ClusterRole", namespaced=False),
    ResourceType(group=_RBAC, version="v1", plural="clusterrolebindings", kind="ClusterRoleBinding", namespaced=False),
    ResourceType(
        group="apiextensions.k8s.io",
        version="v1",
        plural="customresourcedefinitions",
        kind="CustomResourceDefinition",
        namespaced=False,
        short_names=("crd", "crds"),
        categories=("api-extensions",),
        subresources=("status",),
    ),
    ResourceType(
        group="authorization.k8s.io",
        version="v1",
        plural="selfsubjectaccessreviews",
        kind="SelfSubjectAccessReview",
        namespaced=False,
        verbs=_CREATE_ONLY,
    ),
    ResourceType(
        group="authorization.k8s.io",
        version="v1",
        plural="selfsubjectrulesreviews",
        kind="SelfSubjectRulesReview",
        namespaced=False,
        verbs=_CREATE_ONLY,
    ),
    ResourceType(
        group="authentication.k8s.io",
        version="v1",
        plural="selfsubjectreviews",
        kind="SelfSubjectReview",
        namespaced=False,
        verbs=_CREATE_ONLY,
    ),
)


@dataclass(slots=True)
class Registry:
    """Which types are served now; custom ones come and go with their definitions."""

    _types: dict[tuple[str, str, str], ResourceType] = field(
        default_factory=lambda: {(each.group, each.version, each.plural): each for each in BUILT_IN}
    )

    def find(self, group: str, version: str, plural: str) -> ResourceType | None:
        """The type served at this place."""
        return self._types.get((group, version, plural))

    def by_kind(self, api_version: str, kind: str) -> ResourceType | None:
        """The type that an object's apiVersion and kind name."""
        return next((each for each in self if each.api_version == api_version and each.kind == kind), None)

    def replace_custom(self, group: str, plural: str, types: Iterable[ResourceType]) -> None:
        """Serve these versions of a custom resource (none: no longer serve it)."""
        for key in [key for key, each in self._types.items() if each.custom and (key[0], key[2]) == (group, plural)]:
            del self._types[key]
        for each in types:
            self._types[(each.group, each.version, each.plural)] = each

    def __iter__(self) -> Any:
        return iter(tuple(self._types.values()))

    def groups(self) -> Mapping[str, list[str]]:
        """Served versions by group, the preferred one first, in a stable order."""
        found: dict[str, list[str]] = {}
        for each in self:
            versions = found.setdefault(each.group, [])
            if each.version not in versions:
                versions.append(each.version)
        return found

    def of(self, group: str, version: str) -> list[ResourceType]:
        """The types of one group and version."""
        return [each for each in self if (each.group, each.version) == (group, version)]
