"""restore.py against a deliberately dumb twin that walks the true history of every state."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mend.model import RunStatus, StoredCheckpoint
from mend.protocol import Ancestor, CheckpointRef
from mend.restore import MAX_CANDIDATES, candidates, expendable, lineage_after, lineage_cut_at
from mend.spec import Checkpointing

RUN = "uid"


@dataclass
class History:
    """Attempts as they really went: each state is the tuple of (attempt, step) that led to it."""

    saved: list[tuple[StoredCheckpoint, tuple[tuple[int, int], ...]]] = field(default_factory=list)
    path: tuple[tuple[int, int], ...] = ()  # of the present state
    status: RunStatus = field(default_factory=RunStatus)

    def launch(self, choice: int) -> None:
        """A new attempt from one of what the dumb twin says can be restored, newest first; none: from scratch."""
        able = self.restorable()
        best = able[0][0] if able else None
        lineage = lineage_after(best) if best else ()
        self.path = ()
        if able:
            taken, self.path = able[min(choice, len(able) - 1)]
            lineage = lineage_cut_at(taken.ref, lineage)
        self.status = RunStatus(attempt=self.status.attempt + 1, lineage=lineage)

    def train(self, steps: int, *, save: bool) -> None:
        """So many steps on."""
        first = self.path[-1][1] + 1 if self.path else 0
        self.path += tuple((self.status.attempt, step) for step in range(first, first + steps))
        if save and self.path:
            step = self.path[-1][1]
            ref = CheckpointRef(uri=f"{step}/{self.status.attempt}", step=step, attempt=self.status.attempt)
            if all(each.ref != ref for each, _ in self.saved):
                made = StoredCheckpoint(ref=ref, run_uid=RUN, lineage=self.status.lineage)
                self.saved.append((made, self.path))

    def mark(self, index: int, *, quarantined: bool) -> None:
        """One of the checkpoints turns out to be spoilt, or sound."""
        if self.saved:
            index %= len(self.saved)
            known, path = self.saved[index]
            marked = replace(known, quarantined=True) if quarantined else replace(known, verified=True)
            self.saved[index] = marked, path

    def restorable(self) -> list[tuple[StoredCheckpoint, tuple[tuple[int, int], ...]]]:
        """Sound checkpoints whose path is how the present state began, newest first."""
        mine = [(each, path) for each, path in self.saved if not each.quarantined and path == self.path[: len(path)]]
        return sorted(mine, key=lambda pair: pair[0].ref.step, reverse=True)[:MAX_CANDIDATES]


events = st.lists(
    st.one_of(
        st.tuples(st.just("launch"), st.integers(0, 2)),
        st.tuples(st.just("train"), st.integers(1, 6)),
        st.tuples(st.just("save"), st.integers(1, 6)),
        st.tuples(st.just("spoil"), st.integers(0, 30)),
        st.tuples(st.just("verify"), st.integers(0, 30)),
    ),
    max_size=40,
)


def lived(life: list[tuple[str, int]]) -> History:
    """The history of such a life."""
    history = History()
    history.launch(0)
    for what, number in life:
        match what:
            case "launch":
                history.launch(number)
            case "train" | "save":
                history.train(number, save=what == "save")
            case _:
                history.mark(number, quarantined=what == "spoil")
    return history


@settings(max_examples=300, deadline=None)
@given(events)
def test_candidates_are_what_the_run_has_passed_through(life: list[tuple[str, int]]) -> None:
    """The lineage, a few numbers, answers as the full history does."""
    history = lived(life)
    stored = [each for each, _ in history.saved]
    expected = [each.ref for each, _ in history.restorable()]
    assert [each.ref for each in candidates(RUN, history.status, stored)] == expected
    unlaunched = replace(history.status, attempt=history.status.attempt + 5, follows=history.status.attempt)
    assert [each.ref for each in candidates(RUN, unlaunched, reversed(stored))] == expected


@settings(max_examples=300, deadline=None)
@given(events, st.integers(2, 4), st.one_of(st.none(), st.integers(2, 5)), st.integers(0, 30))
def test_retention_and_roll_back(life: list[tuple[str, int]], last: int, every: int | None, limit: int) -> None:
    """Retention keeps what was promised and nothing off the line is touched; a roll back looks below its limit only."""
    history = lived(life)
    stored = [each for each, _ in history.saved]
    line = [each for each, path in history.saved if not each.quarantined and path == history.path[: len(path)]]
    line.sort(key=lambda each: each.ref.step)
    rules = Checkpointing(uri="s3://b/p", keep_last=last, keep_every=every)
    going = expendable(RUN, history.status, rules, stored)
    assert set(going) <= set(line)
    assert not set(going) & set(line[-last:])
    assert all(each.ref.step % every for each in going if every)
    verified = [each for each in line if each.verified]
    assert not verified or verified[-1] not in going
    rolled = candidates(RUN, replace(history.status, roll_back_before=limit), stored)
    assert all(each.ref.step < limit for each in rolled)


def test_a_new_run_takes_up_the_line_of_the_last_attempt_that_it_finds() -> None:
    """Also if an attempt that was given up had come further."""
    first = StoredCheckpoint(ref=CheckpointRef(uri="a", step=10, attempt=1))
    given_up = StoredCheckpoint(ref=CheckpointRef(uri="b", step=50, attempt=1))
    last = StoredCheckpoint(ref=CheckpointRef(uri="c", step=20, attempt=2), lineage=(Ancestor(attempt=1, step=10),))
    found = candidates(RUN, RunStatus(), [first, given_up, last])
    assert [each.ref.uri for each in found] == ["c", "a"]


def a_checkpoint(uid: str, step: int, attempt: int, *lineage: Ancestor, at: float = 0.0) -> StoredCheckpoint:
    """Made by a run of this uid."""
    ref = CheckpointRef(uri=f"{uid}/{attempt}/{step}", step=step, attempt=attempt)
    return StoredCheckpoint(ref=ref, run_uid=uid, lineage=lineage, committed_at=at)


def test_what_a_deleted_run_saves_late_is_never_taken_for_the_present_ones() -> None:
    """Also if it has the same attempt number, now or among the ancestors of a later attempt."""
    known = a_checkpoint("old", 100, 1)
    late = [a_checkpoint("old", 125, 1), a_checkpoint("old", 140, 2, Ancestor(attempt=1, step=100, uid="old"))]
    begun = RunStatus(attempt=2, lineage=lineage_after(known))
    assert candidates("new", begun, [known, *late]) == (known,)
    own = a_checkpoint("new", 150, 2, *begun.lineage)
    assert candidates("new", begun, [known, *late, own]) == (own, known)
    after = RunStatus(attempt=3, lineage=lineage_after(own))
    assert candidates("new", after, [known, *late, own]) == (own, known)
    assert lineage_cut_at(known.ref, after.lineage) == lineage_after(known)


def test_a_run_without_status_takes_up_its_own_line_before_that_of_another() -> None:
    """And of two runs before it that used the same number, that of the one which saved last."""
    first, second = a_checkpoint("first", 140, 2, at=10.0), a_checkpoint("second", 110, 2, at=20.0)
    assert candidates("third", RunStatus(), [first, second]) == (second,)
    assert candidates("first", RunStatus(), [first, second]) == (first,)
