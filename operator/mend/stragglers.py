"""Pure: which ranks are slow, and by how much: the one that the others wait for is the one that waits least.

In a gang that steps together all ranks have equal step times; what tells them apart is the part of a step in which a
rank works itself, that is, the step without its wait for others. Compared over rounds of several steps, since one step
of one rank may be long for any reason. A straggler is reported and never killed for it.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

from mend.heartbeats import Heartbeat, RankReport
from mend.learnt import Pace
from mend.status import Straggler

ROUND_STEPS: Final = 10
ROUNDS: Final = 3
LEAST_WORK_SECONDS: Final = 0.001  # shorter work is all noise


class Paces:
    """How long each rank of one attempt works on a step, in its newest rounds, as the heartbeats tell."""

    def __init__(self, attempt: int = 0) -> None:
        self.attempt = attempt
        self._began: dict[int, RankReport] = {}  # the rank's report at the beginning of its round
        self._rounds: dict[int, deque[float]] = {}
        self._workers: dict[int, int] = {}

    def add(self, heartbeat: Heartbeat) -> None:
        """Learns from the ranks of one worker; other attempts are ignored."""
        if heartbeat.attempt != self.attempt:
            return
        for rank in heartbeat.ranks:
            if not rank.waited_seconds:
                continue
            self._workers[rank.rank] = heartbeat.worker
            began = self._began.get(rank.rank)
            if began is None or began.pid != rank.pid:
                self._began[rank.rank] = rank
            elif (steps := rank.steps_done - began.steps_done) >= ROUND_STEPS:
                self._began[rank.rank] = rank
                worked = _worked(rank) - _worked(began)
                self._rounds.setdefault(rank.rank, deque(maxlen=ROUNDS)).append(max(0.0, worked) / steps)

    def paces(self) -> tuple[Pace, ...]:
        """What is known so far."""
        return tuple(
            Pace(rank=rank, worker=self._workers[rank], seconds=tuple(rounds))
            for rank, rounds in sorted(self._rounds.items())
        )


def _worked(rank: RankReport) -> float:
    return rank.stepped_seconds - rank.waited_seconds


def stragglers(paces: tuple[Pace, ...], slow: float, known: tuple[Straggler, ...], now: float) -> tuple[Straggler, ...]:
    """The ranks that took `slow` times as long as the median of the others, or longer, in each of their newest rounds.

    One that is known stays one until it has come half the way back, so that a rank at the edge does not come and go.
    """
    since = {each.rank: each.began_at for each in known}
    judged = [each for each in paces if len(each.seconds) == ROUNDS]
    found = []
    for mine in judged:
        factors = _factors(mine, judged)
        enough = 1.0 + (slow - 1.0) / 2 if mine.rank in since else slow
        if factors and min(factors) >= enough:
            found.append(
                Straggler(
                    rank=mine.rank,
                    worker=mine.worker,
                    factor=round(median(factors), 2),
                    work_seconds=round(median(mine.seconds), 4),
                    began_at=since.get(mine.rank, now),
                )
            )
    return tuple(found)


def _factors(mine: Pace, paces: list[Pace]) -> list[float]:
    """The rank's work in each round, in medians of the others'; empty if there is nobody to compare with."""
    others = [each for each in paces if each.rank != mine.rank]
    if not others:
        return []
    usual = [max(median(each.seconds[n] for each in others), LEAST_WORK_SECONDS) for n in range(ROUNDS)]
    return [worked / middle for worked, middle in zip(mine.seconds, usual, strict=True)]
