"""The three ways of patching: JSON merge patch, JSON patch, and the strategic merge patch of built-in types."""

from __future__ import annotations

import copy
from typing import Any

Object = dict[str, Any]

# Which lists of built-in objects are merged item by item, and by which field; all others are replaced.
_MERGE_KEYS: dict[str, str] = {
    "containers": "name",
    "initContainers": "name",
    "ephemeralContainers": "name",
    "containerStatuses": "",  # replaced as a whole, in spite of looking like a map
    "volumes": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "env": "name",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "conditions": "type",
    "addresses": "type",
    "ownerReferences": "uid",
    "secrets": "name",
    "podIPs": "ip",
}
_PRIMITIVE_MERGE = ("finalizers",)


class BadPatch(ValueError):
    """A patch that cannot be read or applied."""


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386: objects merge, null removes, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def strategic_patch(target: Any, patch: Any) -> Any:
    """Kubernetes' strategic merge: as a merge patch, but known lists are merged by the key of their items."""
    if not isinstance(patch, dict):
        return patch
    if patch.get("$patch") == "replace":
        return {name: value for name, value in patch.items() if name != "$patch"}
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if name == "$retainKeys":
            merged = {kept: inner for kept, inner in merged.items() if kept in value}
    for name, value in patch.items():
        if name.startswith("$deleteFromPrimitiveList/"):
            field = name.partition("/")[2]
            merged[field] = [each for each in merged.get(field) or [] if each not in value]
        elif name.startswith("$"):
            continue
        elif value is None or (isinstance(value, dict) and value.get("$patch") == "delete"):
            merged.pop(name, None)
        elif isinstance(value, list):
            merged[name] = _strategic_list(name, merged.get(name), value)
        else:
            merged[name] = strategic_patch(merged.get(name), value)
    return _ordered(merged, patch)


def _strategic_list(name: str, current: Any, patch: list[Any]) -> list[Any]:
    current = current if isinstance(current, list) else []
    if name in _PRIMITIVE_MERGE:
        return [*current, *(each for each in patch if each not in current)]
    key = _merge_key(name, current, patch)
    directives = [each for each in patch if isinstance(each, dict) and each.get("$patch") == "replace"]
    if not key or directives:
        return [each for each in patch if each not in directives]
    merged = list(current)
    for each in patch:
        if key not in each:
            raise BadPatch(f"map: {each} does not contain declared merge key: {key}")
        place = next((n for n, old in enumerate(merged) if old.get(key) == each[key]), None)
        if each.get("$patch") == "delete":
            if place is not None:
                del merged[place]
        elif place is None:
            merged.append(strategic_patch({}, each))
        else:
            merged[place] = strategic_patch(merged[place], each)
    return merged


def _merge_key(name: str, current: list[Any], patch: list[Any]) -> str:
    """Ports merge by containerPort in a container and by port in a service; the items tell which."""
    if name == "ports":
        sample = next((each for each in [*current, *patch] if isinstance(each, dict)), {})
        return "containerPort" if "containerPort" in sample else "port"
    return _MERGE_KEYS.get(name, "")


def _ordered(merged: Object, patch: Object) -> Object:
    """kubectl tells the wanted order of a list's items in `$setElementOrder/NAME`; items it does not know go last."""
    for directive, order in patch.items():
        name = directive.partition("/")[2]
        if not directive.startswith("$setElementOrder/") or not isinstance(merged.get(name), list):
            continue
        key = _merge_key(name, merged[name], order)
        ranks = {str(each.get(key) if isinstance(each, dict) else each): n for n, each in enumerate(order)}
        merged[name] = sorted(
            merged[name],
            key=lambda each: ranks.get(str(each.get(key) if isinstance(each, dict) else each), len(ranks)),
        )
    return merged


def json_patch(target: Any, operations: Any) -> Any:
    """RFC 6902; raises `BadPatch` naming the operation that failed."""
    if not isinstance(operations, list):
        raise BadPatch("a JSON patch is a list of operations")
    result = copy.deepcopy(target)
    for number, operation in enumerate(operations):
        try:
            result = _operate(result, operation)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadPatch(f"operation {number} ({operation!r}) failed: {error}") from error
    return result


def _operate(root: Any, operation: Object) -> Any:
    path = _pointer(operation["path"])
    match operation["op"]:
        case "add":
            return _add(root, path, copy.deepcopy(operation["value"]))
        case "remove":
            return _remove(root, path)
        case "replace":
            if not path:
                return copy.deepcopy(operation["value"])
            _find(root, path)
            return _add(_remove(root, path), path, copy.deepcopy(operation["value"]))
        case "test":
            if _find(root, path) != operation["value"]:
                raise ValueError(f"test failed: {operation['path']} is {_find(root, path)!r}")
            return root
        case "move":
            source = _pointer(operation["from"])
            moved = _find(root, source)
            return _add(_remove(root, source), path, moved)
        case "copy":
            return _add(root, path, copy.deepcopy(_find(root, _pointer(operation["from"]))))
        case other:
            raise ValueError(f"unknown operation {other!r}")


def _pointer(text: str) -> list[str]:
    if text and not text.startswith("/"):
        raise ValueError(f"path {text!r} does not start with /")
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _find(root: Any, path: list[str]) -> Any:
    for part in path:
        root = root[_index(part, len(root) - 1)] if isinstance(root, list) else root[part]
    return root


def _index(part: str, highest: int) -> int:
    number = int(part)
    if not 0 <= number <= highest:
        raise IndexError(f"index {number} is out of bounds")
    return number


def _add(root: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    parent, last = _find(root, path[:-1]), path[-1]
    if isinstance(parent, list):
        parent.insert(len(parent) if last == "-" else _index(last, len(parent)), value)
    else:
        parent[last] = value
    return root


def _remove(root: Any, path: list[str]) -> Any:
    parent, last = _find(root, path[:-1]), path[-1]
    if isinstance(parent, list):
        del parent[_index(last, len(parent) - 1)]
    else:
        del parent[last]
    return root
