"""Every kind of fault: how it is done to a real gang, what mend's real thinking says, and what it should have said.

async with a_gang(folder, workers=2, ranks=2) as gang:
    await gang.launch()
    outcome = await inject(KINDS["stop"], gang, rank=3)
    assert outcome.is_right, outcome
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from injured_gang import Ground, InjuredGang, a_gang
from mend.incidents import Incident, IncidentKind

__all__ = [
    "KINDS",
    "Expected",
    "FaultKind",
    "Ground",
    "InjuredGang",
    "Outcome",
    "a_gang",
    "expected",
    "inject",
    "injure",
]

MARGIN_STEPS = 10  # from the request to the fault: every rank has seen its request by then
CALM_STEPS = 25  # how long a gang that must not be called ill is watched
CLOCK_BACK_SECONDS = -3600


class Blamed(StrEnum):
    """Whom a right verdict names."""

    RANK = "the rank that was injured"
    WORKER = "every rank of its worker"
    ALL = "every rank"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class FaultKind:
    """One way to go wrong. `incidents` is what it may be called; empty: it must not be called anything."""

    name: str
    what: str
    incidents: frozenset[IncidentKind]
    blamed: Blamed = Blamed.RANK
    request: str = ""  # what tests/programs/injured.py is asked for
    signal: signal.Signals | None = None
    outside: Callable[[InjuredGang, int], Awaitable[None]] | None = None
    ground: Ground = Ground.PLAIN
    min_ranks: int = 2
    min_workers: int = 1

    @property
    def is_incident(self) -> bool:
        """Whether mend should see anything in it."""
        return bool(self.incidents)

    def fits(self, gang: InjuredGang) -> bool:
        """Whether it can be done to this gang."""
        on_ground = self.ground in (Ground.PLAIN, gang.ground)
        return on_ground and gang.workers >= self.min_workers and gang.world_size >= self.min_ranks


@dataclass(frozen=True, slots=True)
class Expected:
    """What a right verdict says: one of these kinds (none: no incident), and exactly these ranks."""

    incidents: frozenset[IncidentKind]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done to a gang, what should have been said, and what was."""

    kind: FaultKind
    rank: int
    expected: Expected
    incident: Incident | None
    seconds: float  # from the injury to the verdict

    @property
    def is_right(self) -> bool:
        """The right kind of incident, and exactly the guilty named."""
        if self.incident is None or not self.expected.incidents:
            return self.incident is None and not self.expected.incidents
        named = self.incident.verdict.ranks == self.expected.ranks
        return named and self.incident.kind in self.expected.incidents

    @property
    def blames_the_innocent(self) -> bool:
        """Whether anybody is named who had nothing to do with it: worse than naming nobody."""
        return self.incident is not None and not set(self.incident.verdict.ranks) <= set(self.expected.ranks)

    def __str__(self) -> str:
        said = "no incident"
        if self.incident is not None:
            verdict = self.incident.verdict
            said = f"{self.incident.kind}, blames {verdict.ranks or 'nobody'} ({'; '.join(verdict.reasons)})"
        return f"{self.kind.name} at rank {self.rank}, expected {self.expected.ranks or 'nobody'}: {said}"


# ---------------------------------------------------------------- the kinds
async def _kill_agent(gang: InjuredGang, rank: int) -> None:
    os.kill(gang.agents[gang.worker_of(rank)].pid, signal.SIGKILL)


async def _pause_worker(gang: InjuredGang, rank: int) -> None:
    for each in gang.ranks():
        if gang.worker_of(each.rank) == gang.worker_of(rank):
            os.kill(each.pid, signal.SIGSTOP)


async def _cut_network(gang: InjuredGang, rank: int) -> None:
    assert gang.network is not None
    gang.network.cut()


async def _set_clock_back(gang: InjuredGang, rank: int) -> None:
    gang.set_clock(CLOCK_BACK_SECONDS)


CRASHED = frozenset({IncidentKind.CRASHED})
HUNG = frozenset({IncidentKind.HUNG})
LOST = frozenset({IncidentKind.LOST})
DIVERGED = frozenset({IncidentKind.DIVERGED})
NOTHING: frozenset[IncidentKind] = frozenset()


def _requested(request: str, what: str, incidents: frozenset[IncidentKind], **more: Any) -> FaultKind:
    """A kind that tests/programs/injured.py does to itself under the same name."""
    return FaultKind(more.pop("name", request), what, incidents, request=request, **more)


def _all_kinds() -> Iterator[FaultKind]:
    yield FaultKind("kill", "SIGKILL from outside", CRASHED, signal=signal.SIGKILL)
    yield FaultKind("segfault", "SIGSEGV, as a bad extension gets it", CRASHED, signal=signal.SIGSEGV)
    yield FaultKind("stop", "SIGSTOP", HUNG, signal=signal.SIGSTOP)
    yield _requested("sleep", "a sleep before a collective", HUNG)
    yield _requested("spin", "Python code that never ends", HUNG)
    yield _requested("locks", "two threads that wait for each other's lock", HUNG)
    yield _requested("hold-gil", "a C extension that holds the GIL", HUNG)
    yield _requested("loader", "a data loader that never returns", HUNG)
    yield _requested("skip", "a collective left out", HUNG)
    yield _requested("reorder", "two collectives in another order", HUNG)
    yield _requested("raise", "an exception", CRASHED)
    yield _requested("raise-late", "an exception that is told after the peers have died of it", CRASHED)
    yield _requested("raise", "an exception on every rank", CRASHED, name="raise-all", blamed=Blamed.ALL)
    yield _requested("exit", "sys.exit(3)", CRASHED)
    yield _requested("eat", "more memory than there is", CRASHED, name="oom", ground=Ground.MEMORY)
    yield _requested("fill-disk", "no space left on the device", CRASHED, name="disk-full")
    yield _requested("nan", "a loss that is no number", DIVERGED, blamed=Blamed.NOBODY)
    yield _requested("slow", "a rank that is slow for some steps", NOTHING)
    yield FaultKind(
        "pause-worker",
        "SIGSTOP to all ranks of a worker",
        HUNG,
        Blamed.WORKER,
        outside=_pause_worker,
        min_workers=2,
    )
    yield FaultKind(
        "cut-network",
        "no packets between the workers",
        HUNG,
        Blamed.NOBODY,
        outside=_cut_network,
        ground=Ground.NETWORK,
        min_workers=2,
    )
    yield FaultKind(
        "kill-agent",
        "SIGKILL to the agent, whose ranks die with it",
        LOST,
        Blamed.WORKER,
        outside=_kill_agent,
        min_workers=2,
    )
    yield FaultKind(
        "clock-back",
        "the wall clock set back by an hour",
        NOTHING,
        outside=_set_clock_back,
        ground=Ground.CLOCK,
    )


KINDS: Mapping[str, FaultKind] = {kind.name: kind for kind in _all_kinds()}


def expected(kind: FaultKind, gang: InjuredGang, rank: int) -> Expected:
    """What should be said when this is done to that rank."""
    match kind.blamed:
        case _ if not kind.is_incident:
            ranks: tuple[int, ...] = ()
        case Blamed.RANK:
            ranks = (rank,)
        case Blamed.WORKER:
            ranks = gang.ranks_of(gang.worker_of(rank))
        case Blamed.ALL:
            ranks = tuple(range(gang.world_size))
        case Blamed.NOBODY:
            ranks = ()
    return Expected(kind.incidents, ranks)


async def injure(kind: FaultKind, gang: InjuredGang, rank: int) -> None:
    """Do it. A signal or a thing from outside is done on return; a request is granted a few steps later."""
    ranks = gang.ranks()
    if kind.signal is not None:
        os.kill(ranks[rank].pid, kind.signal)
    elif kind.outside is not None:
        await kind.outside(gang, rank)
    else:
        step = max(each.step for each in ranks) + MARGIN_STEPS
        for number in range(gang.world_size) if kind.blamed is Blamed.ALL else (rank,):
            draft = gang.folder / f"draft-{number}"
            draft.write_text(f"{kind.request} {step}")
            draft.rename(gang.faults / f"rank-{number}")  # never read half


async def inject(kind: FaultKind, gang: InjuredGang, rank: int) -> Outcome:
    """Do it, and see what mend's thinking makes of it. The gang is to be launched again afterwards."""
    should = expected(kind, gang, rank)
    calm = max(each.step for each in gang.ranks()) + MARGIN_STEPS + CALM_STEPS
    began = time.monotonic()
    await injure(kind, gang, rank)
    watched = (lambda: False) if kind.is_incident else (lambda: gang.has_passed(calm))
    incident = await gang.incident(watched)
    return Outcome(kind, rank, should, incident, time.monotonic() - began)
