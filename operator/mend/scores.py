"""Pure: which checkpoints are the best by evaluation.

An evaluation speaks for the first checkpoint at its step or after it, as long as no later evaluation does. So each
counts for one checkpoint, and the best three are of three evaluations. What was evaluated off the lineage is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from msgspec.structs import replace

from mend.listing import StoredCheckpoint
from mend.observation import Observation
from mend.restore import best_first, on_lineage
from mend.spec import Checkpointing
from mend.status import Evaluation, RunStatus, Score

NEWEST: Final = 8  # evaluations that outlive their attempt: it may have saved with its last breath
RESERVE: Final = 2  # times as many scores as are wanted: the best may be quarantined


def with_scores(rules: Checkpointing, status: RunStatus, seen: Observation) -> RunStatus:
    """The status with the newest evaluations, and what the best checkpoints are worth."""
    best = rules.keep_best
    if best is None:
        return replace(status, evaluations=(), scores=())
    told = {
        (each.attempt, each.step): each
        for each in (*status.evaluations, *seen.evaluations)
        if each.name == best.metric and math.isfinite(each.value) and _is_on_line(status, each)
    }
    heard = sorted(told.values(), key=lambda each: (each.step, each.attempt))
    line = sorted(on_lineage(seen.uid, status, seen.store.checkpoints), key=lambda each: each.ref.step)
    known = [each for each in status.scores if each.name == best.metric and not _is_newer(each, heard)]
    scores = best_first(best, [*known, *_scored(heard, line)])
    there = {(each.ref.attempt, each.ref.step) for each in line}
    is_whole = seen.store.listed and not seen.store.partial  # else what is not in it may be there all the same
    kept = [each for each in scores if (each.attempt, each.step) in there or not is_whole]
    return replace(status, evaluations=tuple(heard[-NEWEST:]), scores=tuple(kept[: RESERVE * best.count]))


def _scored(heard: Sequence[Evaluation], line: Sequence[StoredCheckpoint]) -> Iterable[Score]:
    for place, each in enumerate(heard):
        until = heard[place + 1].step if place + 1 < len(heard) else math.inf
        first = next((one for one in line if each.step <= one.ref.step < until), None)
        if first is not None:
            yield Score(name=each.name, step=first.ref.step, attempt=first.ref.attempt, value=each.value)


def _is_newer(score: Score, heard: Sequence[Evaluation]) -> bool:
    """Whether it will be found anew from the evaluations that are still known."""
    return bool(heard) and score.step >= heard[0].step


def _is_on_line(status: RunStatus, each: Evaluation) -> bool:
    return each.attempt == status.attempt_of_line or any(
        each.attempt == link.attempt and each.step <= link.step for link in status.lineage
    )
