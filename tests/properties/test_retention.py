"""Retention over generated lives: what is promised stays, and what could be restored can be restored still."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mend.heard import EVALUATIONS
from mend.listing import StoredCheckpoint, StoreView
from mend.observation import Observation
from mend.restore import candidates, expendable, lineage_after, on_lineage
from mend.scores import NEWEST, with_scores
from mend.spec import Checkpointing, KeepBest
from mend.states import Ancestor, CheckpointRef
from mend.status import Evaluation, RunStatus

UID = "uid"
marks = st.sets(st.sampled_from(["verified", "pinned", "quarantined"]))
deeds = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.integers(1, 9), marks),
        st.tuples(st.just("evaluate"), st.integers(0, 100)),
        st.tuples(st.just("restart"), st.integers(0, 4)),
        st.tuples(st.just("prune")),
    ),
    max_size=60,
)
rules_of = st.builds(
    Checkpointing,
    uri=st.just("s3://b/p"),
    keep_last=st.integers(2, 4),
    keep_every=st.one_of(st.none(), st.integers(2, 7)),
    keep_best=st.one_of(
        st.none(),
        st.builds(KeepBest, metric=st.just("acc"), mode=st.sampled_from(["max", "min"]), count=st.integers(1, 3)),
    ),
)


class Life:
    """A run with its bucket, whose retention runs whenever it is told to."""

    def __init__(self, rules: Checkpointing) -> None:
        self.rules = rules
        self.step = 0
        self.stored: dict[str, StoredCheckpoint] = {}
        self.told: list[Evaluation] = []
        self.true: dict[str, float] = {}  # by uri: what a checkpoint is worth, from the whole history
        self.status = RunStatus(attempt=1, restored_step=-1)

    def do(self, deed: tuple[object, ...]) -> None:
        match deed:
            case ("save", int(steps), set(how)):
                self.step += steps
                ref = CheckpointRef(
                    uri=f"{self.status.attempt}/{self.step}", step=self.step, attempt=self.status.attempt
                )
                self.stored[ref.uri] = StoredCheckpoint(
                    ref=ref, run_uid=UID, lineage=self.status.lineage, **dict.fromkeys(map(str, how), True)
                )
            case ("evaluate", int(value)):
                if not self.told or self.told[-1].step < self.step or self.told[-1].attempt < self.status.attempt:
                    each = Evaluation(name="acc", attempt=self.status.attempt, step=self.step, value=float(value))
                    self.told.append(each)
            case ("restart", int(choice)):
                able = candidates(UID, self.status, self.stored.values())
                taken = able[min(choice, len(able) - 1)] if able else None
                self.step = taken.ref.step if taken else 0
                lineage = lineage_after(taken) if taken else ()
                self.status = replace(self.status, attempt=self.status.attempt + 1, lineage=lineage)
                self.told = []
            case ("prune",):
                self.prune()

    def look(self) -> None:
        """As the controller does at every look."""
        seen = Observation(
            name="clio",
            namespace="team",
            uid=UID,
            generation=1,
            created_at=0.0,
            status=self.status,
            store=StoreView(listed=True, checkpoints=tuple(self.stored.values())),
            evaluations=tuple(self.told[-EVALUATIONS:]),
        )
        self.status = with_scores(self.rules, self.status, seen)

    def prune(self) -> tuple[StoredCheckpoint, ...]:
        gone = expendable(UID, self.status, self.rules, self.stored.values())
        for each in gone:
            del self.stored[each.ref.uri]
        return gone


@settings(max_examples=300, deadline=None)
@given(rules_of, deeds)
def test_what_is_promised_stays(rules: Checkpointing, life: list[tuple[object, ...]]) -> None:
    """The newest, the newest verified, every pinned one, what the attempt stands on, and as many best as are wanted."""
    run = Life(rules)
    for deed in life:
        run.do(deed)
        run.look()
        line = on_lineage(UID, run.status, run.stored.values())
        before = dict(run.stored)
        newest_verified = next((each for each in line if each.verified), None)
        parent = run.status.lineage[-1] if run.status.lineage else None
        best = [(each.attempt, each.step) for each in run.status.scores][
            : rules.keep_best.count if rules.keep_best else 0
        ]
        gone = run.prune()
        assert not [each for each in gone if each.pinned or each.quarantined or each not in line]
        assert newest_verified not in gone
        assert not set(line[: rules.keep_last]) & set(gone)
        assert not [each for each in gone if rules.keep_every and each.ref.step % rules.keep_every == 0]
        assert not [
            each for each in gone if parent and (each.ref.attempt, each.ref.step) == (parent.attempt, parent.step)
        ]
        assert not [each for each in gone if (each.ref.attempt, each.ref.step) in best]
        assert run.prune() == ()  # once more changes nothing
        run.stored = before if deed[0] != "prune" else run.stored


@settings(max_examples=200, deadline=None)
@given(rules_of, deeds)
def test_what_can_be_restored_can_be_restored_still(rules: Checkpointing, life: list[tuple[object, ...]]) -> None:
    """Retention takes no last resort: the best candidate stays the best, and there are as many as are kept."""
    run = Life(rules)
    for deed in life:
        run.do(deed)
        run.look()
        able = candidates(UID, run.status, run.stored.values())
        run.prune()
        left = candidates(UID, run.status, run.stored.values())
        assert left[:2] == able[:2]
        assert len(left) >= min(len(able), rules.keep_last)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40, unique=True), st.integers(1, 3), st.booleans())
def test_the_best_are_the_best_of_the_whole_run(values: list[int], count: int, more: bool) -> None:
    """Although only the newest evaluations are remembered, and checkpoints were pruned all the way."""
    best = KeepBest(metric="acc", mode="max" if more else "min", count=count)
    run = Life(Checkpointing(uri="s3://b/p", keep_last=2, keep_best=best))
    for value in values:
        run.do(("save", 3, set()))
        run.do(("evaluate", value))
        run.look()
        run.prune()
    wanted = sorted(values, reverse=more)[:count]
    kept = {each.ref.step // 3 - 1 for each in run.stored.values()}
    assert {values.index(value) for value in wanted} <= kept
    assert len(run.stored) <= count + 2
    assert len(run.status.evaluations) <= NEWEST


def a_life(*deeds: tuple[object, ...]) -> Life:
    """One life, with the best checkpoint kept."""
    run = Life(Checkpointing(uri="s3://b/p", keep_last=2, keep_best=KeepBest(metric="acc")))
    for deed in deeds:
        run.do(deed)
        run.look()
    return run


def scored(run: Life) -> list[tuple[int, float]]:
    """Steps of the best checkpoints with their worth, best first."""
    return [(each.step, each.value) for each in run.status.scores]


def test_an_evaluation_speaks_for_the_first_checkpoint_after_it() -> None:
    """Of the same step, or of a later one as long as no other evaluation came; others have no score."""
    save = ("save", 1, set())
    assert scored(a_life(save, ("evaluate", 5), save, save)) == [(1, 5.0)]
    assert scored(a_life(("evaluate", 5), save, save)) == [(1, 5.0)]
    assert scored(a_life(("evaluate", 5), save, ("evaluate", 7), save)) == [(1, 7.0)]


def test_what_was_evaluated_off_the_lineage_counts_for_nothing() -> None:
    """A future that was given up takes its scores with it."""
    save = ("save", 10, set())
    run = a_life(save, ("evaluate", 5), save, ("evaluate", 99), ("restart", 1))
    assert run.status.lineage == (Ancestor(attempt=1, step=10, uid=UID),)
    assert scored(run) == [(10, 5.0)]


def test_another_metric_starts_anew() -> None:
    """Values of one metric say nothing of another."""
    run = a_life(("save", 10, set()), ("evaluate", 5))
    run.rules = replace(run.rules, keep_best=KeepBest(metric="loss_on_books", mode="min"))
    run.look()
    assert scored(run) == []


def test_what_a_launch_may_yet_restore_is_kept() -> None:
    """Until a rank has said what it started from, all that it was offered stays."""
    save = ("save", 1, set())
    run = a_life(*[save] * 6)
    offered = tuple(each.ref for each in candidates(UID, run.status, run.stored.values()))
    run.status = replace(run.status, restore=offered, restored_step=None)
    assert {each.ref for each in run.prune()} & set(offered) == set()
    run.status = replace(run.status, restored_step=6)
    assert run.prune()
