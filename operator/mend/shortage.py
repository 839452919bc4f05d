"""Pure: whether a rank takes up memory so fast that the kernel is about to end it, by what was gathered of its worker.

A rank that touches gigabytes makes no step meanwhile, and the others wait for it: a hang to all appearances, and a
crash in a moment. How much is left, and how fast it goes, says when; until then the kernel's word is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mend.evidence import Evidence, RankEvidence

LONGEST_SECONDS = 30.0  # memory that lasts longer is not what the gang stands still for
MARGIN = 3.0  # the pace was seen for a moment, and slows down as the kernel looks for memory to take back
KILL_SECONDS = 2.0  # the kernel searches, chooses, and frees gigabytes
_GIB = 1 << 30


class Shortage(NamedTuple):
    """The rank, until when its end is awaited (seconds since its last mark), and the words for it."""

    rank: int
    until_seconds: float
    words: str


def shortage(evidence: Iterable[Evidence]) -> Shortage | None:
    """The one that is due first; None where memory is not known, or lasts."""
    found = (_of(each, rank) for each in evidence if each.memory_limit for rank in each.ranks if rank.memory_growth > 0)
    return min(filter(None, found), key=lambda each: each.until_seconds, default=None)


def _of(worker: Evidence, rank: RankEvidence) -> Shortage | None:
    seconds = max(0, worker.memory_limit - worker.memory_used) / rank.memory_growth
    if seconds > LONGEST_SECONDS:
        return None
    pace, used, limit = (each / _GIB for each in (rank.memory_growth, worker.memory_used, worker.memory_limit))
    return Shortage(
        rank=rank.rank,
        until_seconds=rank.progress_seconds + MARGIN * seconds + KILL_SECONDS,
        words=f"rank {rank.rank} takes up {pace:.2g} GiB of memory a second; worker {worker.worker} has {used:.3g} of "
        f"its {limit:.3g} GiB in use",
    )
