"""The schema of a custom resource: prune, default and validate in the order in which Kubernetes does."""

from __future__ import annotations

from typing import Any

from mend_local.failures import Cause
from mend_local.rules import RuleTree, compile_rules
from mend_local.structural import fill_defaults, prune
from mend_local.validation import validate

Object = dict[str, Any]
_META = ("apiVersion", "kind", "metadata")
_BLOCKING = {"FieldValueRequired", "FieldValueTooLong", "FieldValueTooMany", "FieldValueTypeInvalid"}
_NOT_ASKED = Cause(
    "<nil>",
    "FieldValueInvalid",
    'Invalid value: "null": some validation rules were not checked because the object was invalid; '
    "correct the existing errors to complete validation",
)


class Schema:
    """One compiled openAPIV3Schema; raises `rules.BadRule` if a CEL rule does not compile."""

    def __init__(self, raw: Object) -> None:
        self.raw = raw
        self._checked = {**raw, "properties": _without_meta(raw)}
        self._rules: RuleTree | None = compile_rules(raw)

    def admit(self, value: Object) -> tuple[Object, list[str]]:
        """The object pruned and defaulted, and the paths of the fields that were dropped as unknown."""
        pruned, unknown = prune(value, self.raw, root=True)
        return fill_defaults(pruned, self.raw), unknown

    def problems(self, value: Object, old: Object | None) -> list[Cause]:
        """Everything that is wrong with an object; rules are asked only if it has the shape that they count on."""
        found = list(validate(value, self._checked))
        if self._rules is None:
            return found
        if any(cause.reason in _BLOCKING for cause in found):
            return [*found, _NOT_ASKED]
        return [*found, *(self._rules.check(value, old) if old is not None else self._rules.check(value))]


def _without_meta(raw: Object) -> Object:
    """Metadata is checked by the server itself, not by the definition's schema."""
    return {name: part for name, part in (raw.get("properties") or {}).items() if name not in _META}
