"""Questions that callers ask about themselves: who am I, and may I?"""

from __future__ import annotations

from typing import Any

from mend_local import failures, rbac
from mend_local.identity import Identity
from mend_local.resources import ResourceType
from mend_local.storage import Storage
from mend_local.targets import Target

Object = dict[str, Any]

KINDS = ("selfsubjectaccessreviews", "selfsubjectrulesreviews", "selfsubjectreviews")
_ADMIN_RULES = (
    {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]},
    {"verbs": ["*"], "nonResourceURLs": ["*"]},
)


def review(storage: Storage, kind: ResourceType, who: Identity, body: Any) -> Object:
    """The question with its answer as status; raises a 400."""
    spec = (body.get("spec") or {}) if isinstance(body, dict) else {}
    match kind.plural:
        case "selfsubjectaccessreviews":
            status = _access(storage, who, spec)
        case "selfsubjectrulesreviews":
            status = _rules(storage, who, spec.get("namespace", ""))
        case _:
            status = {"userInfo": {"username": who.user, "groups": list(who.groups)}}
    return {"kind": kind.kind, "apiVersion": kind.api_version, "metadata": {}, "spec": spec, "status": status}


def _access(storage: Storage, who: Identity, spec: Object) -> Object:
    if about := spec.get("resourceAttributes"):
        target = Target(
            path="",
            verb=about.get("verb", ""),
            group=about.get("group", ""),
            version=about.get("version", ""),
            namespace=about.get("namespace", ""),
            plural=about.get("resource", "") or "*",
            name=about.get("name", ""),
            subresource=about.get("subresource", ""),
        )
    elif about := spec.get("nonResourceAttributes"):
        target = Target(path=about.get("path", ""), verb=about.get("verb", ""))
    else:
        raise failures.bad_request("spec: expected resourceAttributes or nonResourceAttributes")
    allowed = rbac.is_allowed(storage, who, target)
    return {"allowed": allowed, **({} if allowed else {"reason": "no role bound to this user allows it"})}


def _rules(storage: Storage, who: Identity, namespace: str) -> Object:
    rules = list(_ADMIN_RULES) if who.is_admin else list(rbac.rules_for(storage, who, namespace))
    return {
        "resourceRules": [rule for rule in rules if "resources" in rule],
        "nonResourceRules": [rule for rule in rules if "nonResourceURLs" in rule],
        "incomplete": False,
    }
