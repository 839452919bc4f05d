"""Pure: which states an attempt may start from, best first and from where, and which may be thrown away."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mend.incidents import Origin
from mend.listing import StoredCheckpoint, StoredSave
from mend.spec import Checkpointing, KeepBest
from mend.states import MEMORY_SCHEME, Ancestor, CheckpointRef, Held, Holder
from mend.status import RunStatus, Score

MAX_CANDIDATES = 5  # of those in the store
MAX_IN_MEMORY = 2  # as many as a rank has slots
MAX_HOLDERS = 800  # in one launch, which ranks may get as a variable of the environment: those hold 128 KiB
LEFTOVER_SECONDS = 3600.0  # a save outlives its attempt, but not by that much: nothing new came of it
QUARANTINE_SECONDS = 7 * 86400.0  # for whoever wants to know what happened to it


def is_on_lineage(checkpoint: StoredCheckpoint, uid: str, attempt: int, lineage: Iterable[Ancestor]) -> bool:
    """Whether this is a state that `attempt` of the run `uid`, with these ancestors, has really passed through.

    A checkpoint of an ancestor counts up to the step that was restored from it: what that ancestor saved later
    belongs to a future that was given up. The number of an attempt says nothing without the run's uid: a run of the
    same name that was deleted may still save, with its last breath, under a number that the present one has too.
    """
    ref, made_by = checkpoint.ref, checkpoint.run_uid
    if (made_by, ref.attempt) == (uid, attempt):
        return True
    return any(ref.attempt == link.attempt and ref.step <= link.step and link.uid in ("", made_by) for link in lineage)


def lineage_after(checkpoint: StoredCheckpoint) -> tuple[Ancestor, ...]:
    """The ancestors of an attempt that starts from `checkpoint`."""
    ref = checkpoint.ref
    return (*checkpoint.lineage, Ancestor(attempt=ref.attempt, step=ref.step, uid=checkpoint.run_uid))


def lineage_cut_at(ref: CheckpointRef, lineage: Iterable[Ancestor], uid: str = "") -> tuple[Ancestor, ...]:
    """The ancestors of an attempt that was to go on at the end of `lineage` but started from `ref`.

    That is further back, or, if its ranks handed the state on in memory, ahead of it; `uid` is of the run then.
    """
    links = tuple(lineage)
    earlier = tuple(link for link in links if link.attempt < ref.attempt)
    made_by = next((link.uid for link in links if link.attempt == ref.attempt), uid)
    return (*earlier, Ancestor(attempt=ref.attempt, step=ref.step, uid=made_by))


def on_lineage(uid: str, status: RunStatus, checkpoints: Iterable[StoredCheckpoint]) -> tuple[StoredCheckpoint, ...]:
    """The committed, unspoilt checkpoints that the run has passed through, newest first."""
    sound = [each for each in checkpoints if not each.quarantined]
    line = _line(uid, status, sound)
    mine = [each for each in sound if is_on_lineage(each, *line)]
    return tuple(sorted(mine, key=lambda each: (each.ref.step, each.ref.attempt), reverse=True))


def _line(uid: str, status: RunStatus, sound: Sequence[StoredCheckpoint]) -> tuple[str, int, tuple[Ancestor, ...]]:
    """Run and attempt whose states count, with the ancestors: until its launch, an attempt stands on the one before.

    A run without an attempt yet (a new TrainingRun on the prefix of an earlier one of its name, or one whose status
    was lost) takes up the line of the latest attempt found there.
    """
    attempt = status.attempt_of_line
    if attempt > 0 or not sound:
        return uid, attempt, status.lineage
    head = max(sound, key=lambda each: (each.run_uid == uid, each.ref.attempt, each.committed_at, each.ref.step))
    return head.run_uid, head.ref.attempt, head.lineage


def candidates(uid: str, status: RunStatus, checkpoints: Iterable[StoredCheckpoint]) -> tuple[StoredCheckpoint, ...]:
    """What the next launch may restore, best first; empty means a fresh start.

    Several are named, so that ranks which find the newest spoilt can take the one before without asking.
    """
    limit = status.roll_back_before
    able = [each for each in on_lineage(uid, status, checkpoints) if limit is None or each.ref.step < limit]
    return tuple(able[:MAX_CANDIDATES])


def roll_back_limit(
    uid: str, status: RunStatus, checkpoints: Iterable[StoredCheckpoint], sound_before: int | None
) -> int | None:
    """Only checkpoints below this step are rolled back to; None if there is none.

    When it is not known from when on states are spoilt, it is the newest that is not trusted.
    """
    line = on_lineage(uid, status, checkpoints)
    limit = line[0].ref.step if sound_before is None and line else sound_before
    return limit if limit is not None and any(each.ref.step < limit for each in line) else None


# ---------------------------------------------------------------- memory
@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """The snapshots that lie whole in one worker's memory. Without a url no other worker can have them."""

    worker: int
    held: tuple[Held, ...] = ()
    url: str = ""


@dataclass(frozen=True, slots=True)
class MemorySave:
    """A save in the memory of workers: for each rank of the world that saved it, who has its snapshot."""

    state: StoredCheckpoint
    holders: tuple[tuple[int, ...], ...]

    @property
    def is_whole(self) -> bool:
        """Whether no rank's snapshot is missing."""
        return bool(self.holders) and all(self.holders)

    def at_home(self, takers: Sequence[int]) -> int:
        """How many ranks' snapshots lie where these ranks are, or whoever has their part of another world, will be."""
        size = len(self.holders)
        return sum(takers[rank * len(takers) // size] in who for rank, who in enumerate(self.holders))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A state to start from, and where it lies."""

    state: StoredCheckpoint
    origin: Origin


def saves_in_memory(memories: Iterable[WorkerMemory]) -> tuple[MemorySave, ...]:
    """All saves of which anybody holds anything. Workers that describe one differently do not speak of the same."""
    found: defaultdict[StoredCheckpoint, defaultdict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for memory in memories:
        for held in memory.held:
            if held.world_size <= MAX_HOLDERS:
                ranks = found[_described(held)]
                for rank in held.ranks:
                    ranks[rank].add(memory.worker)
    return tuple(
        MemorySave(state, tuple(tuple(sorted(ranks[rank])) for rank in range(state.world_size)))
        for state, ranks in found.items()
    )


def _described(held: Held) -> StoredCheckpoint:
    """What a save is known by. Tokens are left out: a loop may count them for each rank."""
    return StoredCheckpoint(
        ref=CheckpointRef(uri=f"{MEMORY_SCHEME}{held.save_id}", step=held.step, attempt=held.attempt),
        run_uid=held.run_uid,
        lineage=held.lineage,
        world_size=held.world_size,
    )


def planned(
    uid: str,
    status: RunStatus,
    checkpoints: Iterable[StoredCheckpoint],
    memories: Sequence[WorkerMemory],
    takers: Sequence[int],
    spoilt: Iterable[str] = (),
) -> tuple[Candidate, ...]:
    """What the next launch on the workers `takers`, in the order of their places, may restore, best first.

    The newest step that all of them can get comes first; of equal steps the nearest: memory before the store, and own
    memory before a peer's. A save in memory counts if every taker can get each rank's snapshot of it: from its own
    memory, or from that of a worker whose saver can be reached. `spoilt` are the uris of those that were found bad.
    Several are named, so that ranks which find the first spoilt, or gone, can take the next without asking.
    """
    stored = [each for each in checkpoints if not each.quarantined]
    urls = {memory.worker: memory.url for memory in memories}
    bad = frozenset(spoilt)
    saves = [each for each in saves_in_memory(memories) if each.is_whole and each.state.ref.uri not in bad]
    line = _line(uid, status, [*stored, *(each.state for each in saves)])
    able = [each for each in saves if _may_start(each.state, status, line) and _in_reach(each, takers, urls)]
    able.sort(key=lambda each: (each.state.ref.step, each.at_home(takers), each.state.ref.attempt), reverse=True)
    near = [Candidate(each.state, _origin(each, takers)) for each in _few_enough(able)]
    mine = [each for each in stored if _may_start(each, status, line)]
    mine.sort(key=lambda each: (each.ref.step, each.ref.attempt), reverse=True)
    far = [Candidate(each, Origin.STORE) for each in mine[:MAX_CANDIDATES]]
    return tuple(sorted([*near, *far], key=lambda each: each.state.ref.step, reverse=True))  # stable: the near first


def _may_start(state: StoredCheckpoint, status: RunStatus, line: tuple[str, int, tuple[Ancestor, ...]]) -> bool:
    limit = status.roll_back_before
    return is_on_lineage(state, *line) and (limit is None or state.ref.step < limit)


def _in_reach(save: MemorySave, takers: Sequence[int], urls: Mapping[int, str]) -> bool:
    """Whether each taker has, or can fetch, every snapshot."""
    return bool(takers) and all(any(urls[who] for who in ranks) or set(takers) <= set(ranks) for ranks in save.holders)


def _origin(save: MemorySave, takers: Sequence[int]) -> Origin:
    return Origin.MEMORY if save.at_home(takers) == len(save.holders) else Origin.PEER


def _few_enough(saves: Sequence[MemorySave]) -> list[MemorySave]:
    """As many of the first as a launch can name holders of."""
    taken: list[MemorySave] = []
    for save in saves[:MAX_IN_MEMORY]:
        if sum(len(each.holders) for each in (*taken, save)) <= MAX_HOLDERS:
            taken.append(save)
    return taken


def holders(worker: int, saves: Sequence[MemorySave], urls: Mapping[int, str]) -> tuple[Holder, ...]:
    """Where a worker finds each snapshot of these saves: in its own memory, else with whoever comes next after it.

    So the workers do not all ask the first. If there is room, everybody else who has it follows.
    """
    around = max(urls, default=0) + 1
    found: list[tuple[int, Holder]] = []
    for save in saves:
        for rank, who in enumerate(save.holders):
            near = sorted(who, key=lambda each: (each - worker) % around)
            able = [each for each in near if each == worker or urls.get(each)]
            found += [
                (n, Holder(save_id=save.state.ref.save_in_memory, rank=rank, worker=each, url=urls.get(each, "")))
                for n, each in enumerate(able)
            ]
    return tuple(holder for _, holder in sorted(found, key=lambda each: each[0])[:MAX_HOLDERS])


# ---------------------------------------------------------------- the store
def latest_attempt(checkpoints: Iterable[StoredCheckpoint]) -> int:
    """The highest attempt that ever committed here; 0 when none did."""
    return max((each.ref.attempt for each in checkpoints), default=0)


def expendable(
    uid: str, status: RunStatus, rules: Checkpointing, checkpoints: Iterable[StoredCheckpoint]
) -> tuple[StoredCheckpoint, ...]:
    """Committed checkpoints on the lineage that retention no longer wants, oldest first.

    Kept are the newest `keep_last`, each `keep_every`-th step, the best by evaluation, pinned ones, the newest verified
    one, since a verified state is worth more than a newer one that nobody has read, and what the present attempt may
    have started from, or may yet start from.
    """
    line = on_lineage(uid, status, checkpoints)
    kept = {each.ref for each in line[: rules.keep_last]}
    kept.update(each.ref for each in line if rules.keep_every and each.ref.step % rules.keep_every == 0)
    kept.update(each.ref for each in [each for each in line if each.verified][:1])
    kept.update(each.ref for each in line if each.pinned)
    kept.update(each.ref for each in best_checkpoints(rules, status, line))
    if status.restored_step is None:
        kept.update(status.restore)
    if status.lineage:
        parent = status.lineage[-1]
        kept.update(each.ref for each in line if (each.ref.attempt, each.ref.step) == (parent.attempt, parent.step))
    return tuple(each for each in reversed(line) if each.ref not in kept)


def best_checkpoints(
    rules: Checkpointing, status: RunStatus, line: Iterable[StoredCheckpoint]
) -> tuple[StoredCheckpoint, ...]:
    """Of these, the best by evaluation, as many as the spec wants to keep."""
    best = rules.keep_best
    if best is None:
        return ()
    places = {(each.attempt, each.step): place for place, each in enumerate(best_first(best, status.scores))}
    scored = [each for each in line if (each.ref.attempt, each.ref.step) in places]
    return tuple(sorted(scored, key=lambda each: places[each.ref.attempt, each.ref.step])[: best.count])


def best_first(best: KeepBest, scores: Iterable[Score]) -> list[Score]:
    """In the order of their worth; of equals the later one first."""
    sign = -1.0 if best.mode == "max" else 1.0
    return sorted(scores, key=lambda each: (sign * each.value, -each.step, -each.attempt))


def swept(attempt: int, saves: Sequence[StoredSave]) -> tuple[StoredSave, ...]:
    """What may go beside checkpoints that retention no longer wants: leftovers, and what was quarantined long ago.

    A leftover is a save without manifest of an attempt before `attempt`: the present one may still be at it. How old
    it is, is told by the store's own clock: by how much newer the newest object is. A prefix in which nothing new is
    written is left as it is.
    """
    newest = max((each.modified_at for each in saves), default=0.0)

    def may_go(save: StoredSave) -> bool:
        if save.pinned:
            return False
        if not save.committed:
            return save.attempt < attempt and newest - save.modified_at >= LEFTOVER_SECONDS
        return save.quarantined_at is not None and newest - save.quarantined_at >= QUARANTINE_SECONDS

    return tuple(each for each in saves if may_go(each))
