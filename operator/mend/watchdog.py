"""Pure: how long a rank may go without progress before the gang counts as hung, and before time alone is proof enough.

Two spans, both counted from the last mark. At the *limit* the gang counts as hung: the incident is noted and evidence
gathered, which harms nobody, so the limit is tight. Ranks are only killed once the evidence holds the kernel's own word
(a process that is stopped or dead), or once *patience* has run out, which is longer than the pauses that healthy runs
are known to make, and about as long as the cure costs. benchmarks/false_alarms.py holds both against a million hours of
simulated ranks.

How long to bear a pause of which nothing is known is the ski-rental problem (Karlin, Manasse, Rudolph and Sleator,
"Competitive snoopy caching", 1988): who waits for as long as the cure costs pays at most twice what he would have paid,
had he known. Who is wrong again and again, since his run makes longer pauses by design, waits twice as long each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, assert_never

from msgspec.structs import replace

from mend.heartbeats import Phase, RankReport
from mend.learnt import StepTimes
from mend.spec import Limits
from mend.status import LimitInForce

ENOUGH_STEPS = 8
EARLY_STEPS_ALLOWED = 10.0  # of the longest, while samples are few, and of the longest gap in a phase
HIGH_SHARE = 0.75
HIGH_SIGMAS = 0.6745  # how many sigmas the upper quartile lies above the median, were the steps normal

# What a way back costs, roughly, on a busy machine: ranks that stay, or new processes and steps done twice
# (benchmarks/recovery.py: half a second and less where nothing else runs).
REJOIN_SECONDS, RESTART_SECONDS = 0.75, 2.0
MEASURED_RANKS, RANKS_POWER = 8, 0.4  # the longest pause of n ranks, Pareto with alpha 2.5, grows as n^0.4
MOST_PAUSE_SECONDS = 60.0

STEPS_TO_LIMIT, SPREADS_TO_LIMIT, PEAKS_TO_LIMIT = 1.6, 3.5, 1.12
STEPS_OF_PATIENCE, SPREADS_OF_PATIENCE, PEAKS_OF_PATIENCE = 20.0, 15.0, 3.0
STEPS_FOR_THE_IDLE = 8.0  # with a rank of which nothing runs: a long step is computed, or read from a disk


class Bounds(NamedTuple):
    """Seconds without a mark: at `limit` the gang counts as hung, at `patience` ranks are killed for it."""

    limit: float
    patience: float


def pause_in_force(
    given_seconds: float | None, *, may_rejoin: bool, ranks: int = 1, learnt_seconds: float = 0.0, hangs: int = 0
) -> float:
    """Seconds beyond the limit before a rank is killed without proof.

    Of more ranks one is likelier to make a long pause, and their way back costs more. `learnt_seconds` are borne
    anyway, by what steps were like. All that twice as long for each of the `hangs` for which ranks were killed of late.
    """
    if given_seconds is not None:
        return given_seconds
    cost = REJOIN_SECONDS if may_rejoin else RESTART_SECONDS
    size: float = max(1.0, ranks / MEASURED_RANKS) ** RANKS_POWER
    doublings = min(hangs, 10)  # more than enough for the most
    return min(max(cost * size, learnt_seconds) * 2.0**doublings, MOST_PAUSE_SECONDS)


def step_bounds(times: StepTimes, limits: Limits, *, idle: bool = False) -> Bounds | None:
    """The bounds of a step, learnt from this attempt's steps; None before there are any.

    `idle`: whoever is to blame has been seen to do nothing at all.

    Robust against the long tails of step times: the median, the spread between it and the upper quartile (design
    section 5 asks for online quantiles), and the two peaks: steps that are rare and long by design have left the sample
    when the next one comes. For the limit, which may be wrong at no cost, what happened once was chance.
    """
    ordered = times.ordered
    if not ordered:
        return None
    if max(len(ordered), times.steps) < ENOUGH_STEPS:
        limit = EARLY_STEPS_ALLOWED * ordered[-1]
        return _bounded(limit, limit, limits, limits.ceiling_seconds)
    middle = times.median
    sigma = (ordered[int(HIGH_SHARE * len(ordered))] - middle) / HIGH_SIGMAS
    peak, habit = (each * middle for each in times.peaks)
    limit = max(STEPS_TO_LIMIT * middle, middle + SPREADS_TO_LIMIT * sigma, PEAKS_TO_LIMIT * habit)
    steps = STEPS_FOR_THE_IDLE if idle else STEPS_OF_PATIENCE
    patience = max(steps * middle, middle + SPREADS_OF_PATIENCE * sigma, PEAKS_OF_PATIENCE * peak)
    return _bounded(limit, patience, limits, limits.ceiling_seconds)


def _bounded(limit: float, patience: float, limits: Limits, most: float) -> Bounds:
    """Between the floor and `most`, and patience never within a pause of the limit."""
    limit = min(max(limit, limits.floor_seconds), most)
    pause = pause_in_force(limits.pause_seconds, may_rejoin=True)
    return Bounds(limit, min(max(patience, limit + pause), most))


def learnt_pause(times: StepTimes, limits: Limits, *, idle: bool = False) -> float:
    """Seconds beyond the limit that are borne by what was learnt of steps alone; 0 before there are any."""
    learnt = step_bounds(times, replace(limits, pause_seconds=0.0), idle=idle)
    return learnt.patience - learnt.limit if learnt is not None else 0.0


def bounds_for(rank: RankReport, times: StepTimes, limits: Limits, *, idle: bool = False) -> Bounds:
    """Seconds that this rank may go without a mark in the phase that it is in."""
    match rank.phase:
        case Phase.STARTING | Phase.LOADING:
            return _given(limits.start_seconds)
        case Phase.SAVING:
            return _learnt_from_gaps(rank.phase, times, limits, limits.saving_seconds)
        case Phase.EVALUATING:
            return _learnt_from_gaps(rank.phase, times, limits, limits.evaluating_seconds)
        case Phase.EXITING:
            return _given(limits.saving_seconds)
        case Phase.DATA | Phase.STEP | Phase.COLLECTIVE:
            learnt = step_bounds(times if times.seconds else _last_step(rank), limits, idle=idle)
            return _given(limits.first_step_seconds) if learnt is None or not rank.steps_done else learnt
        case never:
            assert_never(never)


def _given(seconds: float) -> Bounds:
    return Bounds(seconds, seconds)


def _learnt_from_gaps(phase: Phase, times: StepTimes, limits: Limits, most: float) -> Bounds:
    """Ten times the longest time between two marks that this phase has ever had in the run; `most` before the first."""
    seen = times.longest_gaps.get(phase)
    if seen is None:
        return _given(most)
    limit = EARLY_STEPS_ALLOWED * seen
    return _bounded(limit, limit, limits, most)


def _last_step(rank: RankReport) -> StepTimes:
    """What a controller knows that has only just come: the rank's last step, unless it was the long first one."""
    return StepTimes(seconds=(rank.step_seconds,) if rank.steps_done > 1 and rank.step_seconds > 0 else ())


def until_bounds(ranks: Iterable[RankReport], times: StepTimes, limits: Limits, *, idle: bool = False) -> Bounds | None:
    """Seconds until the gang counts as hung, and until patience with it runs out; zero or less: it is so now.

    The whole gang must be overdue, each rank by the bounds of its own phase: one rank that saves or evaluates explains
    why the others wait. None without living ranks. Ranks are in few phases at a time, so each is looked up once.
    """
    known: dict[tuple[Phase, bool], Bounds] = {}
    limit = patience = -math.inf
    for rank in ranks:
        if rank.exit is not None:
            continue
        key = (rank.phase, rank.steps_done > 0)
        if (bounds := known.get(key)) is None or not times.seconds:
            bounds = known[key] = bounds_for(rank, times, limits, idle=idle)
        limit = max(limit, bounds.limit - rank.progress_seconds)
        patience = max(patience, bounds.patience - rank.progress_seconds)
    return None if limit == -math.inf else Bounds(limit, patience)


def in_force(times: StepTimes, limits: Limits) -> tuple[LimitInForce, ...]:
    """The bounds that hold for a rank that has made its first step, with what they come from."""
    trained = RankReport(rank=0, pid=0, steps_done=1)
    found = [_shown(replace(trained, phase=Phase.STEP), times, limits, len(times.seconds), times.median)]
    found += [
        _shown(replace(trained, phase=phase), times, limits, int(phase in times.longest_gaps))
        for phase in (Phase.SAVING, Phase.EVALUATING)
    ]
    return tuple(found)


def _shown(rank: RankReport, times: StepTimes, limits: Limits, samples: int, median: float = 0.0) -> LimitInForce:
    bounds = bounds_for(rank, times, limits)
    longest = times.peaks[0] * median if median else times.longest_gaps.get(rank.phase)
    return LimitInForce(
        phase=rank.phase,
        limit_seconds=round(bounds.limit, 3),
        patience_seconds=round(bounds.patience, 3),
        samples=samples,
        median_seconds=round(median, 4) if median else None,
        longest_seconds=round(longest, 4) if longest else None,
    )
