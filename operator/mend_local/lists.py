"""Listing: selectors, versions and pages that fit together."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mend_local import failures, selectors
from mend_local.failures import ApiFailure
from mend_local.objects import present
from mend_local.resources import ResourceType
from mend_local.storage import HistoryGone, Storage

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which objects of a resource are asked for."""

    namespace: str
    labels: selectors.Predicate | None
    fields: selectors.Predicate | None

    def takes(self, value: Object | None) -> bool:
        """Whether an object is among them."""
        if value is None or (self.namespace and value["metadata"].get("namespace") != self.namespace):
            return False
        return (self.labels is None or self.labels(value)) and (self.fields is None or self.fields(value))


def selection(kind: ResourceType, namespace: str, query: Mapping[str, str]) -> Selection:
    """The selection in a request's query; raises a 400 for selectors that cannot be read."""
    fields = query.get("fieldSelector", "")
    if kind.group == "events.k8s.io":
        fields = fields.replace("regarding.", "involvedObject.")
    return Selection(
        namespace,
        selectors.by_labels(query.get("labelSelector", "")),
        selectors.by_fields(fields, kind.plural, kind.kind),
    )


def page(
    storage: Storage, kind: ResourceType, chosen: Selection, query: Mapping[str, str]
) -> tuple[Object, list[Object]]:
    """The list's metadata, and the objects of the page that is asked for."""
    limit = number(query, "limit")
    token = query.get("continue", "")
    after: tuple[str, str] | None = None
    if token:
        version, after = _read_token(token)
    else:
        version = _asked_version(storage, query)
    try:
        current = version == storage.version
        found = storage.every(kind.storage_name, chosen.namespace) if current else None
        values = storage.every_at(kind.storage_name, chosen.namespace, version) if found is None else found
    except HistoryGone as gone:
        raise _too_old(gone, paging=bool(token)) from gone
    if after is not None:
        values = [value for value in values if _key(value) > after]
    values = [value for value in values if chosen.takes(value)]
    metadata: Object = {"resourceVersion": str(version)}
    if limit and len(values) > limit:
        rest = len(values) - limit
        values = values[:limit]
        metadata["continue"] = _write_token(version, values[-1])
        if chosen.labels is None and chosen.fields is None:
            metadata["remainingItemCount"] = rest
    return metadata, [present(kind, value) for value in values]


def _asked_version(storage: Storage, query: Mapping[str, str]) -> int:
    """Without a version, or with one that only says 'not older than', the newest state is a right answer."""
    asked = number(query, "resourceVersion")
    match = query.get("resourceVersionMatch", "")
    if asked > storage.version:
        message = f"Too large resource version: {asked}, current: {storage.version}"
        cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
        raise ApiFailure(504, "Timeout", message, details={"causes": [cause], "retryAfterSeconds": 1})
    if match == "Exact" and asked:
        return asked
    if match not in ("", "NotOlderThan"):
        raise failures.bad_request(
            f"resourceVersionMatch: got {match!r}; expected Exact (with a version) or NotOlderThan"
        )
    return storage.version


def _too_old(gone: HistoryGone, *, paging: bool) -> ApiFailure:
    if paging:
        return failures.expired(
            "The provided continue parameter is too old to display a consistent list result. "
            "You can start a new list without the continue parameter."
        )
    return failures.expired(f"The resourceVersion for the provided list is too old. ({gone})")


def _key(value: Object) -> tuple[str, str]:
    return value["metadata"].get("namespace", ""), value["metadata"]["name"]


def _write_token(version: int, last: Object) -> str:
    return base64.urlsafe_b64encode(json.dumps([version, *_key(last)]).encode()).decode()


def _read_token(token: str) -> tuple[int, tuple[str, str]]:
    try:
        version, namespace, name = json.loads(base64.urlsafe_b64decode(token))
        return int(version), (str(namespace), str(name))
    except (binascii.Error, ValueError, TypeError) as error:
        raise failures.bad_request(f"continue key is not valid: {token!r}") from error


def number(query: Mapping[str, str], name: str) -> int:
    """A whole number from the query (0 if absent); raises a 400."""
    text = query.get(name) or "0"
    if not text.isdigit():
        raise failures.bad_request(f'Invalid value: "{text}": {name} must be a whole number')
    return int(text)
