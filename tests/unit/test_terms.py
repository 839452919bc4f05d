"""What must stay the same in a run is held against the checkpoint, and every difference is named."""

from __future__ import annotations

import pytest

from mend_trainer.misfit import StateMisfit
from mend_trainer.terms import Terms


def test_the_same_terms_pass_in_silence() -> None:
    """Numbers that came through JSON are the same numbers."""
    Terms({"heads": 4, "rate": 0.1}).load_state_dict(Terms({"rate": 0.1, "heads": 4}).state_dict())


def test_all_differences_are_named_at_once() -> None:
    """Changed, new and gone ones, with both values and the remedy; trying again cannot help."""
    with pytest.raises(StateMisfit) as caught:
        Terms({"heads": 4, "new": 1, "same": 0}).load_state_dict({"heads": 2, "old": "x", "same": 0})
    assert str(caught.value).splitlines()[1:] == [
        "  heads: 2 in the checkpoint, 4 here",
        "  new: nothing in the checkpoint, 1 here",
        "  old: 'x' in the checkpoint, nothing here",
        "Set them back, or start a new run under another checkpoint prefix.",
    ]
    assert caught.value.mend_fatal


def test_a_change_on_purpose_is_accepted() -> None:
    """By its name, and no other with it."""
    terms = Terms({"base": 500, "heads": 4}, accept=["base"])
    terms.load_state_dict({"base": 10, "heads": 4})
    with pytest.raises(StateMisfit, match="heads: 2 in"):
        terms.load_state_dict({"base": 10, "heads": 2})
