"""The faults of the checkpoint campaign, and its plan: what is done, to whom and when, decided by a seed beforehand.

Pure: the same seed gives the same plan, of which a longer one is a continuation. `saving_injection.py` carries it out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

BLOCK: Final = 50  # injections that one gang and one prefix live through
REQUESTS_OF_A_SAVE: Final = 8  # uploads, and a few more than any save makes: the rest meets the next save
REQUESTS_OF_A_RESTORE: Final = 5  # reads
IN_MEMORY_OFTEN: Final = 0.5
SHAPES: Final = ((1, 2), (2, 1))


class Ground(StrEnum):
    """Where checkpoints are stored."""

    MINISTACK = "ministack"  # right about conditions and checksums; forgets everything when it dies
    RCLONE = "rclone"  # durable; ignores conditions and checksums
    GIVEN = "given"  # somebody's S3-compatible service: nothing of it can be killed, filled or paused


OURS: Final = frozenset({Ground.MINISTACK, Ground.RCLONE})
ANY: Final = frozenset(Ground)
DURABLE: Final = frozenset({Ground.RCLONE})


class When(StrEnum):
    """Which part of a checkpoint's life a fault meets."""

    SAVING = "saving"
    RESTORING = "restoring"
    RESTING = "at rest"


class Moment(StrEnum):
    """What a fault waits for."""

    CLOCK = "clock"  # so many seconds
    PHASE = "phase"  # the victim begins to save or to restore, then so many seconds: a copy lasts half a millisecond
    REQUEST = "request"  # to the store


# How often each, and what `seconds` are drawn from: the steps between two saves or a start, a copy or a load.
SAVING_MOMENTS: Final = {Moment.REQUEST: 0.5, Moment.PHASE: 0.3, Moment.CLOCK: 0.2}
RESTORING_MOMENTS: Final = {Moment.REQUEST: 0.3, Moment.PHASE: 0.4, Moment.CLOCK: 0.3}
SAVING_SECONDS: Final = {Moment.REQUEST: 0.0, Moment.PHASE: 0.015, Moment.CLOCK: 0.4}
RESTORING_SECONDS: Final = {Moment.REQUEST: 0.0, Moment.PHASE: 0.1, Moment.CLOCK: 0.4}


@dataclass(frozen=True, slots=True)
class FaultKind:
    """One way to go wrong. `from_store`: what is restored afterwards comes from there, or the fault would not show."""

    name: str
    what: str
    when: When
    grounds: frozenset[Ground] = ANY
    from_store: bool = False
    weight: int = 1
    of_request: bool = False  # it befalls one request

    @property
    def is_kill(self) -> bool:
        """Whether something is killed, and goes on only after another start."""
        return self.name.startswith("kill-")


@dataclass(frozen=True, slots=True)
class Plan:
    """One injection. `place`: the byte, as a share of the whole."""

    number: int
    ground: str
    workers: int
    ranks: int  # of each worker
    kind: str
    victim: int  # a rank, and so its worker
    saves: int  # that are waited for before, beside the first of the attempt
    moment: Moment
    request: int  # which one, counted from 0
    after: bool  # of the request: the server has answered it; of the phase, while saving: the victim copies
    seconds: float
    place: float
    in_memory: bool  # snapshots in memory may be restored afterwards


def _kinds() -> Iterator[FaultKind]:
    saving, restoring, resting = When.SAVING, When.RESTORING, When.RESTING
    yield FaultKind("kill-rank", "SIGKILL to a rank", saving, weight=14)
    yield FaultKind("kill-ranks", "SIGKILL to all ranks at once", saving, weight=11)
    yield FaultKind("kill-saver", "SIGKILL to a saver", saving, weight=14)
    yield FaultKind("kill-saver-and-rank", "SIGKILL to a rank and its saver", saving, weight=11)
    yield FaultKind("kill-agent", "SIGKILL to an agent, and so to all of its worker", saving, weight=3)
    yield FaultKind("kill-agents", "SIGKILL to all agents", saving, from_store=True, weight=2)
    yield FaultKind("kill-upload", "an upload ends half way", saving, weight=7, of_request=True)
    yield FaultKind("pause-saver", "SIGSTOP to a saver for a while", saving)
    yield FaultKind("kill-store", "SIGKILL to the store, which comes back", saving, DURABLE, weight=3)
    yield FaultKind("pause-store", "the store does not answer for a while", saving, OURS)
    yield FaultKind("fill-disk", "no space left where the store writes", saving, DURABLE)
    yield FaultKind("refuse-uploads", "HTTP 503 to uploads", saving)
    yield FaultKind("lose-answers", "uploads arrive, their answers do not", saving)
    yield FaultKind("flip-upload", "a bit flipped on its way into the store", saving, from_store=True, weight=2)
    yield FaultKind("send-twice", "uploads that arrive twice", saving, from_store=True)
    yield FaultKind("replay-uploads", "uploads of one save that arrive again during the next, in reverse", saving,
                    from_store=True)  # fmt: skip
    yield FaultKind("kill-rank-restoring", "SIGKILL to a rank", restoring, weight=14)
    yield FaultKind("kill-ranks-restoring", "SIGKILL to all ranks", restoring, weight=8)
    yield FaultKind("kill-saver-restoring", "SIGKILL to a saver", restoring, weight=4)
    yield FaultKind("kill-agent-restoring", "SIGKILL to an agent", restoring, weight=2)
    yield FaultKind("kill-store-restoring", "SIGKILL to the store, which comes back", restoring, DURABLE,
                    from_store=True, weight=2)  # fmt: skip
    yield FaultKind("refuse-reads", "HTTP 500 to reads", restoring, from_store=True)
    yield FaultKind("cut-reads", "answers that end half way", restoring, from_store=True)
    yield FaultKind("flip-read", "a bit flipped on its way out of the store", restoring, from_store=True, weight=2)
    yield FaultKind("flip-shard", "a bit of a stored shard flipped", resting, from_store=True, weight=3)
    yield FaultKind("flip-manifest", "a bit of a stored manifest flipped", resting, from_store=True)
    yield FaultKind("truncate-shard", "a stored shard cut short", resting, from_store=True)
    yield FaultKind("truncate-manifest", "a stored manifest cut short", resting, from_store=True)
    yield FaultKind("delete-shard", "a stored shard deleted", resting, from_store=True)
    yield FaultKind("delete-manifest", "a stored manifest deleted", resting, from_store=True)
    yield FaultKind("swap-shards", "shards of two steps exchanged", resting, from_store=True)
    yield FaultKind("old-shard", "the shard of an older step in the place of a newer one", resting, from_store=True)
    yield FaultKind("old-manifest", "the manifest of an older step in the place of a newer one", resting,
                    from_store=True)  # fmt: skip
    yield FaultKind("flip-memory", "a bit of a snapshot in shared memory flipped", resting, weight=3)


KINDS: Final[Mapping[str, FaultKind]] = {kind.name: kind for kind in _kinds()}


def plans(seed: int, count: int, grounds: Sequence[Ground] = (Ground.MINISTACK, Ground.RCLONE)) -> list[Plan]:
    """The campaign of this seed; blocks take turns on the grounds."""
    blocks = range(-(-count // BLOCK))
    return [plan for block in blocks for plan in _block(seed, block, grounds[block % len(grounds)])][:count]


def _block(seed: int, block: int, ground: Ground) -> list[Plan]:
    """The injections of one gang: each kind as often as its weight says before any comes again."""
    chance = random.Random(f"{seed}/{block}")
    workers, ranks = SHAPES[block // 2 % len(SHAPES)]
    deck: list[FaultKind] = []
    chosen = []
    for number in range(block * BLOCK, (block + 1) * BLOCK):
        if not deck:
            deck = [kind for kind in KINDS.values() if ground in kind.grounds for _ in range(kind.weight)]
            chance.shuffle(deck)
        chosen.append(a_plan(deck.pop(), number, ground, workers, ranks, chance))
    return chosen


def a_plan(kind: FaultKind, number: int, ground: Ground, workers: int, ranks: int, chance: random.Random) -> Plan:
    """One injection of this kind, its moment drawn over the life of a save or of a restore."""
    in_memory = chance.random() < IN_MEMORY_OFTEN and not kind.from_store
    restores = kind.when is When.RESTORING
    moment = _a_moment(kind, in_memory, chance)
    seconds = (RESTORING_SECONDS if restores else SAVING_SECONDS)[moment]
    power = 3 if moment is Moment.PHASE and not restores else 1  # of a save, what comes first is shortest
    return Plan(
        number=number,
        ground=ground.value,
        workers=workers,
        ranks=ranks,
        kind=kind.name,
        victim=chance.randrange(workers * ranks),
        saves=chance.randrange(2) if kind.is_kill else 2,
        moment=moment,
        request=chance.randrange(REQUESTS_OF_A_RESTORE if restores else REQUESTS_OF_A_SAVE),
        after=chance.random() < 0.5 and not kind.of_request,
        seconds=round(seconds * chance.random() ** power, 6),
        place=round(chance.random(), 6),
        in_memory=in_memory,
    )


def _a_moment(kind: FaultKind, in_memory: bool, chance: random.Random) -> Moment:
    often = RESTORING_MOMENTS if kind.when is When.RESTORING else SAVING_MOMENTS
    (drawn,) = chance.choices(tuple(often), tuple(often.values()))
    if kind.of_request:
        return Moment.REQUEST
    if drawn is Moment.REQUEST and kind.when is When.RESTORING and in_memory:
        return Moment.PHASE  # the store is not asked
    return drawn
