"""The terms of a run: what must be the same in every attempt, although no tensor's shape would tell.

A checkpoint loads into a model with another number of heads or another base of its rotary frequencies without a word,
and an optimizer takes its options from the checkpoint, whatever the configuration says by then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mend_trainer.misfit import StateMisfit


class Terms:
    """A part of the bundle that is only compared; `accept` names the terms that are changed on purpose."""

    def __init__(self, terms: Mapping[str, Any], accept: Collection[str] = ()) -> None:
        """`terms` are plain values by the name that the user knows them by."""
        self._terms = dict(terms)
        self._accept = frozenset(accept)

    def state_dict(self) -> dict[str, Any]:
        """The terms, as they are now."""
        return dict(self._terms)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold the terms of a checkpoint against these; raises `StateMisfit` naming all that differ."""
        differing = [
            f"{name}: {_told(name, state)} in the checkpoint, {_told(name, self._terms)} here"
            for name in sorted(state.keys() | self._terms.keys())
            if name not in self._accept and _told(name, state) != _told(name, self._terms)
        ]
        if differing:
            raise StateMisfit(
                "the checkpoint was made on other terms:\n  " + "\n  ".join(differing) + "\n"
                "Set them back, or start a new run under another checkpoint prefix."
            )


def _told(name: str, terms: Mapping[str, Any]) -> str:
    return repr(terms[name]) if name in terms else "nothing"
