"""CEL rules (x-kubernetes-validations): compiled once per definition, asked at every write.

Values are dynamically typed here, while Kubernetes types them by the schema; rules in base CEL mean the same in both.
The libraries that Kubernetes adds (quantity, url, regex find, ...) are not there: a definition using them is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cel_expr_python import cel

from mend_local.failures import Cause
from mend_local.validation import wrong

Raw = dict[str, Any]

_EXTENSION = "x-kubernetes-validations"
_REASONS = {"FieldValueInvalid", "FieldValueForbidden", "FieldValueRequired", "FieldValueDuplicate"}
_ABSENT: Any = object()
_FIELD_STEP = re.compile(r"\.([A-Za-z_]\w*)|\['([^']*)'\]")


class BadRule(ValueError):
    """A rule that does not compile."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One compiled rule; a transition rule (one that names oldSelf) holds only between two states."""

    expression: Any
    source: str
    message: str
    message_expression: Any | None
    reason: str
    field_path: str
    is_transition: bool

    def check(self, value: Any, old: Any, path: str) -> Cause | None:
        """What is wrong with `value`, if anything."""
        if self.is_transition and old is _ABSENT:
            return None
        bindings = {"self": value} if old is _ABSENT else {"self": value, "oldSelf": old}
        result = self.expression.eval(data=bindings)
        if result.type() == cel.Type.BOOL:
            return None if result.value() else self._cause(value, bindings, path)
        return wrong(path, value, f"rule evaluation error: {_one_line(result.value())}: {self.source}")

    def _cause(self, value: Any, bindings: Raw, path: str) -> Cause:
        message = self.message or f"failed rule: {self.source}"
        if self.message_expression is not None:
            told = self.message_expression.eval(data=bindings)
            if told.type() == cel.Type.STRING and told.value().strip():
                message = told.value()
        where = "".join(f".{dotted or bracketed}" for dotted, bracketed in _FIELD_STEP.findall(self.field_path))
        found = wrong((path + where).lstrip("."), value, message)
        if self.reason == "FieldValueRequired":
            return Cause(found.field, self.reason, f"Required value: {message}")
        if self.reason == "FieldValueForbidden":
            return Cause(found.field, self.reason, f"Forbidden: {message}")
        return Cause(found.field, self.reason, found.detail)


@dataclass(frozen=True, slots=True)
class RuleTree:
    """The rules of a schema, laid out like it; parts without any rule are left out."""

    rules: tuple[Rule, ...]
    properties: dict[str, RuleTree]
    items: RuleTree | None
    values: RuleTree | None  # of additionalProperties
    map_keys: tuple[str, ...]

    def check(self, value: Any, old: Any = _ABSENT, path: str = "") -> Iterator[Cause]:
        """Every rule that does not hold. Without `old` (a creation) transition rules are left out."""
        for rule in self.rules:
            if cause := rule.check(value, old, path):
                yield cause
        if isinstance(value, dict):
            before = old if isinstance(old, dict) else {}
            for name, inner in value.items():
                part = self.properties.get(name, self.values)
                if part is not None and inner is not None:
                    yield from part.check(inner, before.get(name, _ABSENT), f"{path}.{name}" if path else name)
        elif isinstance(value, list) and self.items is not None:
            for number, inner in enumerate(value):
                yield from self.items.check(inner, self._counterpart(inner, old), f"{path}[{number}]")

    def _counterpart(self, item: Any, old: Any) -> Any:
        """Items of a map list are compared with the old item of the same keys; those of other lists with nothing."""
        if not self.map_keys or not isinstance(old, list) or not isinstance(item, dict):
            return _ABSENT
        for each in old:
            if isinstance(each, dict) and all(each.get(key) == item.get(key) for key in self.map_keys):
                return each
        return _ABSENT


def compile_rules(schema: Raw, path: str = "") -> RuleTree | None:
    """All rules in a schema, or None if there are none; raises `BadRule` naming the place and the compiler's reason."""
    rules = tuple(_compile(raw, f"{path}.{_EXTENSION}[{n}]") for n, raw in enumerate(schema.get(_EXTENSION) or ()))
    properties = {}
    for name, part in (schema.get("properties") or {}).items():
        if tree := compile_rules(part, f"{path}.properties[{name}]"):
            properties[name] = tree
    items = compile_rules(schema["items"], f"{path}.items") if isinstance(schema.get("items"), dict) else None
    additional = schema.get("additionalProperties")
    values = compile_rules(additional, f"{path}.additionalProperties") if isinstance(additional, dict) else None
    if not (rules or properties or items or values):
        return None
    return RuleTree(rules, properties, items, values, tuple(schema.get("x-kubernetes-list-map-keys") or ()))


def _compile(raw: Raw, path: str) -> Rule:
    source = raw.get("rule", "")
    environment = cel.NewEnv(variables={"self": cel.Type.DYN, "oldSelf": cel.Type.DYN})
    message_source = raw.get("messageExpression")
    try:
        expression = environment.compile(source)
        message = environment.compile(message_source) if message_source else None
    except RuntimeError as error:  # what the CEL runtime raises for every compilation error
        raise BadRule(f"{path}.rule: compilation failed: {_one_line(error)} (in {source!r})") from error
    reason = raw.get("reason", "FieldValueInvalid")
    return Rule(
        expression=expression,
        source=source,
        message=raw.get("message", ""),
        message_expression=message,
        reason=reason if reason in _REASONS else "FieldValueInvalid",
        field_path=raw.get("fieldPath", ""),
        is_transition=bool(re.search(r"\boldSelf\b", source)),
    )


def _one_line(error: object) -> str:
    return str(error).splitlines()[0]
