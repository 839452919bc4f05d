"""Regular expressions that users write: in RE2's dialect, which takes time linear in the text, whatever they write.

CEL brings RE2 with it, so a pattern means here what it means in the rules of a CRD. Python's own engine could be kept
busy for hours by one pattern, and with it the controller of everybody's runs.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any


@lru_cache(maxsize=256)
def problem_of(pattern: str) -> str:
    """What is wrong with a pattern, in RE2's words; "" if it is one."""
    found = _matched(pattern, "")
    return "" if isinstance(found, bool) else str(found).split(": ", 1)[-1]


def is_in(pattern: str, text: str) -> bool:
    """Whether the pattern is found anywhere in the text; one that is none is found nowhere."""
    return _matched(pattern, text) is True


def _matched(pattern: str, text: str) -> Any:
    """True or false; an error if the pattern is none."""
    return _expression().eval(data={"text": text, "pattern": pattern}).value()


@cache
def _expression() -> Any:
    """The compiled expression. Imported when first needed: few runs have rules, and every command would wait for it."""
    from cel_expr_python import cel

    variables = {"text": cel.Type.STRING, "pattern": cel.Type.STRING}
    return cel.NewEnv(variables=variables).compile("text.matches(pattern)")
