"""The loss against its own past: what is a spike, and what is only noise, however wild."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import pytest

from mend.heartbeats import Point
from mend.learnt import LossStanding
from mend.losses import LossWatch
from mend.spec import LossSpike

RULE = LossSpike()


def points(losses: Iterable[float | None], first: int = 0) -> list[Point]:
    """A curve from step `first` on."""
    return [Point(step=first + n, loss=loss, tokens=0, seconds=0.5) for n, loss in enumerate(losses)]


def noisy(count: int, seed: int = 0, level: float = 3.0) -> list[float]:
    """A level curve with a normal noise of 1%."""
    chance = random.Random(seed)
    return [chance.gauss(level, level / 100) for _ in range(count)]


def standing(watch: LossWatch, attempt: int = 1) -> LossStanding:
    """Where the newest loss is."""
    found = watch.standing(attempt)
    assert found is not None
    return found


def watched(*curves: list[Point], rule: LossSpike = RULE, attempt: int = 1) -> LossWatch:
    """A watch that has heard these of one attempt."""
    watch = LossWatch()
    for curve in curves:
        watch.add(attempt, curve, rule)
    return watch


def test_a_loss_that_went_up_is_above_since_then() -> None:
    """The first step above is told exactly, and how far the newest lies above the median of before."""
    seen = standing(watched(points(noisy(400)), points(noisy(20, level=6.0), 400)))
    assert (seen.above, seen.above_since_step, seen.step) == (20, 400, 419)
    assert seen.median == pytest.approx(3.0, rel=0.01)
    assert seen.deviations == pytest.approx(100, rel=0.3)
    assert seen.above_seconds == 10.0


def test_little_is_said_of_a_short_past() -> None:
    """During the first window nothing is a spike: a run that has just begun may do anything."""
    watch = watched(points([3.0] * (RULE.window - 1)))
    assert watch.standing(1) is None
    watch.add(1, points([9.0, 9.0], RULE.window - 1), RULE)
    assert standing(watch).above == 1  # the first of them completed the window


def test_wild_points_are_noise_until_there_are_enough_in_a_row() -> None:
    """One good loss in between, and they were no spike; the past has learnt from them."""
    wild = points([*noisy(15, level=9.0), 3.0], 400)
    watch = watched(points(noisy(400)), wild)
    assert standing(watch).above == 0
    watch.add(1, points(noisy(15, level=9.0), 416), RULE)
    assert standing(watch).above == 15


def test_a_spike_stays_one_until_the_attempt_ends() -> None:
    """Also if the loss comes down again before anybody has looked: what was done to the weights is done."""
    watch = watched(points(noisy(400)), points(noisy(16, level=9.0), 400), points(noisy(50), 416))
    assert (standing(watch).above_since_step, standing(watch).above >= RULE.points) == (400, True)


def test_a_loss_that_hardly_varies_has_to_rise_by_a_share() -> None:
    """Without any noise a thousandth would be a thousand deviations."""
    calm = points([3.0] * 400)
    assert standing(watched(calm, points([3.5] * 50, 400))).above == 0
    assert standing(watched(calm, points([3.7] * 50, 400))).above == 50


def test_a_rising_share_alone_is_not_enough() -> None:
    """Where losses vary by a third, two thirds more is nothing."""
    chance = random.Random(1)
    loud = points([chance.gauss(3.0, 1.0) for _ in range(400)])
    assert standing(watched(loud, points([5.0] * 50, 400))).above == 0


def test_what_is_no_number_and_other_curves_are_passed_over() -> None:
    """NaN has a rule of its own, and an evaluation is another curve."""
    other = [Point(step=399, loss=99.0, tokens=0, seconds=0.0, name="eval_loss")] * 30
    seen = standing(watched(points(noisy(400)), other, points([None] * 30, 400)))
    assert (seen.above, seen.step) == (0, 399)


def test_an_attempt_that_begins_further_back_keeps_the_past_up_to_there() -> None:
    """So the same spike is seen again at once, not after another window; the steps that are done anew are forgotten."""
    watch = watched(points(noisy(400)), points(noisy(16, level=9.0), 400))
    watch.add(2, points(noisy(20, seed=1), 380), RULE)
    assert watch.standing(1) is None
    assert standing(watch, 2).above == 0
    watch.add(2, points(noisy(16, level=9.0), 400), RULE)
    assert (standing(watch, 2).above, standing(watch, 2).above_since_step) == (16, 400)


def test_what_comes_late_or_twice_changes_nothing() -> None:
    """Points of an attempt before, and all points once more when the stream is made anew."""
    curve = [*points(noisy(400)), *points(noisy(10, level=9.0), 400)]
    watch = watched(curve, attempt=2)
    before = standing(watch, 2)
    watch.add(1, points(noisy(500, level=50.0)), RULE)
    watch.add(2, curve, RULE)
    assert standing(watch, 2) == before


def test_another_rule_counts_anew() -> None:
    """From the points that come after it, against the past that there is."""
    watch = watched(points(noisy(400)), points(noisy(10, level=9.0), 400))
    strict = LossSpike(points=3)
    watch.add(1, points(noisy(3, level=9.0), 410), strict)
    assert (standing(watch).above, standing(watch).above_since_step) == (3, 410)


def heavy_tailed(chance: random.Random, steps: int) -> list[float]:
    """A falling curve whose noise is a Student's t of 2 to 4 degrees, carried on from step to step."""
    degrees, carried, spread = chance.choice((2, 3, 4)), chance.uniform(0.0, 0.8), chance.uniform(0.002, 0.05)
    start, end, noise, losses = chance.uniform(5.0, 11.0), chance.uniform(1.0, 3.0), 0.0, []
    for step in range(steps):
        chi = sum(chance.gauss(0, 1) ** 2 for _ in range(degrees))
        noise = carried * noise + chance.gauss(0, 1) / math.sqrt(max(chi, 1e-12) / degrees)
        level = end + (start - end) * math.exp(-step / (steps / 8))
        losses.append(max(0.01, level * (1 + spread * noise)))
    return losses


def test_no_false_alarm_in_falling_curves_with_heavy_tails() -> None:
    """A hundred runs of 2,000 steps, with single losses of twice the level among them: not one spike."""
    chance = random.Random(20)
    alarms, wildest = [], 0.0
    for number in range(100):
        losses = heavy_tailed(chance, 2_000)
        seen = standing(watched(points(losses)))
        wildest = max(wildest, max(losses[1_000:]) / seen.median)
        if seen.above >= RULE.points:
            alarms.append((number, seen))
    assert wildest > 2  # else the noise would prove nothing
    assert not alarms


def test_every_spike_in_such_curves_is_seen() -> None:
    """A loss that rises to three times the rule's bound, in the same noise: seen in every run, and since when."""
    chance = random.Random(21)
    for _ in range(50):
        at = chance.randrange(600, 1_500)
        losses = heavy_tailed(chance, 2_000)
        before = standing(watched(points(losses[:at])))
        rise = 3 * (before.bound - before.median)
        seen = standing(watched(points([loss + rise if step >= at else loss for step, loss in enumerate(losses)])))
        assert seen.above >= RULE.points
        assert seen.above_since_step is not None
        assert at - 3 <= seen.above_since_step <= at + 100  # a wild low one in the midst has it begin anew
