"""Pure: how often to save, from what a save costs and how often the run fails (Young 1974, Daly 2006).

Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974: sqrt(2 C M) for a cost of C
and a mean time between failures of M. Daly, A higher order estimate of the optimum checkpoint interval for restart
dumps, FGCS 22(3), 2006: the same with terms that matter where C is not small beside M.
"""

from __future__ import annotations

import math
from typing import Final

from msgspec.structs import replace

from mend.heartbeats import SaveReport
from mend.spec import Checkpointing
from mend.status import IntervalInForce, RunStatus

PRIOR_SECONDS: Final = 6 * 3600.0  # a run is taken for one that has failed once in this time before it began


def optimum(cost_seconds: float, between_failures_seconds: float) -> float:
    """Daly's estimate of the best interval in seconds, from the end of a save to the beginning of the next."""
    if cost_seconds >= 2 * between_failures_seconds:
        return between_failures_seconds
    ratio = cost_seconds / (2 * between_failures_seconds)
    young = math.sqrt(2 * cost_seconds * between_failures_seconds)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_seconds


def between_failures(failures: int, active_seconds: float) -> float:
    """The mean time between failures; one that never happened counts, so that a young run has one too."""
    return (active_seconds + PRIOR_SECONDS) / (failures + 1)


def interval_in_force(rules: Checkpointing, status: RunStatus, save: SaveReport | None) -> IntervalInForce | None:
    """The interval as of now; None unless the spec leaves it to mend. A measured cost holds until the next is."""
    if not rules.interval_auto:
        return None
    before = status.interval or IntervalInForce(seconds=rules.min_interval_seconds)
    told = save if save is not None and save.committed is not None else None
    cost = told.stall_seconds if told else before.cost_seconds
    commit = told.commit_seconds if told else before.commit_seconds
    ledger = status.ledger
    active = ledger.starting + ledger.productive + ledger.lost + ledger.detecting + ledger.recovering
    if cost is None:  # one early save, to know what it costs
        seconds = rules.min_interval_seconds
    else:
        # A save that is not yet committed protects nobody, and a second one beside it would be skipped.
        seconds = max(optimum(cost, between_failures(status.recoveries, active)), commit or 0.0)
        seconds = min(max(seconds, rules.min_interval_seconds), rules.max_interval_seconds)
    return IntervalInForce(
        seconds=round(seconds, 1),
        launched_seconds=before.launched_seconds,
        cost_seconds=cost,
        commit_seconds=commit,
        failures=status.recoveries,
        active_seconds=round(active),
    )


def launched(rules: Checkpointing, status: RunStatus) -> IntervalInForce | None:
    """The interval as an attempt that begins is told it: fixed until the next, however often the order is repeated."""
    now = interval_in_force(rules, status, None)
    if now is None:
        return None
    kept = now.seconds if now.cost_seconds is not None else rules.first_interval_seconds
    return replace(now, launched_seconds=kept)


def why(chosen: IntervalInForce) -> str:
    """Where the interval comes from, in words."""
    if chosen.cost_seconds is None:
        return "until a save has been measured"
    mean = between_failures(chosen.failures, chosen.active_seconds)
    cost, commit = f"{chosen.cost_seconds:.3g} s", f"{chosen.commit_seconds or 0:.3g} s"
    seen = f"{chosen.failures} recoveries in {chosen.active_seconds / 3600:.3g} h"
    rate = f"{seen}, so one in {mean / 3600:.3g} h is expected"
    return f"a save stops the loop for {cost} and is committed after {commit}; {rate}"
