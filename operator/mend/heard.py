"""What heartbeats mean to a controller: which differences are worth waking up for, and how long steps take. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import Final

from mend.heartbeats import LOSS, AgentState, Heartbeat, Phase, Point, RankReport
from mend.learnt import StepTimes
from mend.status import Evaluation
from mend.watchdog import ENOUGH_STEPS

SAMPLES: Final = 64
EVALUATIONS: Final = 128  # of each metric, the newest: a checkpoint that one speaks for may be long in coming
PEAK_KEPT: Final = 0.9999  # of the peak's excess, at each step: half of it is forgotten after some 7,000


def is_stale(old: Heartbeat | None, new: Heartbeat) -> bool:
    """Whether `new` is older than `old`, as told by the same agent: attempts and sequences only grow."""
    if old is None or old.agent_id != new.agent_id:
        return False
    return new.attempt < old.attempt or new.sequence < old.sequence


def is_news(old: Heartbeat | None, new: Heartbeat) -> bool:
    """Whether somebody should look: anything but the usual growth of steps and ages, and snapshot after snapshot."""
    if old is None:
        return True
    if (
        old.agent_id != new.agent_id
        or old.attempt != new.attempt
        or old.state is not new.state
        or old.terminating != new.terminating
        or old.restored != new.restored
        or old.quarantined != new.quarantined
        or old.standbys_ready != new.standbys_ready
        or old.store_port != new.store_port
        or old.saver_port != new.saver_port
        or old.memory != new.memory
        or len(old.ranks) != len(new.ranks)
    ):
        return True
    if old.save is not new.save and _saved(old) != _saved(new):
        return True
    if old.pending != new.pending and not _trains(new):  # a launch may wait for it
        return True
    return any(map(_rank_has_news, old.ranks, new.ranks))


def _trains(beat: Heartbeat) -> bool:
    return beat.state is AgentState.RUNNING and all(rank.exit is None for rank in beat.ranks)


def _saved(beat: Heartbeat) -> object:
    return (beat.save.committed, beat.save.failures) if beat.save else (None, 0)


def _rank_has_news(old: RankReport, new: RankReport) -> bool:
    """A death, an error, another process, a loss that is no number, or the first step of this attempt."""
    return (
        new.pid != old.pid
        or (new.exit is None) != (old.exit is None)
        or (new.error is None) != (old.error is None)
        or new.nonfinite != old.nonfinite
        or (new.steps_done > 0) != (old.steps_done > 0)
    )


class StepSamples:
    """Lengths of the newest steps of one attempt, one for each step of the gang, whichever rank tells it first.

    The first step of a process is left out: it compiles, allocates and warms caches. Beside the newest, two peaks are
    kept: a step that is long by design, say every thousandth, has left the sample when the next one comes; of the first
    few steps, in which caches are still warmed and standbys born, no peak is taken. The longest
    gaps between marks in the other phases, which come too rarely to be learnt anew each time, are kept from attempt to
    attempt.
    """

    def __init__(self, attempt: int = 0, earlier: StepSamples | None = None) -> None:
        self.attempt = attempt
        self._steps_done = 1
        self._steps = 0  # that were heard of
        self._longest_gaps: dict[Phase, float] = dict(earlier._longest_gaps) if earlier is not None else {}
        self._seconds: deque[float] = deque(maxlen=SAMPLES)
        self._ordered: list[float] = []
        self._peaks = (1.0, 1.0)
        self._times: StepTimes | None = None  # what was told last, while nothing is new

    def add(self, heartbeat: Heartbeat) -> None:
        """Learns from the ranks of one worker; other attempts are ignored."""
        if heartbeat.attempt != self.attempt:
            return
        for rank in heartbeat.ranks:
            for phase, seconds in rank.longest_gaps.items():
                self.gap(phase, seconds)
            if rank.steps_done > self._steps_done:
                # What a controller that has only just come did not hear teaches it nothing.
                steps = rank.steps_done - self._steps_done if self._seconds else 1
                self._steps_done = rank.steps_done
                if rank.step_seconds > 0.0:
                    self.learn(rank.step_seconds, steps)

    def gap(self, phase: Phase, seconds: float) -> None:
        """Two marks of a rank in this phase were so far apart."""
        if seconds > self._longest_gaps.get(phase, 0.0):
            self._longest_gaps[phase], self._times = seconds, None

    def learn(self, seconds: float, steps: int = 1) -> None:
        """A step of the gang took so long, the last of so many since what was learnt before."""
        newest, ordered = self._seconds, self._ordered
        if len(newest) == SAMPLES:
            del ordered[bisect_left(ordered, newest[0])]
        newest.append(seconds)
        insort(ordered, seconds)
        if self._steps >= ENOUGH_STEPS:
            self._peaks = _with_peak(self._peaks, seconds / ordered[(len(ordered) - 1) // 2])
        self._steps += steps
        self._times = None

    def times(self) -> StepTimes:
        """What was learnt so far, newest last."""
        if self._times is None:
            self._times = StepTimes(
                seconds=tuple(self._seconds),
                peaks=self._peaks,
                longest_gaps=dict(self._longest_gaps),
                steps=min(self._steps, ENOUGH_STEPS),
            )
        return self._times


class Evaluations:
    """The newest evaluations of one attempt, by metric: points of any other name than the loss's."""

    def __init__(self, attempt: int = 0) -> None:
        self.attempt = attempt
        self._told: dict[str, deque[Evaluation]] = {}

    def add(self, points: Iterable[Point]) -> bool:
        """Whether there was a new one.

        An agent tells all of its attempt again to each new listener: what is not newer than what is known, is known.
        """
        news = False
        for point in points:
            if point.name == LOSS or point.loss is None:
                continue
            known = self._told.setdefault(point.name, deque(maxlen=EVALUATIONS))
            if not known or point.step > known[-1].step:
                known.append(Evaluation(name=point.name, attempt=self.attempt, step=point.step, value=point.loss))
                news = True
        return news

    def told(self, metric: str) -> tuple[Evaluation, ...]:
        """Of one metric, oldest first."""
        return tuple(self._told.get(metric, ()))


def _with_peak(peaks: tuple[float, float], ratio: float) -> tuple[float, float]:
    """The two largest ratios, after both have faded a little."""
    first, second = (1.0 + (peak - 1.0) * PEAK_KEPT for peak in peaks)
    if ratio > first:
        return ratio, first
    return first, max(second, ratio)
