"""What an attempt teaches as it goes: how long its steps take, who works how long on them, where the loss lies."""

from __future__ import annotations

from functools import cached_property

from mend.facts import Fact
from mend.heartbeats import Phase


class StepTimes(Fact, frozen=True, kw_only=True, dict=True):  # a __dict__ for what is found out once
    """What is learnt about this attempt's steps: a bounded sample of their lengths in seconds, newest last."""

    seconds: tuple[float, ...] = ()
    peaks: tuple[float, float] = (
        1.0,
        1.0,
    )  # the two longest, in medians of their time; they fade over thousands of steps
    longest_gaps: dict[Phase, float] = {}  # seconds between two marks of any rank, by phase
    steps: int = 0  # heard of, as far as it matters: more than the sample where several fit between two heartbeats

    @property
    def median(self) -> float:
        """Of the sample; 0.0 without one."""
        return self.ordered[len(self.ordered) // 2] if self.seconds else 0.0

    @cached_property
    def ordered(self) -> tuple[float, ...]:
        """The sample, shortest first."""
        return tuple(sorted(self.seconds))


class Pace(Fact, frozen=True, kw_only=True):
    """Seconds that a rank worked on a step, without its waits for others, in each of its newest rounds, newest last."""

    rank: int
    worker: int
    seconds: tuple[float, ...]


class LossStanding(Fact, frozen=True, kw_only=True):
    """How the newest loss of this attempt lies against the points before it."""

    step: int
    loss: float
    median: float  # of the window before the first of those above
    bound: float  # beyond which a point is above
    deviations: float  # between loss and median, of the window's own
    above: int = 0  # newest points in a row
    above_since_step: int | None = None  # step of the first of them
    above_seconds: float = 0.0  # that their steps took
