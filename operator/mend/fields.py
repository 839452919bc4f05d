"""Reads the fields of a JSON object one by one and notes every problem with path, value, expectation and remedy."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

# Digits are counted: int() and timedelta() raise on absurd numbers, and \d would take other scripts' digits.
_DURATION = re.compile(r"(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?(?:([0-9]{1,9})ms)?")
_QUANTITY = re.compile(r"([1-9][0-9]{0,17})(k|M|G|T|Ki|Mi|Gi|Ti)?")
_BYTES = re.compile(r"[1-9][0-9]{0,8}(k|M|G|Ki|Mi|Gi)?")
_MOST_BYTES: Final = 2**62  # what is beyond goes into no message
_SIZES: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_INT32_MAX: Final = 2**31 - 1
_ABSENT: Final = object()


def parse_duration(text: str) -> timedelta | None:
    """'1h30m', '45s', '300ms' as Go and Kubernetes write them; None if it is none or zero."""
    found = _DURATION.fullmatch(text)
    if not found or not any(found.groups()):
        return None
    hours, minutes, seconds, milliseconds = (int(part or 0) for part in found.groups())
    length = timedelta(hours=hours, minutes=minutes, seconds=seconds, milliseconds=milliseconds)
    return length if length > timedelta(0) else None


def parse_bytes(text: str) -> int | None:
    """'500Mi', '2G', '1048576' as Kubernetes writes quantities of bytes; None if it is none, a fraction, or zero."""
    found = _QUANTITY.fullmatch(text)
    return min(int(found[1]) * _SIZES[found[2] or ""], _MOST_BYTES) if found else None


@dataclass(slots=True)
class Fields:
    """Reads the fields of one object, notes each problem with its full path, and what nobody asked for."""

    raw: Any
    path: str
    problems: list[str]  # shared with the children
    asked: set[str] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        if not isinstance(self.raw, Mapping):
            self.problems.append(f"{self.path}: got {shown(self.raw)}; expected an object")
            self.raw = {}

    def problem(self, field: str, value: Any, expected: str, remedy: str = "") -> None:
        """Note what is wrong with a field."""
        got = "missing" if value is _ABSENT else f"got {shown(value)}"
        self.problems.append(f"{self.path}.{field}: {got}; expected {expected}" + (f" ({remedy})" if remedy else ""))

    def take(self, field: str) -> Any:
        """The raw value, or `_ABSENT`; an explicit null is as good as absent, as in Kubernetes."""
        self.asked.add(field)
        value = self.raw.get(field, _ABSENT)
        return _ABSENT if value is None else value

    def child(self, field: str, *, required: bool = False) -> Fields:
        """The object in a field; an absent one reads as empty."""
        path, value = f"{self.path}.{field}", self.take(field)
        if value is _ABSENT and not required:
            value = {}
        if not isinstance(value, Mapping):
            self.problem(field, value, "an object")
            return Fields({}, path, [])  # its own gaps would only repeat this
        return Fields(value, path, self.problems)

    def mapping(self, field: str) -> dict[str, Any] | None:
        """A required object as it is; None if there is none."""
        value = self.take(field)
        if not isinstance(value, Mapping):
            self.problem(field, value, "an object")
            return None
        return dict(value)

    def integer(self, field: str, *, default: int | None = None, at_least: int, at_most: int = _INT32_MAX) -> int:
        """A whole number, by default up to the largest that Kubernetes counts with; required without `default`."""
        value = self.take(field)
        if value is _ABSENT and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
            most = f" and at most {at_most}" if isinstance(value, int) and value > at_least else ""
            self.problem(field, value, f"a whole number of at least {at_least}{most}")
            return default if default is not None else at_least
        return value

    def optional_integer(self, field: str, *, at_least: int) -> int | None:
        """A whole number, or None if absent."""
        return self.integer(field, at_least=at_least) if self.take(field) is not _ABSENT else None

    def boolean(self, field: str, default: bool) -> bool:
        """True or false."""
        value = self.take(field)
        if value is _ABSENT:
            return default
        if not isinstance(value, bool):
            self.problem(field, value, "true or false")
            return default
        return value

    def text(
        self, field: str, default: str | None, pattern: re.Pattern[str] | None = None, expected: str = "text"
    ) -> str:
        """A text that matches the whole pattern; required without `default`."""
        value = self.take(field)
        if value is _ABSENT and default is not None:
            return default
        if not isinstance(value, str) or (pattern and not pattern.fullmatch(value)):
            self.problem(field, value, expected)
            return default or ""
        return value

    def optional_text(self, field: str, pattern: re.Pattern[str], expected: str) -> str | None:
        """A text, or None if absent."""
        return self.text(field, None, pattern, expected) if self.take(field) is not _ABSENT else None

    def choice(self, field: str, default: str, choices: Sequence[str]) -> str:
        """One of a few words."""
        value = self.take(field)
        if value is _ABSENT:
            return default
        if value not in choices:
            self.problem(field, value, f"one of {', '.join(choices)}")
            return default
        return str(value)

    def seconds(self, field: str, default: str) -> float:
        """A duration above zero, in seconds."""
        value = self.text(field, default)
        length = parse_duration(value)
        if length is None:
            self.problem(field, value, f"a duration above zero such as {default!r}")
            length = parse_duration(default)
            assert length is not None
        return length.total_seconds()

    def optional_bytes(self, field: str) -> int | None:
        """A quantity of bytes above zero, or None if absent."""
        text = self.optional_text(field, _BYTES, "a quantity of bytes above zero such as '500Mi'")
        return parse_bytes(text) if text else None

    def has(self, field: str) -> bool:
        """Whether the field is there; to be asked for as if it were read."""
        return self.take(field) is not _ABSENT

    def objects(self, field: str, *, at_most: int) -> list[Fields]:
        """The objects of a list; an absent one reads as empty."""
        return [
            Fields(each, f"{self.path}.{field}[{n}]", self.problems)
            for n, each in enumerate(self._list(field, at_most))
        ]

    def words(self, field: str, pattern: re.Pattern[str], expected: str, at_most: int) -> tuple[str, ...]:
        """The texts of a list, each of which matches the whole pattern; an absent list reads as empty."""
        found = self._list(field, at_most)
        for n, each in enumerate(found):
            if not isinstance(each, str) or not pattern.fullmatch(each):
                self.problem(f"{field}[{n}]", each, expected)
        return tuple(each for each in found if isinstance(each, str))

    def integers(self, field: str, *, at_least: int, at_most: int, most: int) -> tuple[int, ...]:
        """The whole numbers of a list, of which there must be one at least and `most` at the most."""
        found = self._list(field, most)
        if not found:
            self.problem(field, found or None, "one whole number at least")
        sound = [each for each in found if isinstance(each, int) and not isinstance(each, bool)]
        for n, each in enumerate(found):
            if each not in sound or not at_least <= each <= at_most:
                self.problem(f"{field}[{n}]", each, f"a whole number from {at_least} to {at_most}")
        return tuple(sound)

    def _list(self, field: str, at_most: int) -> list[Any]:
        value = self.take(field)
        if value is _ABSENT:
            return []
        if not isinstance(value, list):
            self.problem(field, value, "a list")
            return []
        if len(value) > at_most:
            self.problem(field, f"{len(value)} entries", f"at most {at_most}")
        return value[:at_most]

    def done(self) -> None:
        """Every field that nobody asked for is a mistake; guess what was meant."""
        for field in self.raw:
            if field not in self.asked:
                close = difflib.get_close_matches(field, sorted(self.asked), n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(self.asked))}"
                self.problems.append(f"{self.path}.{field}: unknown field{hint}")


def shown(value: Any) -> str:
    """A value as a user would recognise it, cut to a line."""
    if value is _ABSENT or value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
