"""The demonstration's verdict: which incident was which injection, and what counts as the same, bit for bit."""

from __future__ import annotations

import math

import pytest

from manifests import a_manifest
from mend.demo.play import DemoFailed, plans
from mend.demo.verdict import broken_promises, curves_agree, matched, weights_agree
from mend.demo.watch import Harm, Injection
from mend.heartbeats import Point
from mend.incidents import FailureClass, IncidentKind, IncidentRecord, Tier
from mend.journal import CurvePoint
from mend.manifest import Chunk, Manifest, TensorEntry


def incident(kind: IncidentKind, number: int, detected_at: float, rank: int) -> IncidentRecord:
    """An incident that was recovered from two seconds after it was noticed."""
    return IncidentRecord(
        id=number,
        kind=kind,
        failure=FailureClass.INFRASTRUCTURE,
        attempt=number,
        step=10,
        culprit_ranks=(rank,),
        began_at=detected_at - 1.0,
        detected_at=detected_at,
        recovered_at=detected_at + 2.0,
        steps_lost=3,
        tier=Tier.RESTART_RANKS,
    )


def curve(*losses: float, attempt: int = 1, first: int = 0) -> list[CurvePoint]:
    """Points of one attempt, from step `first` on."""
    return [
        CurvePoint(attempt=attempt, point=Point(step=step, loss=loss, tokens=0, seconds=0.1))
        for step, loss in enumerate(losses, start=first)
    ]


def manifest(digest: str) -> Manifest:
    """A checkpoint with one tensor."""
    chunk = Chunk(offsets=(0,), sizes=(4,), key="__0_0.distcp", start_byte=64, length_bytes=16, digest=digest)
    weight = TensorEntry(dtype="float32", shape=(4,), chunks=(chunk,))
    return a_manifest(step=9, tokens=10, tensors={"model.weight": weight})


EQUAL = (manifest("a"), manifest("a"))


def test_an_incident_is_measured_from_its_injection() -> None:
    """Seconds count from the signal that was sent, not from when the fault is thought to have begun."""
    shown = matched([incident(IncidentKind.CRASHED, 1, 100.0, rank=2)], [Injection(Harm.CRASH, 2, 9, at=99.75)])
    assert (shown[0].injected_rank, shown[0].detect_seconds, shown[0].recover_seconds) == (2, 0.25, 2.25)


def test_an_incident_that_nobody_injected_says_so() -> None:
    """One of another kind, or noticed before the injection, belongs to none."""
    injections = [Injection(Harm.HANG, 1, 9, at=150.0)]
    shown = matched([incident(IncidentKind.CRASHED, 1, 160.0, 1), incident(IncidentKind.HUNG, 2, 140.0, 1)], injections)
    assert [each.injected_rank for each in shown] == [None, None]


def test_one_injection_explains_one_incident() -> None:
    """The second crash in a row is not excused by the first injection."""
    crashes = [incident(IncidentKind.CRASHED, 1, 100.0, 2), incident(IncidentKind.CRASHED, 2, 110.0, 2)]
    shown = matched(crashes, [Injection(Harm.CRASH, 2, 9, at=99.9)])
    assert [each.injected_rank for each in shown] == [2, None]


def test_curves_agree_only_bit_for_bit() -> None:
    """The last bit of one loss, in whichever attempt, is a difference; so is a step that is missing."""
    calm = curve(3.0, 2.0, 1.0)
    broken = [*curve(3.0, 2.0), *curve(2.0, 1.0, attempt=2, first=1)]
    assert curves_agree(broken, calm, 3) == (3, [])
    off = math.nextafter(2.0, 3.0)
    assert curves_agree([*curve(3.0, off), *curve(2.0, 1.0, attempt=2, first=1)], calm, 3)[1] == [1]
    assert curves_agree(broken[:2], calm, 3)[1] == [2]
    assert curves_agree(broken, calm[:2], 3)[1] == [2]


def test_weights_agree_by_their_digests() -> None:
    """One byte in one tensor is another digest."""
    assert weights_agree(manifest("a"), manifest("a"))
    assert not weights_agree(manifest("a"), manifest("b"))


def test_harm_that_was_never_done_is_a_broken_promise() -> None:
    """A run that ends before it was harmed has shown nothing, however well its curves agree."""
    crash, hang = plans(120)
    done = [Injection(crash.harm, crash.rank, crash.step, at=100.0)]
    shown = matched([incident(IncidentKind.CRASHED, 1, 100.2, crash.rank)], done)
    assert broken_promises([crash], done, shown, [], EQUAL) == []
    assert broken_promises([crash, hang], done, shown, [], EQUAL) == [
        "the hang of rank 1 after step 75 was not done: the run ended before"
    ]
    assert len(broken_promises([crash, hang], [], [], [], EQUAL)) == 2


def test_what_was_done_must_be_noticed_and_blamed_on_who_did_it() -> None:
    """Harm without an incident, another culprit, another loss and other weights are broken promises each."""
    harm = Injection(Harm.HANG, 1, 9, at=100.0)
    blamed_another = matched([incident(IncidentKind.HUNG, 1, 101.0, rank=3)], [harm])
    assert broken_promises([], [harm], [], [], EQUAL) == ["the hang of rank 1 was not noticed"]
    said = broken_promises([], [harm], blamed_another, [4, 5], (manifest("a"), manifest("b")))
    assert said[0] == "rank 1 was harmed, but blamed was (3,)"
    assert [each.split()[1] for each in said[1:]] == ["loss", "weights"]


@pytest.mark.parametrize("steps", [40, 50, 99, 120, 1000])
def test_harm_is_done_between_two_saves_and_before_the_end(steps: int) -> None:
    """Both happen after a first save, at different steps, with steps left in which the run is back."""
    crash, hang = plans(steps)
    assert 10 < crash.step < hang.step < steps - 5
    assert crash.step % 10 == hang.step % 10 == 5


def test_too_few_steps_are_refused_with_the_least_that_will_do() -> None:
    """A demonstration that could not harm its run never begins."""
    with pytest.raises(DemoFailed, match="--steps: got 3; expected at least 40"):
        plans(3)
