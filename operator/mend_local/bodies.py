"""Request bodies as JSON values, whatever they come as, and how answers are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import yaml

from mend_local import failures, protobuf
from mend_local.failures import unsupported_media_type
from mend_local.patches import json_patch, merge_patch, strategic_patch
from mend_local.resources import ResourceType

Object = dict[str, Any]


def read(raw: bytes, content_type: str) -> Any:
    """A body as JSON values; raises a 400 or 415. kubectl sends some bodies as protobuf and cannot be told not to."""
    match content_type:
        case "application/vnd.kubernetes.protobuf":
            try:
                return protobuf.decode(raw)
            except protobuf.Undecodable as error:
                raise unsupported_media_type(f"{error}; send application/json") from error
        case "application/yaml":
            try:
                return yaml.safe_load(raw)
            except yaml.YAMLError as error:
                raise failures.bad_request(f"the body is not YAML: {error}") from error
        case "application/json" | "application/octet-stream" | "":
            return _json(raw)
        case _:
            raise unsupported_media_type(
                f"the body of the request was in an unknown format - got {content_type}; "
                "accepted media types include: application/json, application/yaml, application/vnd.kubernetes.protobuf"
            )


def _json(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except msgspec.MsgspecError as error:
        raise failures.bad_request(f"the body is not JSON: {error}") from error


def read_patch(raw: bytes, content_type: str, kind: ResourceType) -> Callable[[Object], Any]:
    """The patch in a body as a function from the present to the wanted object; raises a 400 or 415."""
    match content_type:
        case "application/merge-patch+json":
            patch = _json(raw)
            return lambda value: merge_patch(value, patch)
        case "application/json-patch+json":
            operations = _json(raw)
            return lambda value: json_patch(value, operations)
        case "application/strategic-merge-patch+json" if not kind.custom:
            strategic = _json(raw)
            return lambda value: strategic_patch(value, strategic)
    known = ["application/json-patch+json", "application/merge-patch+json"]
    if not kind.custom:
        known.append("application/strategic-merge-patch+json")
    hint = " (server-side apply is not there: use client-side apply)" if "apply-patch" in content_type else ""
    raise unsupported_media_type(
        f"the body of the request was in an unknown format - got {content_type or 'none'}{hint}; "
        f"accepted media types include: {', '.join(known)}"
    )


def shape_wanted(accept: str) -> str:
    """What an Accept header asks for first that we have: "Table", "PartialObjectMetadata" or "" for plain objects."""
    for choice in accept.split(","):
        media, *parameters = (part.strip() for part in choice.split(";"))
        asked = dict(part.partition("=")[::2] for part in parameters)
        if media not in ("application/json", "*/*", "application/*"):
            continue
        match asked.get("as", ""):
            case "":
                return ""
            case "Table" if asked.get("v") == "v1":
                return "Table"
            case "PartialObjectMetadata" | "PartialObjectMetadataList" if asked.get("v") == "v1":
                return "PartialObjectMetadata"
    return ""
