"""What counts as right in the campaign of faults: a judge that never says no would prove nothing."""

from __future__ import annotations

import pytest

from injection import KINDS, Expected, Outcome
from mend.incidents import FailureClass, Incident, IncidentKind, Verdict

RANK_3 = Expected(frozenset({IncidentKind.HUNG}), (3,))
NOBODY = Expected(frozenset({IncidentKind.HUNG}), ())
NOTHING = Expected(frozenset(), ())


def said(kind: IncidentKind, *ranks: int) -> Incident:
    """An incident that names these ranks."""
    return Incident(
        kind=kind,
        failure=FailureClass.HANG,
        attempt=1,
        ranks=(0, 1, 2, 3),
        workers=(),
        age_seconds=1.0,
        verdict=Verdict(ranks=ranks),
        summary="",
    )


@pytest.mark.parametrize(
    ("expected", "incident", "is_right", "blames_the_innocent"),
    [
        (RANK_3, said(IncidentKind.HUNG, 3), True, False),
        (RANK_3, said(IncidentKind.CRASHED, 3), False, False),
        (RANK_3, said(IncidentKind.HUNG, 2), False, True),
        (RANK_3, said(IncidentKind.HUNG, 2, 3), False, True),
        (RANK_3, said(IncidentKind.HUNG), False, False),
        (RANK_3, None, False, False),
        (NOBODY, said(IncidentKind.HUNG), True, False),
        (NOBODY, said(IncidentKind.HUNG, 0), False, True),
        (NOTHING, None, True, False),
        (NOTHING, said(IncidentKind.HUNG), False, False),
    ],
)
def test_only_the_exact_verdict_is_right(
    expected: Expected, incident: Incident | None, is_right: bool, blames_the_innocent: bool
) -> None:
    """The kind and every name must fit; nobody is a wrong answer where somebody did it, but blames no innocent."""
    outcome = Outcome(KINDS["stop"], 3, expected, incident, 1.0)
    assert (outcome.is_right, outcome.blames_the_innocent) == (is_right, blames_the_innocent)


def test_every_kind_says_how_it_is_done() -> None:
    """By a signal, by a request or from outside, and by one of these only."""
    for kind in KINDS.values():
        ways = [kind.signal is not None, bool(kind.request), kind.outside is not None]
        assert ways.count(True) == 1, kind
