"""The user's own rules of recovery (spec.recovery.rules), parsed once, in the manner of a Job's podFailurePolicy."""

from __future__ import annotations

import re
from enum import StrEnum

import msgspec

from mend.fields import Fields
from mend.patterns import problem_of

MAX_RULES = 20
MAX_VALUES = 64  # of one list in a rule
MAX_PATTERN = 256  # characters

_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_. ]{0,61}[A-Za-z0-9])?")
_WORD = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_./]{0,99}")
_BUDGET = re.compile("user|infrastructure|hang|preemption")
_MATCHERS = ("onExitCodes", "onReasons", "onNodeConditions", "onLogPattern")


class RuleAction(StrEnum):
    """What a rule asks for."""

    RESTART = "Restart"  # restart the ranks in place
    REPLACE_WORKER = "ReplaceWorker"
    EXCLUDE_NODE = "ExcludeNode"
    IGNORE = "Ignore"  # recover as usual, and draw on no budget
    FAIL_RUN = "FailRun"


class _Facts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Immutable and encodable, as all of the spec."""


class ExitCodes(_Facts, frozen=True, kw_only=True):
    """Codes that one of the culprits must have exited with (In), or with any other but 0 (NotIn)."""

    is_in: bool
    values: tuple[int, ...]


class NodeCondition(_Facts, frozen=True, kw_only=True):
    """A condition that the node of a culprit must have."""

    type: str
    status: str = "True"


class Rule(_Facts, frozen=True, kw_only=True):
    """An incident that answers to everything that is given here is dealt with by `action`."""

    name: str
    action: RuleAction
    exit_codes: ExitCodes | None = None
    reasons: tuple[str, ...] = ()
    node_conditions: tuple[NodeCondition, ...] = ()
    log_pattern: str | None = None
    budget: str | None = None  # the failure class that pays instead of the incident's own


def parse_rules(recovery: Fields) -> tuple[Rule, ...]:
    """The list in the field `rules`, in its order."""
    rules = [_rule(fields) for fields in recovery.objects("rules", at_most=MAX_RULES)]
    names = [rule.name for rule in rules]
    for name in {each for each in names if names.count(each) > 1}:
        recovery.problem("rules", name, "a name of its own for every rule", "events tell rules apart by their names")
    return tuple(rules)


def _rule(fields: Fields) -> Rule:
    expected = ", ".join(RuleAction)
    word = fields.text("action", None, re.compile("|".join(RuleAction)), f"one of {expected}")
    rule = Rule(
        name=fields.text("name", None, _NAME, "up to 63 letters, digits, blanks and -_."),
        action=RuleAction(word) if word in list(RuleAction) else RuleAction.IGNORE,
        exit_codes=_exit_codes(fields),
        reasons=fields.words("onReasons", _WORD, "a reason such as OOMKilled, or an incident's kind", MAX_VALUES),
        node_conditions=tuple(map(_node_condition, fields.objects("onNodeConditions", at_most=MAX_VALUES))),
        log_pattern=_log_pattern(fields),
        budget=fields.optional_text("budget", _BUDGET, "one of user, infrastructure, hang, preemption"),
    )
    if not any(fields.has(field) for field in _MATCHERS):
        remedy = "a rule without any would answer to every incident"
        fields.problem("onExitCodes", None, f"one of {', '.join(_MATCHERS)} at least", remedy)
    fields.done()
    return rule


def _exit_codes(fields: Fields) -> ExitCodes | None:
    if not fields.has("onExitCodes"):
        return None
    codes = fields.child("onExitCodes")
    operator = codes.text("operator", None, re.compile("In|NotIn"), "In or NotIn")
    values = codes.integers("values", at_least=0, at_most=255, most=MAX_VALUES)
    if operator == "In" and 0 in values:
        codes.problem("values", 0, "codes of failures", "0 is success")
    codes.done()
    return ExitCodes(is_in=operator == "In", values=values)


def _node_condition(fields: Fields) -> NodeCondition:
    condition = NodeCondition(
        type=fields.text("type", None, _WORD, "the type of a node's condition, such as KernelDeadlock"),
        status=fields.text("status", "True", re.compile("True|False|Unknown"), '"True", "False" or Unknown'),
    )
    fields.done()
    return condition


def _log_pattern(fields: Fields) -> str | None:
    pattern = fields.optional_text("onLogPattern", re.compile(r"(?s).+"), "a regular expression (RE2)")
    if pattern is None:
        return None
    if len(pattern) > MAX_PATTERN:
        fields.problem("onLogPattern", pattern, f"at most {MAX_PATTERN} characters")
        return None
    if why := problem_of(pattern):
        fields.problem("onLogPattern", pattern, "a regular expression in RE2's dialect", why)
        return None
    return pattern
