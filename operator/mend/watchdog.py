"""Pure: how long a rank may go without progress before the gang counts as hung."""

from __future__ import annotations

from statistics import median
from typing import assert_never

from mend.model import StepTimes
from mend.protocol import Phase, RankReport
from mend.spec import Limits

ENOUGH_SAMPLES = 8
STEPS_ALLOWED = 3.0
SPREADS_ALLOWED = 10.0
EARLY_STEPS_ALLOWED = 10.0
MAD_TO_SIGMA = 1.4826


def step_limit(times: StepTimes, limits: Limits) -> float | None:
    """Seconds without progress that a step may take, learnt from this attempt's steps; None before there are any.

    Robust against the long tails of step times: the median and the median absolute deviation, as design section 5
    asks. While samples are few, ten times the longest seen.
    """
    sample = times.seconds
    if not sample:
        return None
    if len(sample) < ENOUGH_SAMPLES:
        learnt = EARLY_STEPS_ALLOWED * max(sample)
    else:
        middle = median(sample)
        spread = MAD_TO_SIGMA * median(abs(each - middle) for each in sample)
        learnt = max(STEPS_ALLOWED * middle, middle + SPREADS_ALLOWED * spread)
    return min(max(learnt, limits.floor_seconds), limits.ceiling_seconds)


def limit_for(rank: RankReport, times: StepTimes, limits: Limits) -> float:
    """Seconds that this rank may go without a mark in the phase that it is in."""
    match rank.phase:
        case Phase.STARTING | Phase.LOADING:
            return limits.start_seconds
        case Phase.SAVING:
            return _learnt_from_gaps(rank.phase, times, limits.floor_seconds, limits.saving_seconds)
        case Phase.EVALUATING:
            return _learnt_from_gaps(rank.phase, times, limits.floor_seconds, limits.evaluating_seconds)
        case Phase.EXITING:
            return limits.saving_seconds
        case Phase.DATA | Phase.STEP | Phase.COLLECTIVE:
            learnt = step_limit(times if times.seconds else _last_step(rank), limits)
            return limits.first_step_seconds if learnt is None or not rank.steps_done else learnt
        case never:
            assert_never(never)


def _learnt_from_gaps(phase: Phase, times: StepTimes, least: float, most: float) -> float:
    """Ten times the longest time between two marks that this phase has ever had in the run; `most` before the first."""
    seen = times.longest_gaps.get(phase)
    return most if seen is None else min(max(EARLY_STEPS_ALLOWED * seen, least), most)


def _last_step(rank: RankReport) -> StepTimes:
    """What a controller knows that has only just come: the rank's last step, unless it was the long first one."""
    return StepTimes(seconds=(rank.step_seconds,) if rank.steps_done > 1 and rank.step_seconds > 0 else ())


def seconds_until_hung(ranks: tuple[RankReport, ...], times: StepTimes, limits: Limits) -> float | None:
    """Seconds until the gang counts as hung if nobody progresses; zero or less: it is. None without living ranks.

    The whole gang must be overdue, each rank by the limit of its own phase: one rank that saves or evaluates
    explains why the others wait.
    """
    alive = [rank for rank in ranks if rank.exit is None]
    if not alive:
        return None
    return max(limit_for(rank, times, limits) - rank.progress_seconds for rank in alive)
