"""The JSONPath of printer columns: fields, indices, slices, wildcards and equality filters."""

from __future__ import annotations

import re
from typing import Any

_STEP = re.compile(
    r"""\.(?P<field>(?:[^.\[\]\\]|\\.)+)
      | \[\?\(@\.(?P<key>[\w.-]+)\s*==\s*["'](?P<value>[^"']*)["']\)\]
      | \[['"](?P<quoted>[^'"]*)['"]\]
      | \[(?P<index>-?\d+)\]
      | \[(?P<start>-?\d*):(?P<end>-?\d*)\]
      | \[\*\]""",
    re.VERBOSE,
)


def find(root: Any, path: str) -> list[Any]:
    """Every value at a path such as `.status.conditions[?(@.type=="Ready")].status`; an absent one gives none."""
    found = [root]
    for step in _STEP.finditer(path):
        found = [inner for value in found for inner in _take(value, step)]
    return found


def _take(value: Any, step: re.Match[str]) -> list[Any]:
    field = step["quoted"] or (re.sub(r"\\(.)", r"\1", step["field"]) if step["field"] else None)
    if field is not None:
        return [value[field]] if isinstance(value, dict) and value.get(field) is not None else []
    if not isinstance(value, list):
        return []
    if step["index"] is not None:
        place = int(step["index"])
        return [value[place]] if -len(value) <= place < len(value) else []
    if step["start"] is not None:
        return value[slice(*(int(bound) if bound else None for bound in (step["start"], step["end"])))]
    if step["key"] is not None:
        return [each for each in value if isinstance(each, dict) and str(each.get(step["key"])) == step["value"]]
    return list(value)
