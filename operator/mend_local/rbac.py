"""Who may do what: Roles and ClusterRoles through their bindings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mend_local import failures
from mend_local.failures import ApiFailure
from mend_local.identity import Identity
from mend_local.storage import Storage
from mend_local.targets import Target

Object = dict[str, Any]

_GROUP = "rbac.authorization.k8s.io"
# What Kubernetes grants every authenticated user: discovery, health, and questions about oneself.
_OPEN_PATHS = ("/api", "/apis", "/openapi", "/version", "/healthz", "/livez", "/readyz")
_SELF_REVIEWS = ("selfsubjectaccessreviews", "selfsubjectrulesreviews", "selfsubjectreviews")


def is_allowed(storage: Storage, who: Identity, target: Target) -> bool:
    """Whether `who` may do what `target` says."""
    if who.is_admin:
        return True
    if not target.is_resource:
        if target.verb in ("get", "head") and target.path.startswith(_OPEN_PATHS):
            return True
    elif target.plural in _SELF_REVIEWS and target.verb == "create":
        return True
    return any(_grants(rule, target) for rule in rules_for(storage, who, target.namespace))


def rules_for(storage: Storage, who: Identity, namespace: str) -> Iterator[Object]:
    """All rules that bindings give to `who`: cluster-wide ones and those of one namespace."""
    for binding in storage.every(f"clusterrolebindings.{_GROUP}"):
        if _binds(binding, who):
            yield from _rules(storage, binding, "")
    if namespace:
        for binding in storage.every(f"rolebindings.{_GROUP}", namespace):
            if _binds(binding, who):
                yield from _rules(storage, binding, namespace)


def _binds(binding: Object, who: Identity) -> bool:
    for subject in binding.get("subjects") or ():
        match subject.get("kind"):
            case "User":
                found = subject.get("name") == who.user
            case "Group":
                found = subject.get("name") in who.groups
            case "ServiceAccount":
                namespace = subject.get("namespace") or binding["metadata"].get("namespace", "")
                found = who.user == f"system:serviceaccount:{namespace}:{subject.get('name')}"
            case _:
                found = False
        if found:
            return True
    return False


def _rules(storage: Storage, binding: Object, namespace: str) -> list[Object]:
    reference = binding.get("roleRef") or {}
    cluster_wide = reference.get("kind") == "ClusterRole"
    place = f"clusterroles.{_GROUP}" if cluster_wide else f"roles.{_GROUP}"
    role = storage.get(place, ("" if cluster_wide else namespace, reference.get("name", "")))
    return list((role or {}).get("rules") or ())


def _grants(rule: Object, target: Target) -> bool:
    if not _has(rule, "verbs", target.verb):
        return False
    if not target.is_resource:
        urls = rule.get("nonResourceURLs") or ()
        return any(url in ("*", target.path) or _is_prefix(url, target.path) for url in urls)
    resource = f"{target.plural}/{target.subresource}" if target.subresource else target.plural
    if not _has(rule, "apiGroups", target.group):
        return False
    if not (_has(rule, "resources", resource) or f"*/{target.subresource}" in (rule.get("resources") or ())):
        return False
    names = rule.get("resourceNames")
    return not names or target.name in names


def _is_prefix(url: str, path: str) -> bool:
    return url.endswith("*") and path.startswith(url[:-1])


def _has(rule: Object, field: str, wanted: str) -> bool:
    listed = rule.get(field) or ()
    return "*" in listed or wanted in listed


def denial(who: Identity, target: Target) -> ApiFailure:
    """The 403 that Kubernetes answers."""
    if not target.is_resource:
        return failures.forbidden(f'forbidden: User "{who.user}" cannot {target.verb} path "{target.path}"')
    resource = f"{target.plural}/{target.subresource}" if target.subresource else target.plural
    where = f'in the namespace "{target.namespace}"' if target.namespace else "at the cluster scope"
    qualified = f"{target.plural}.{target.group}" if target.group else target.plural
    about = f'{qualified} "{target.name}"' if target.name else qualified
    message = (
        f'{about} is forbidden: User "{who.user}" cannot {target.verb} resource "{resource}" '
        f'in API group "{target.group}" {where}'
    )
    return failures.forbidden(message, target.group, target.plural, target.name)
