"""Limits that are learnt from long-tailed, paused, periodic and drifting steps never cry wolf: the short form.

The long form, over a million hours of ranks, is benchmarks/false_alarms.py, whose streams and code these are.
"""

from __future__ import annotations

import numpy as np
import pytest
from false_alarms import STREAMS, Draw, Tally, default_limits, phases, simulate

RANK_HOURS = 1_500.0
LIMITS = default_limits()


def simulated(draw: Draw) -> Tally:
    """What comes of one kind of stream; the seed is fixed, so that a failure can be looked at."""
    *_, tally = simulate(draw, RANK_HOURS, np.random.default_rng(7), LIMITS)
    return tally


@pytest.mark.parametrize("draw", STREAMS, ids=lambda draw: draw.__name__)
def test_no_rank_is_killed_for_a_pause(draw: Draw) -> None:
    """Whatever healthy steps are like, none is longer than patience, and few are longer than the limit."""
    tally = simulated(draw)
    assert tally.steps > 1_000
    assert tally.false_alarms == 0
    assert tally.pauses <= 0.001 * tally.steps


@pytest.mark.parametrize("draw", STREAMS[:5], ids=lambda draw: draw.__name__)
def test_a_hang_is_noticed_within_two_steps(draw: Draw) -> None:
    """At the median, from the fault to the heartbeat that shows it, where steps are not long by design."""
    tally = simulated(draw)
    assert float(np.median(tally.delays_in_steps)) <= 2.0


def test_saves_and_evaluations_are_borne() -> None:
    """Gaps between marks that vary by a factor of e^0.5 are within ten times the longest."""
    tally = phases(3, np.random.default_rng(7), LIMITS)
    assert tally.steps > 1_000
    assert tally.false_alarms == 0


def test_the_simulation_can_fail() -> None:
    """With pauses of half a minute in every hundredth step of impatient limits, false alarms are counted."""

    def stuttering(rng: np.random.Generator, gang: object, steps: int) -> np.ndarray:
        return np.where(rng.random(steps) < 0.01, 30.0, 0.5)

    *_, tally = simulate(stuttering, 100.0, np.random.default_rng(7), LIMITS)
    assert tally.false_alarms > 0
