"""The verbs on objects - create, update, patch, delete - with all of Kubernetes' rules for them and without HTTP."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from mend_local import definitions, events, failures, kinds, shapes
from mend_local.failures import Cause
from mend_local.patches import BadPatch
from mend_local.resources import Registry, ResourceType
from mend_local.storage import Key, Storage
from mend_local.times import timestamp

Object = dict[str, Any]
FieldValidation = Literal["Ignore", "Warn", "Strict"]

ORPHAN = "orphan"
FOREGROUND = "foregroundDeletion"
PERMANENT_NAMESPACES = ("default", "kube-system", "kube-node-lease", "kube-public")
_SUFFIX_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
_OWN_METADATA = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation")
_CLIENT_METADATA = ("name", "generateName", "namespace", "labels", "annotations", "ownerReferences", "finalizers")
_CRD = "customresourcedefinitions.apiextensions.k8s.io"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteOptions:
    """How to delete; `uid` and `version` are preconditions."""

    grace_seconds: int | None = None
    propagation: str = ""
    uid: str = ""
    version: str = ""
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How to write; warnings for the client are appended to `warnings`."""

    dry_run: bool = False
    field_validation: FieldValidation = "Warn"
    warnings: list[str] = field(default_factory=list)


class Objects:
    """All objects of the cluster, seen through their resource types."""

    def __init__(self, storage: Storage, registry: Registry) -> None:
        self.storage = storage
        self.registry = registry
        for definition in storage.every(_CRD):
            definitions.serve(registry, definition)

    # ---------------------------------------------------------------- reading
    def get(self, kind: ResourceType, namespace: str, name: str) -> Object:
        """The object; raises a 404."""
        return present(kind, self._stored(kind, (namespace, name)))

    def _stored(self, kind: ResourceType, key: Key) -> Object:
        found = self.storage.get(kind.storage_name, key)
        if found is None:
            raise failures.not_found(kind.group, kind.plural, key[1])
        return found

    # ---------------------------------------------------------------- create
    def create(self, kind: ResourceType, namespace: str, body: Object, options: WriteOptions) -> Object:
        """Store a new object and return it as stored."""
        self._check_identity(kind, body)
        given = body["metadata"]
        if given.get("resourceVersion"):
            raise failures.bad_request("resourceVersion should not be set on objects to be created")
        if given.get("namespace", namespace) != namespace:
            raise failures.bad_request(
                f"the namespace of the provided object does not match the namespace sent on the request "
                f"({given['namespace']} and {namespace})"
            )
        name = given.get("name") or self._generated_name(kind, body)
        self._check_namespace(kind, namespace, name)
        if self.storage.get(kind.storage_name, (namespace, name)) is not None:
            raise failures.already_exists(kind.group, kind.plural, name)
        metadata = {field: given[field] for field in _CLIENT_METADATA if given.get(field)}
        metadata |= {"name": name, "uid": str(uuid.uuid4()), "creationTimestamp": timestamp()}
        if namespace:
            metadata["namespace"] = namespace
        if kind.custom or kind.qualified == _CRD:
            metadata["generation"] = 1
        value = kinds.on_create(kind, to_stored(kind, {**body, "metadata": metadata}))
        return self._write(kind, (namespace, name), value, None, options)

    def _generated_name(self, kind: ResourceType, body: Object) -> str:
        base: str = body["metadata"].get("generateName", "")
        if not base:
            cause = Cause("metadata.name", "FieldValueRequired", "Required value: name or generateName is required")
            raise failures.invalid(kind.group, kind.kind, "", [cause])
        return base[:58] + "".join(secrets.choice(_SUFFIX_LETTERS) for _ in range(5))

    def _check_namespace(self, kind: ResourceType, namespace: str, name: str) -> None:
        if not kind.namespaced:
            return
        found = self.storage.get("namespaces", ("", namespace))
        if found is None:
            raise failures.not_found("", "namespaces", namespace)
        if found["metadata"].get("deletionTimestamp"):
            why = f"unable to create new content in namespace {namespace} because it is being terminated"
            message = f'{kind.qualified} "{name}" is forbidden: {why}'
            cause = {"reason": "NamespaceTerminating", "message": f"namespace {namespace} is being terminated"}
            raise failures.forbidden(message, kind.group, kind.plural, name, causes=[cause])

    # ---------------------------------------------------------------- update
    def update(
        self, kind: ResourceType, namespace: str, name: str, body: Object, options: WriteOptions, subresource: str = ""
    ) -> Object:
        """Replace an object, or with `subresource` "status" only its status."""
        self._check_identity(kind, body)
        if body["metadata"].get("name", name) != name:
            raise failures.bad_request(
                f"the name of the object ({body['metadata']['name']}) does not match the name on the URL ({name})"
            )
        old = self._stored(kind, (namespace, name))
        version = body["metadata"].get("resourceVersion", "")
        if not version and not kind.unconditional_update:
            detail = "Invalid value: 0: must be specified for an update"
            cause = Cause("metadata.resourceVersion", "FieldValueInvalid", detail)
            raise failures.invalid(kind.group, kind.kind, name, [cause])
        self._check_current(kind, old, body["metadata"].get("uid", ""), version)
        return self._replace(kind, (namespace, name), old, to_stored(kind, body), options, subresource)

    def patch(
        self,
        kind: ResourceType,
        namespace: str,
        name: str,
        change: Callable[[Object], Any],
        options: WriteOptions,
        subresource: str = "",
    ) -> Object:
        """Apply `change` to the present state; a resourceVersion or uid in the outcome is a precondition."""
        old = self._stored(kind, (namespace, name))
        try:
            new = change(present(kind, old))
        except BadPatch as error:
            raise failures.invalid(
                kind.group, kind.kind, name, [Cause("patch", "FieldValueInvalid", f"Invalid value: {error}")]
            ) from error
        self._check_identity(kind, new)
        metadata = new["metadata"]
        if metadata.get("name") != name or metadata.get("namespace", "") != namespace:
            raise failures.bad_request("the name or namespace of an object cannot be changed by a patch")
        self._check_current(kind, old, metadata.get("uid", ""), metadata.get("resourceVersion", ""))
        return self._replace(kind, (namespace, name), old, to_stored(kind, new), options, subresource)

    def _replace(
        self, kind: ResourceType, key: Key, old: Object, body: Object, options: WriteOptions, subresource: str
    ) -> Object:
        if subresource == "status":
            value = {name: part for name, part in old.items() if name != "status"}
            if "status" in body:
                value["status"] = body["status"]
        else:
            value = kinds.on_update(kind, {**body, "metadata": _merged_metadata(body, old)}, old)
            self._check_finalizers(kind, value, old)
        return self._write(kind, key, value, old, options)

    def _check_finalizers(self, kind: ResourceType, value: Object, old: Object) -> None:
        if not old["metadata"].get("deletionTimestamp"):
            return
        before = old["metadata"].get("finalizers") or []
        added = [each for each in value["metadata"].get("finalizers") or [] if each not in before]
        if added:
            detail = (
                "Forbidden: no new finalizers can be added if the object is being deleted, "
                f"found new finalizers {added}"
            )
            cause = Cause("metadata.finalizers", "FieldValueForbidden", detail)
            raise failures.invalid(kind.group, kind.kind, old["metadata"]["name"], [cause])

    def _write(self, kind: ResourceType, key: Key, value: Object, old: Object | None, options: WriteOptions) -> Object:
        """Complete, check and store; nothing is stored if nothing changed."""
        if kind.schema is not None:
            value, unknown = kind.schema.admit(value)
            _tell_unknown(kind, unknown, options)
        causes = kinds.problems(kind, value, old)
        if kind.schema is not None:
            causes = [*causes, *kind.schema.problems(value, old)]
        if causes:
            raise failures.invalid(kind.group, kind.kind, key[1], causes)
        if old is not None:
            if kind.custom or kind.qualified == _CRD:
                value = _with_generation(kind, value, old)
            if value == old:
                return present(kind, old)
            if _may_vanish(value):
                return present(kind, value if options.dry_run else self._remove(kind, key))
        if options.dry_run:
            return present(kind, value)
        stored = self.storage.put(kind.storage_name, key, value)
        self._note(kind, stored)
        return present(kind, stored)

    def _check_identity(self, kind: ResourceType, body: Any) -> None:
        shapes.check(kind, body)
        body.setdefault("metadata", {})
        told = (body.get("apiVersion", kind.api_version), body.get("kind", kind.kind))
        if told != (kind.api_version, kind.kind):
            raise failures.bad_request(
                f"the object provided is unrecognized: got {told[1]} in {told[0]}, "
                f"expected {kind.kind} in {kind.api_version}"
            )

    def _check_current(self, kind: ResourceType, old: Object, uid: str, version: str) -> None:
        metadata = old["metadata"]
        if uid and uid != metadata["uid"]:
            why = f"Precondition failed: UID in precondition: {uid}, UID in object meta: {metadata['uid']}"
            raise failures.conflict(kind.group, kind.plural, metadata["name"], why)
        if version and version != metadata["resourceVersion"]:
            raise failures.conflict(kind.group, kind.plural, metadata["name"])

    # ---------------------------------------------------------------- delete
    def delete(self, kind: ResourceType, namespace: str, name: str, options: DeleteOptions) -> tuple[Object, bool]:
        """Delete, or mark for deletion what still needs time or has finalizers; True tells that it is gone."""
        key = (namespace, name)
        old = self._stored(kind, key)
        if kind.qualified == "namespaces" and name in PERMANENT_NAMESPACES:
            raise failures.forbidden(
                f'namespaces "{name}" is forbidden: this namespace may not be deleted', "", "namespaces", name
            )
        self._check_preconditions(kind, old, options)
        grace = kinds.grace_seconds(kind, old, options.grace_seconds)
        marked = _marked(kind, old, grace, options.propagation)
        gone = _may_vanish(marked)
        if options.dry_run:
            return present(kind, marked), gone
        if gone:
            return present(kind, self._remove(kind, key)), True
        if marked != old:
            marked = self.storage.put(kind.storage_name, key, marked)
            self._note(kind, marked)
        return present(kind, marked), False

    def settle(self, kind: ResourceType, value: Object) -> None:
        """Store what a controller of the cluster itself has decided, past the rules for clients; or let it vanish."""
        key = (value["metadata"].get("namespace", ""), value["metadata"]["name"])
        if _may_vanish(value):
            self._remove(kind, key)
        else:
            self.storage.put(kind.storage_name, key, value)

    def _check_preconditions(self, kind: ResourceType, old: Object, options: DeleteOptions) -> None:
        metadata = old["metadata"]
        for what, asked, actual in (
            ("UID", options.uid, metadata["uid"]),
            ("ResourceVersion", options.version, metadata["resourceVersion"]),
        ):
            if asked and asked != actual:
                why = f"Precondition failed: {what} in precondition: {asked}, {what} in object meta: {actual}"
                raise failures.conflict(kind.group, kind.plural, metadata["name"], why)

    def _remove(self, kind: ResourceType, key: Key) -> Object:
        gone = self.storage.delete(kind.storage_name, key)
        if kind.qualified == _CRD:
            definitions.serve(self.registry, gone, served=False)
        return gone

    def _note(self, kind: ResourceType, stored: Object) -> None:
        if kind.qualified == _CRD:
            definitions.serve(self.registry, stored)


def present(kind: ResourceType, stored: Object) -> Object:
    """A stored object as it looks in one version of its type."""
    if kind.group == "events.k8s.io":
        return events.from_stored(stored)
    if stored.get("apiVersion") == kind.api_version and stored.get("kind") == kind.kind:
        return stored
    return {**stored, "apiVersion": kind.api_version, "kind": kind.kind}


def to_stored(kind: ResourceType, value: Object) -> Object:
    """An object in one version of its type as it is stored."""
    if kind.group == "events.k8s.io":
        return events.to_stored(value)
    return {**value, "apiVersion": kind.api_version, "kind": kind.kind}


def _merged_metadata(body: Object, old: Object) -> Object:
    """What a client may change of the metadata, and what only the server does."""
    before = old["metadata"]
    kept = {name: before[name] for name in ("name", "namespace", "generateName", *_OWN_METADATA) if name in before}
    given = {name: body["metadata"][name] for name in _CLIENT_METADATA if body["metadata"].get(name)}
    return {**given, **kept, "resourceVersion": before["resourceVersion"]}


def _with_generation(kind: ResourceType, value: Object, old: Object) -> Object:
    """The generation counts changes of everything but metadata and, where it is a subresource, status."""
    apart = ("metadata", "status") if kind.has_status else ("metadata",)
    changed = any(value.get(name) != old.get(name) for name in value.keys() | old.keys() if name not in apart)
    if not changed:
        return value
    generation = old["metadata"].get("generation", 1) + 1
    return {**value, "metadata": {**value["metadata"], "generation": generation}}


def _marked(kind: ResourceType, old: Object, grace: int, propagation: str) -> Object:
    """The object with its deletion asked for: a second request can only shorten the grace period."""
    metadata = dict(old["metadata"])
    running = metadata.get("deletionGracePeriodSeconds")
    if running is None or grace < running:
        metadata["deletionTimestamp"] = timestamp(datetime.now(UTC) + timedelta(seconds=grace))
        metadata["deletionGracePeriodSeconds"] = grace
    if running is None and "generation" in metadata:
        metadata["generation"] += 1
    finalizer = {"Orphan": ORPHAN, "Foreground": FOREGROUND}.get(propagation)
    if running is None and finalizer:
        metadata["finalizers"] = [*(each for each in metadata.get("finalizers") or [] if each != finalizer), finalizer]
    marked = {**old, "metadata": metadata}
    if kind.qualified == "namespaces":
        marked["status"] = {**(old.get("status") or {}), "phase": "Terminating"}
    return marked


def _may_vanish(value: Object) -> bool:
    """Nothing holds a deleted object any more: no grace period, no finalizer."""
    metadata = value["metadata"]
    if (
        not metadata.get("deletionTimestamp")
        or metadata.get("deletionGracePeriodSeconds")
        or metadata.get("finalizers")
    ):
        return False
    return not (value.get("kind") == "Namespace" and (value.get("spec") or {}).get("finalizers"))


def _tell_unknown(kind: ResourceType, unknown: list[str], options: WriteOptions) -> None:
    if not unknown or options.field_validation == "Ignore":
        return
    if options.field_validation == "Strict":
        listed = ", ".join(f'unknown field "{path}"' for path in unknown)
        raise failures.bad_request(
            f'{kind.kind} in version "{kind.version}" cannot be handled as a {kind.kind}: '
            f"strict decoding error: {listed}"
        )
    options.warnings.extend(f'unknown field "{path}"' for path in unknown)
