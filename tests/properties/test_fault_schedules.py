"""Whatever happens to a run, in whatever order: what design section 3 promises holds."""

from __future__ import annotations

from hypothesis import example, given, note
from hypothesis import strategies as st
from msgspec.structs import replace

from faults import (
    EVERYTHING,
    MACHINERY_FAULTS,
    RANK_FAULTS,
    SHARED_FAULTS,
    WORKER_FAULTS,
    Fault,
    Rehearsal,
    broken_promises,
    generously,
    schedules,
)
from mend import strikes
from mend.actions import EmitEvent, PruneCheckpoints
from mend.decide import decide
from mend.heartbeats import RankExit
from mend.incidents import FailureClass
from mend.restore import latest_attempt
from mend.status import RunPhase
from mend.transitions import attempt_heard
from world import World, a_spec

FIXPOINT_LOOKS = 4
ONE_WORKERS = ("kill", "stop", "stuck", "oom", "lose node", "kill agent")


def play(schedule: list[Fault], world: World | None = None, *, rejoins: bool = False, memory: int = 0) -> World:
    """The world after the schedule, its story noted for whoever has to read a failure."""
    note("\n".join(map(str, schedule)))
    rehearsal = Rehearsal(world, rejoins=rejoins, memory=memory)
    try:
        return rehearsal.play(schedule)
    finally:
        note("\n".join(rehearsal.world.story))


@generously
@given(schedules(EVERYTHING), st.booleans())
def test_every_schedule_ends_and_no_promise_is_broken(schedule: list[Fault], rejoins: bool) -> None:
    """Every schedule ends succeeded, or failed with a reason; on the way no promise is broken."""
    assert broken_promises(play(schedule, rejoins=rejoins)) == []


@generously
@given(schedules((*RANK_FAULTS, *MACHINERY_FAULTS, "kill agent", "spoil", "cut"), most=7))
def test_ranks_that_rejoin_break_no_promise(schedule: list[Fault]) -> None:
    """As above, where ranks keep their processes and all that happens is likely to meet a rejoin under way."""
    assert broken_promises(play(schedule, rejoins=True)) == []


WIPED_AND_KILLED_AGAIN = [  # the third attempt goes back further than the second was, and never makes a step
    Fault(after=4.8, what="kill", who=0, seconds=0.5),
    Fault(after=1.2, what="wipe status", who=0, seconds=0.5),
    Fault(after=2.0, what="kill", who=0, seconds=0.5),
]


@generously
@given(schedules(EVERYTHING), st.sampled_from([1, 3, 10]), st.booleans())
@example(WIPED_AND_KILLED_AGAIN, 3, True)
def test_snapshots_break_no_promise(schedule: list[Fault], memory: int, rejoins: bool) -> None:
    """As above, where workers hold snapshots, copies of their buddies', and sometimes spoilt ones or no saver."""
    assert broken_promises(play(schedule, rejoins=rejoins, memory=memory)) == []


@generously
@given(
    st.lists(st.tuples(st.sampled_from(ONE_WORKERS), st.integers(0, 5), st.integers(0, 9)), max_size=4),
    st.booleans(),
    st.integers(0, 1),
)
def test_with_a_snapshot_of_each_step_no_incident_costs_more_than_one(
    harms: list[tuple[str, int, int]], rejoins: bool, spares: int
) -> None:
    """Whichever rank or worker is lost, one after the other and once copies had the time to be made: a step at most."""
    spec = a_spec(3, 2, spares=spares, recovery={"budgets": {"user": 50}})
    world = World(spec, nodes=5, steps=200, save_every=100, memory=1, rejoins=rejoins)
    for what, who, ticks in harms:
        world.until_training()
        step = world.gang.step if world.gang is not None else 0
        world.until_step(step + 3).run(ticks / 10)
        match what:
            case "lose node":
                world.lose_node(world.status.participants[who // 2])
            case "kill agent":
                world.kill_agent(world.status.participants[who // 2])
            case _:
                world.harm_rank(who, what)
        world.until(lambda world: world.status.phase is RunPhase.RECOVERING)
    world.until_training()
    note("\n".join(world.story))
    assert [each.steps_lost for each in world.status.incidents if (each.steps_lost or 0) > 1] == []
    assert len(world.status.incidents) == len(harms)


@generously
@given(schedules(EVERYTHING), st.integers(1, 2), st.integers(1, 2), st.booleans())
def test_spares_and_strikes_break_no_promise(schedule: list[Fault], spares: int, limit: int, rejoins: bool) -> None:
    """With spares that take over, and nodes that are kept away from, all promises hold as they do without."""
    recovery = {"shrinkAfter": "20s", "nodeStrikes": {"limit": limit, "expireAfter": "60s"}}
    world = World(
        a_spec(2, 2, minimum=1, spares=spares, recovery=recovery), nodes=2 + spares, steps=60, rejoins=rejoins
    )
    assert broken_promises(play(schedule, world)) == []


@generously
@given(
    st.sets(st.integers(0, 5), min_size=1),
    st.lists(st.integers(0, 1), min_size=6, max_size=6),
    st.integers(3, 6),
    st.booleans(),
)
def test_a_program_that_crashes_at_its_start_excludes_no_node_after_another(
    crashing: set[int], ticks_later: list[int], nodes: int, rejoins: bool
) -> None:
    """Ranks that end by a signal before their first step, wherever they run, move no strike from node to node.

    None is given where the ranks of several workers crash; where those of one do, the first node gets one that is not
    decisive, and no other node any.
    """
    world = World(a_spec(3, 2), nodes=nodes, steps=60, rejoins=rejoins)
    for attempt in range(1, 9):
        world.until(lambda world, n=attempt: world.status.attempt >= n and is_loaded(world))
        segfault(world, {rank: ticks_later[rank] for rank in crashing})
        note("\n".join(world.story))
    world.until(lambda world: world.status.attempt > 8)
    struck = {each.node for each in (*world.book, *world.status.strikes)}
    assert len(struck) <= (1 if len({rank // 2 for rank in crashing}) == 1 else 0)
    assert strikes.excluded(world.book, world.spec.recovery.node_strikes.limit, world.now) == ()


def test_a_node_that_a_program_seems_to_condemn_is_freed_when_the_crash_goes_with_it() -> None:
    """A rank that crashes at every start wherever it is: its node is kept away from until it crashes on another one."""
    world, kept_away = World(a_spec(3, 2), nodes=5, steps=60), []
    while not world.status.phase.is_final:
        world.until(lambda world: world.status.phase.is_final or is_loaded(world))
        segfault(world, {3: 0})
        kept_away.append(strikes.excluded(world.book, 2, world.now))
    assert {each for each in kept_away if each} == {("node-1",)}
    assert kept_away[-1] == ()
    assert all(each.lifted for each in world.book)


def is_loaded(world: World) -> bool:
    """Whether all ranks of the newest gang are there and have made no step yet."""
    gang = world.gang
    return gang is not None and gang.complete and gang.loaded_at is not None and not gang.steps_done


def segfault(world: World, when: dict[int, int]) -> None:
    """These ranks end by signal 11, each so many ticks after now."""
    for tick in (0, 1):
        for rank in world.live_ranks():
            if when.get(rank.number) == tick:
                rank.end(world.now, RankExit(signal=11))
        world.tick()


@generously
@given(schedules((*MACHINERY_FAULTS, "suspend", "wipe status", "cut all"), most=4))
def test_faults_of_the_machinery_never_fail_a_run(schedule: list[Fault]) -> None:
    """Whatever befalls controller, orders, watches and status, a run whose ranks are healthy succeeds."""
    world = play(schedule)
    assert world.status.phase is RunPhase.SUCCEEDED
    assert broken_promises(world) == []


@generously
@given(schedules((*RANK_FAULTS, *WORKER_FAULTS, "controller dies", "suspend"), most=4))
def test_doing_every_action_twice_is_the_same_as_once(schedule: list[Fault]) -> None:
    """A controller that carries out each action twice has the same story to tell."""
    twice = World(a_spec(2, 2), nodes=3, steps=60, rejoins=True)
    twice.twice = True
    assert play(schedule, twice).story == play(schedule, World(a_spec(2, 2), nodes=3, steps=60, rejoins=True)).story


@generously
@given(schedules(EVERYTHING, most=4))
def test_a_decision_that_was_written_down_is_not_taken_again(schedule: list[Fault]) -> None:
    """Asked again at once with its own status, `decide` soon changes it no more, and begins one attempt at the most.

    That one is the next above all that are known, be it from agents, pods or the store: a status may have been wiped.
    """
    world = Rehearsal().play(schedule)
    for seen, said in world.decisions:
        at = said.status.accounted_at or 0.0
        now = max(at, said.status.finished_at or 0.0, said.status.attempt_started_at or 0.0)
        status = said.status
        known = max(status.attempt, attempt_heard(seen), latest_attempt(seen.store.checkpoints))
        known = max([known, *(pod.attempt for pod in seen.pods)])
        for _ in range(FIXPOINT_LOOKS):
            again = decide(world.spec, replace(seen, status=status), now)
            assert again.status.attempt in (said.status.attempt, known + 1)
            if again.status == status:
                break
            status = again.status
        else:
            raise AssertionError(f"still changing: {said.reason}")


@generously
@given(workers=st.integers(1, 4), ranks=st.integers(1, 3), steps=st.integers(5, 60), every=st.integers(1, 20))
def test_a_healthy_run_is_left_alone(workers: int, ranks: int, steps: int, every: int) -> None:
    """Between its first step and its end a healthy run sees no action but retention, and few looks."""
    world = World(a_spec(workers, ranks), steps=steps, save_every=every).until_training()
    before, since = len(world.decisions), world.now
    world.until(lambda world: world.gang is not None and world.gang.finished)
    looks = world.decisions[before:]
    actions = [action for _, said in looks for action in said.actions]
    assert [action for action in actions if not isinstance(action, PruneCheckpoints)] == []
    saves = len(world.bucket.checkpoints) + len(world.pruned)
    # The limit of a step of half a second is one second: half a second after what was heard, it could run out.
    assert len(looks) <= 2 + 2 * (world.now - since) + 2 * saves
    world.until_end()
    assert (world.status.phase, world.status.incidents, world.status.attempt) == (RunPhase.SUCCEEDED, (), 1)


@generously
@given(schedules((*RANK_FAULTS, *WORKER_FAULTS, *SHARED_FAULTS)), st.integers(0, 3))
def test_budgets_bound_the_recoveries(schedule: list[Fault], budget: int) -> None:
    """No class of failure is recovered from more often than its budget allows."""
    budgets = {"user": budget, "infrastructure": budget, "hang": budget, "preemption": budget}
    world = play(schedule, World(a_spec(2, 2, recovery={"budgets": budgets}), nodes=4, steps=60))
    assert all(len(spent) <= budget for spent in world.status.spent.values())
    assert world.status.recoveries <= budget * len(FailureClass)


@generously
@given(schedules((*RANK_FAULTS, "spoil", "outage", "controller dies", "preempt", "stale pods")))
def test_retention_never_takes_what_may_be_needed(schedule: list[Fault]) -> None:
    """Neither the newest verified checkpoint, one that a launch may yet restore, nor its parent is ever pruned."""
    world = play(schedule, World(a_spec(2, 2), nodes=3, steps=60, save_every=5))
    assert world.pruned_wrongly == []
    for seen, said in world.decisions:
        pruned = {uri for action in said.actions if isinstance(action, PruneCheckpoints) for uri in action.uris}
        verified = [each for each in seen.store.checkpoints if each.verified and not each.quarantined]
        newest = max(verified, key=lambda each: (each.ref.attempt, each.ref.step), default=None)
        assert newest is None or newest.ref.uri not in pruned
        assert not pruned or seen.status.phase is RunPhase.RUNNING or said.status.phase is RunPhase.RUNNING


@generously
@given(schedules((*EVERYTHING,), most=5))
def test_the_ledger_adds_up(schedule: list[Fault]) -> None:
    """The entries of the ledger sum up to the time between the first attempt and the end, by a steady clock."""
    steady = [fault for fault in schedule if fault.what not in ("clock back", "clock ahead", "wipe status")]
    world = play(steady)
    ledger, status = world.status.ledger, world.status
    spent = (ledger.pending, ledger.starting, ledger.productive, ledger.lost, ledger.detecting, ledger.recovering)
    assert all(seconds >= 0 for seconds in spent)
    assert status.started_at is not None
    assert status.finished_at is not None
    elapsed = status.finished_at - status.started_at
    suspended_before_start = ledger.suspended  # a run may be suspended before its first attempt
    assert sum(spent) <= elapsed + 0.01
    assert sum(spent) + suspended_before_start >= elapsed - 0.01


def test_events_of_a_recovery_are_few() -> None:
    """A person who reads the Events of a run with one crash reads four."""
    world = World(a_spec()).until_step(15)
    world.harm_rank(3, "kill")
    world.until_end()
    events = [action.reason for _, said in world.decisions for action in said.actions if isinstance(action, EmitEvent)]
    assert events == ["Started", "Training", "RankCrashed", "Training", "Completed"]
