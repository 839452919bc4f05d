"""The few Kubernetes messages that kubectl sends as protobuf, read into the JSON they stand for."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]

_MAGIC = b"k8s\x00"

# Field number -> (JSON name, type). A type is a scalar's name or another message; "[x]" repeats, "{x}" is a map to x.
_MESSAGES: dict[str, dict[int, tuple[str, str]]] = {
    "ObjectMeta": {
        1: ("name", "string"),
        2: ("generateName", "string"),
        3: ("namespace", "string"),
        5: ("uid", "string"),
        6: ("resourceVersion", "string"),
        11: ("labels", "{string}"),
        12: ("annotations", "{string}"),
        13: ("ownerReferences", "[OwnerReference]"),
        14: ("finalizers", "[string]"),
    },
    "OwnerReference": {
        1: ("kind", "string"),
        3: ("name", "string"),
        4: ("uid", "string"),
        5: ("apiVersion", "string"),
        6: ("controller", "bool"),
        7: ("blockOwnerDeletion", "bool"),
    },
    "Namespace": {1: ("metadata", "ObjectMeta")},
    "ServiceAccount": {1: ("metadata", "ObjectMeta"), 4: ("automountServiceAccountToken", "bool")},
    "Secret": {
        1: ("metadata", "ObjectMeta"),
        2: ("data", "{bytes}"),
        3: ("type", "string"),
        4: ("stringData", "{string}"),
        5: ("immutable", "bool"),
    },
    "ConfigMap": {
        1: ("metadata", "ObjectMeta"),
        2: ("data", "{string}"),
        3: ("binaryData", "{bytes}"),
        4: ("immutable", "bool"),
    },
    "Role": {1: ("metadata", "ObjectMeta"), 2: ("rules", "[PolicyRule]")},
    "ClusterRole": {1: ("metadata", "ObjectMeta"), 2: ("rules", "[PolicyRule]")},
    "PolicyRule": {
        1: ("verbs", "[string]"),
        2: ("apiGroups", "[string]"),
        3: ("resources", "[string]"),
        4: ("resourceNames", "[string]"),
        5: ("nonResourceURLs", "[string]"),
    },
    "RoleBinding": {1: ("metadata", "ObjectMeta"), 2: ("subjects", "[Subject]"), 3: ("roleRef", "RoleRef")},
    "ClusterRoleBinding": {1: ("metadata", "ObjectMeta"), 2: ("subjects", "[Subject]"), 3: ("roleRef", "RoleRef")},
    "Subject": {1: ("kind", "string"), 2: ("apiGroup", "string"), 3: ("name", "string"), 4: ("namespace", "string")},
    "RoleRef": {1: ("apiGroup", "string"), 2: ("kind", "string"), 3: ("name", "string")},
    "SelfSubjectAccessReview": {1: ("metadata", "ObjectMeta"), 2: ("spec", "SelfSubjectAccessReviewSpec")},
    "SelfSubjectAccessReviewSpec": {
        1: ("resourceAttributes", "ResourceAttributes"),
        2: ("nonResourceAttributes", "NonResourceAttributes"),
    },
    "ResourceAttributes": {
        1: ("namespace", "string"),
        2: ("verb", "string"),
        3: ("group", "string"),
        4: ("version", "string"),
        5: ("resource", "string"),
        6: ("subresource", "string"),
        7: ("name", "string"),
    },
    "NonResourceAttributes": {1: ("path", "string"), 2: ("verb", "string")},
    "SelfSubjectRulesReview": {1: ("metadata", "ObjectMeta"), 2: ("spec", "SelfSubjectRulesReviewSpec")},
    "SelfSubjectRulesReviewSpec": {1: ("namespace", "string")},
    "SelfSubjectReview": {1: ("metadata", "ObjectMeta")},
    "TokenRequest": {1: ("metadata", "ObjectMeta"), 2: ("spec", "TokenRequestSpec")},
    "TokenRequestSpec": {1: ("audiences", "[string]"), 4: ("expirationSeconds", "int")},
    "DeleteOptions": {
        1: ("gracePeriodSeconds", "int"),
        2: ("preconditions", "Preconditions"),
        3: ("orphanDependents", "bool"),
        4: ("propagationPolicy", "string"),
        5: ("dryRun", "[string]"),
    },
    "Preconditions": {1: ("uid", "string"), 2: ("resourceVersion", "string")},
    "Event": {
        1: ("metadata", "ObjectMeta"),
        2: ("involvedObject", "ObjectReference"),
        3: ("reason", "string"),
        4: ("message", "string"),
        5: ("source", "EventSource"),
        6: ("firstTimestamp", "time"),
        7: ("lastTimestamp", "time"),
        8: ("count", "int"),
        9: ("type", "string"),
    },
    "ObjectReference": {
        1: ("kind", "string"),
        2: ("namespace", "string"),
        3: ("name", "string"),
        4: ("uid", "string"),
        5: ("apiVersion", "string"),
        6: ("resourceVersion", "string"),
        7: ("fieldPath", "string"),
    },
    "EventSource": {1: ("component", "string"), 2: ("host", "string")},
}
_PREFIXES = ("v1", "rbac.authorization.k8s.io/v1", "authorization.k8s.io/v1", "authentication.k8s.io/v1")


class Undecodable(ValueError):
    """Bytes that are no message of ours."""


def decode(raw: bytes) -> Object:
    """The object in a Kubernetes protobuf envelope; raises `Undecodable`."""
    if not raw.startswith(_MAGIC):
        raise Undecodable("the body does not start with the magic bytes of Kubernetes' protobuf")
    envelope = dict(_fields(raw[len(_MAGIC) :]))
    names = {number: _text(value) for number, value in _fields(_bytes(envelope.get(1, b"")))}
    api_version, kind = names.get(1, ""), names.get(2, "")
    if kind not in _MESSAGES or (api_version not in _PREFIXES and kind != "DeleteOptions"):
        raise Undecodable(f"{kind} of {api_version} is not read as protobuf here")
    return {"apiVersion": api_version, "kind": kind, **_message(kind, _bytes(envelope.get(2, b"")))}


def _message(kind: str, raw: bytes) -> Object:
    known = _MESSAGES[kind]
    value: Object = {}
    for number, part in _fields(raw):
        if number not in known:
            continue
        name, type_ = known[number]
        if type_.startswith("["):
            value.setdefault(name, []).append(_value(type_[1:-1], part))
        elif type_.startswith("{"):
            entry = dict(_fields(_bytes(part)))
            value.setdefault(name, {})[_text(entry.get(1, b""))] = _value(type_[1:-1], entry.get(2, b""))
        else:
            value[name] = _value(type_, part)
    # Go writes empty strings for what was not set.
    return {name: part for name, part in value.items() if part != ""}


def _value(type_: str, part: int | bytes) -> Any:
    match type_:
        case "string":
            return _text(part)
        case "bytes":
            return base64.b64encode(_bytes(part)).decode()
        case "bool":
            return bool(part)
        case "int":
            number = int(part)
            return number - (1 << 64) if number >= 1 << 63 else number
        case "time":
            seconds = dict(_fields(_bytes(part))).get(1, 0)
            return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        case message:
            return _message(message, _bytes(part))


def _text(part: int | bytes) -> str:
    try:
        return _bytes(part).decode()
    except UnicodeDecodeError as error:
        raise Undecodable(f"a string is not UTF-8: {error}") from error


def _bytes(part: int | bytes) -> bytes:
    if isinstance(part, int):
        raise Undecodable(f"expected bytes, got the number {part}")
    return part


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: its number and a varint or the bytes of anything longer."""
    place = 0
    while place < len(raw):
        tag, place = _varint(raw, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(raw, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(raw, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise Undecodable(f"wire type {wire}")
        if place + length > len(raw):
            raise Undecodable("the message ends too early")
        yield number, raw[place : place + length]
        place += length


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(raw) or shift > 63:
            raise Undecodable("a number does not end")
        byte = raw[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
        shift += 7


def encode_field(number: int, value: str | bytes) -> bytes:
    """One length-delimited field, for the OpenAPI v2 document that old kubectls read only as protobuf."""
    raw = value.encode() if isinstance(value, str) else value
    return _encode_varint(number << 3 | 2) + _encode_varint(len(raw)) + raw


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
