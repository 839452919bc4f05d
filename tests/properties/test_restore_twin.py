"""restore.py against a deliberately dumb twin that walks the true history of every state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mend.incidents import Origin
from mend.listing import StoredCheckpoint
from mend.orders import Launch
from mend.protocol import encode
from mend.restore import (
    MAX_CANDIDATES,
    MAX_HOLDERS,
    MAX_IN_MEMORY,
    WorkerMemory,
    candidates,
    expendable,
    holders,
    lineage_after,
    lineage_cut_at,
    planned,
    saves_in_memory,
)
from mend.spec import Checkpointing
from mend.states import Ancestor, CheckpointRef, Held
from mend.status import RunStatus

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


# ---------------------------------------------------------------- memory
WORKERS = (0, 1, 2, 3)
SIZE = 3  # ranks of the world that saved


@dataclass(frozen=True)
class Placed:
    """Where one state of a history lies: by rank, who has its snapshot; and whether it is in the store too."""

    who: tuple[frozenset[int], ...]
    in_store: bool


placements = st.builds(
    Placed,
    who=st.tuples(*[st.frozensets(st.sampled_from(WORKERS), max_size=2)] * SIZE),
    in_store=st.booleans(),
)


def in_memory(state: StoredCheckpoint) -> StoredCheckpoint:
    """The same state as snapshots make it up."""
    ref = replace(state.ref, uri=f"memory:{state.ref.uri}")
    return replace(state, ref=ref, world_size=SIZE, verified=False, quarantined=False)


def told_by(worker: int, placed: list[tuple[StoredCheckpoint, Placed]]) -> tuple[Held, ...]:
    """What one worker's heartbeat says of these states."""
    return tuple(
        Held(
            save_id=state.ref.uri,
            run_uid=state.run_uid,
            attempt=state.ref.attempt,
            step=state.ref.step,
            tokens=state.tokens,
            world_size=SIZE,
            ranks=ranks,
            lineage=state.lineage,
        )
        for state, where in placed
        if (ranks := tuple(rank for rank, who in enumerate(where.who) if worker in who))
    )


def ways(where: Placed, taker: int, serving: frozenset[int]) -> Iterator[tuple[int, ...]]:
    """Every choice of one holder for each rank with which this taker gets them all: the dumb way to plan."""
    for choice in product(*where.who):
        if all(holder == taker or holder in serving for holder in choice):
            yield choice


def can_all_get(where: Placed, takers: tuple[int, ...], serving: frozenset[int]) -> bool:
    """Whether each of them has such a choice."""
    return all(any(True for _ in ways(where, taker, serving)) for taker in takers)


lives = st.tuples(
    events,
    st.lists(placements, min_size=12, max_size=12),
    st.permutations(WORKERS).flatmap(lambda row: st.integers(1, 4).map(lambda n: tuple(row[:n]))),
    st.frozensets(st.sampled_from(WORKERS)),
)
Life = tuple[list[tuple[str, int]], list[Placed], tuple[int, ...], frozenset[int]]


def scene(life: Life) -> tuple[History, list[tuple[StoredCheckpoint, Placed]], list[WorkerMemory]]:
    """The history, where its newest states lie, and what the workers tell of that; no two states have one step."""
    happened, where, _, serving = life
    history = lived(happened)
    newest = list(reversed([state for state, _ in history.saved]))[: len(where)]
    placed = list(zip(newest, where, strict=False))
    told = [
        WorkerMemory(worker, told_by(worker, placed), f"https://{worker}" if worker in serving else "")
        for worker in WORKERS
    ]
    return history, placed, told


@settings(max_examples=300, deadline=None)
@given(lives)
def test_the_plan_is_the_best_of_all_combinations(life: Life) -> None:
    """The newest step that every taker can get, and of equal ones the nearest; all others after it, in order."""
    _, _, takers, serving = life
    history, placed, told = scene(life)
    paths = {state.ref: path for state, path in history.saved}

    def is_passed(state: StoredCheckpoint) -> bool:
        path = paths[state.ref]
        return path == history.path[: len(path)]

    stored = [state for state, where in placed if where.in_store]
    near = [state for state, where in placed if is_passed(state) and can_all_get(where, takers, serving)]
    near.sort(key=lambda state: state.ref.step, reverse=True)
    far = [state for state in stored if is_passed(state) and not state.quarantined]
    far.sort(key=lambda state: state.ref.step, reverse=True)
    expected = [in_memory(state).ref for state in near[:MAX_IN_MEMORY]] + [each.ref for each in far[:MAX_CANDIDATES]]
    expected.sort(key=lambda ref: ref.step, reverse=True)
    able = planned(RUN, history.status, stored, told, takers)
    assert [each.state.ref for each in able] == expected
    for each in able:
        assert (each.origin is Origin.STORE) is not bool(each.state.ref.save_in_memory)
    spoilt = [in_memory(state).ref.uri for state, _ in placed]
    assert [each.state.ref for each in planned(RUN, history.status, stored, told, takers, spoilt)] == [
        each.ref for each in far[:MAX_CANDIDATES]
    ]


@settings(max_examples=300, deadline=None)
@given(lives, st.frozensets(st.sampled_from(WORKERS)))
def test_who_goes_between_the_plan_and_the_launch_takes_no_more_than_was_his(life: Life, gone: frozenset[int]) -> None:
    """With the holders that a launch names, a taker gets a save exactly if some choice of those who are left is one."""
    _, _, takers, serving = life
    history, placed, told = scene(life)
    able = planned(RUN, history.status, [], told, takers)
    named = {each.state.ref.uri for each in able}
    saves = [each for each in saves_in_memory(told) if each.state.ref.uri in named]
    urls = {each.worker: each.url for each in told}
    for taker in takers:
        given = holders(taker, saves, urls)
        assert all(each.url or each.worker == taker for each in given)
        for state, where in placed:
            if in_memory(state).ref.uri not in named:
                continue
            mine = [each for each in given if each.save_id == state.ref.uri]
            first = {each.rank: each.worker for each in reversed(mine)}
            assert all(first[rank] == taker for rank, who in enumerate(where.who) if taker in who)
            left = {each.rank for each in mine if each.worker not in gone}
            rest = Placed(tuple(who - gone for who in where.who), where.in_store)
            assert (left == set(range(SIZE))) is any(True for _ in ways(rest, taker, serving))


@given(st.integers(1, 6), st.integers(1, 6))
def test_own_memory_is_told_from_a_peers(size: int, workers: int) -> None:
    """Where each has the snapshots of its own part of the world, nothing is fetched from a peer."""
    takers = tuple(range(10, 10 + workers))
    own = {rank: takers[rank * workers // size] for rank in range(size)}
    moved = {rank: takers[(takers.index(worker) + 1) % workers] for rank, worker in own.items()}
    for homes, origin in ((own, Origin.MEMORY), (moved, Origin.PEER if workers > 1 else Origin.MEMORY)):
        told = [
            WorkerMemory(
                worker,
                (a_held("x", 9, size, tuple(rank for rank, home in homes.items() if home == worker)),),
                f"https://{worker}",
            )
            for worker in takers
        ]
        (only,) = planned(RUN, RunStatus(attempt=1), [], told, takers)
        assert only.origin is origin


def a_held(save_id: str, step: int, size: int, ranks: tuple[int, ...], attempt: int = 1) -> Held:
    """Snapshots of these ranks."""
    return Held(
        save_id=save_id, run_uid=RUN, attempt=attempt, step=step, tokens=0, world_size=size, ranks=ranks, lineage=()
    )


def test_workers_that_describe_a_save_differently_do_not_make_it_whole() -> None:
    """One of them lies, or two saves have got one name: nothing that is mixed of both is ever restored."""
    told = [
        WorkerMemory(0, (a_held("x", 9, 2, (0,)),), "https://0"),
        WorkerMemory(1, (a_held("x", 8, 2, (1,)),), "https://1"),
    ]
    assert planned(RUN, RunStatus(attempt=1), [], told, (0, 1)) == ()
    counted = [WorkerMemory(n, (replace(a_held("x", 9, 2, (n,)), tokens=n),), f"https://{n}") for n in range(2)]
    assert [each.state.ref.step for each in planned(RUN, RunStatus(attempt=1), [], counted, (0, 1))] == [9]
    absurd = [WorkerMemory(0, (a_held("x", 9, 10**12, (0,)), a_held("y", 9, 1, (0, 7)), a_held("z", 9, 0, ())), "")]
    assert [each.state.ref.uri for each in planned(RUN, RunStatus(attempt=1), [], absurd, (0,))] == ["memory:y"]


def test_memory_is_taken_up_when_the_status_was_lost() -> None:
    """The line of the newest attempt that is found, in memory or in the store, is gone on with."""
    ref = CheckpointRef(uri="a", step=5, attempt=1)
    stored = [StoredCheckpoint(ref=ref, run_uid=RUN, committed_at=1.0)]
    lineage = (Ancestor(attempt=1, step=5, uid=RUN),)
    told = [WorkerMemory(0, (replace(a_held("x", 9, 1, (0,), attempt=2), lineage=lineage),), "")]
    assert [each.state.ref.uri for each in planned(RUN, RunStatus(), stored, told, (0,))] == ["memory:x", "a"]


def test_no_launch_is_too_long_for_the_environment_of_a_rank() -> None:
    """The kernel takes 128 KiB for one variable; the holders of a large gang are cut to the nearest."""
    ranks = tuple(range(MAX_HOLDERS))
    lineage = tuple(Ancestor(attempt=n, step=10**9 + n, uid="1b4e28ba-2fa1-11d2-883f-0016d3cca427") for n in range(60))
    told = [
        WorkerMemory(
            n,
            (replace(a_held("0123456789abcdef", 10**9, MAX_HOLDERS, ranks[first : first + 16]), lineage=lineage),),
            "https://[2001:db8:1234:5678:9abc:def0:1234:5678]:40123",
        )
        for n, first in [*enumerate(range(0, MAX_HOLDERS, 8)), (4000, 0)]
    ]
    takers = tuple(each.worker for each in told)
    able = planned(RUN, RunStatus(attempt=1), [], told, takers)
    assert len(able) == 1
    given = holders(0, saves_in_memory(told), {each.worker: each.url for each in told})
    assert [each.rank for each in given] == list(ranks)
    launch = Launch(
        attempt=1,
        world_size=MAX_HOLDERS,
        first_rank=0,
        ranks=8,
        workers=100,
        master_addr="2001:db8:1234:5678:9abc:def0:1234:5678",
        master_port=40_000,
        restore=tuple(each.state.ref for each in able),
        holders=given,
    )
    assert len(encode(launch)) < (128 << 10) - 1024
