"""Pure: which checkpoints an attempt may start from, best first, and which may be thrown away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mend.model import RunStatus, StoredCheckpoint
from mend.protocol import Ancestor, CheckpointRef
from mend.spec import Checkpointing

MAX_CANDIDATES = 5


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
    attempt = status.attempt if status.follows is None else status.follows
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


def latest_attempt(checkpoints: Iterable[StoredCheckpoint]) -> int:
    """The highest attempt that ever committed here; 0 when none did."""
    return max((each.ref.attempt for each in checkpoints), default=0)


def expendable(
    uid: str, status: RunStatus, rules: Checkpointing, checkpoints: Iterable[StoredCheckpoint]
) -> tuple[StoredCheckpoint, ...]:
    """Committed checkpoints on the lineage that retention no longer wants, oldest first.

    Kept are the newest `keep_last`, each `keep_every`-th step, the newest verified one, and the one that the present
    attempt started from, since a verified state is worth more than a newer one that nobody has read.
    """
    line = on_lineage(uid, status, checkpoints)
    kept = {each.ref for each in line[: rules.keep_last]}
    kept.update(each.ref for each in line if rules.keep_every and each.ref.step % rules.keep_every == 0)
    kept.update(each.ref for each in [each for each in line if each.verified][:1])
    if status.lineage:
        parent = status.lineage[-1]
        kept.update(each.ref for each in line if (each.ref.attempt, each.ref.step) == (parent.attempt, parent.step))
    return tuple(each for each in reversed(line) if each.ref not in kept)
