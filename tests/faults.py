"""Generated schedules of faults against the simulated cluster, and what must hold whatever happens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import groupby, pairwise

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mend.status import RunPhase
from world import World, a_spec

EXAMPLES = int(os.environ.get("MEND_FAULT_SCHEDULES", "50"))  # the campaigns of `make bench` ask for more
generously = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)

CALM_SECONDS = 400.0  # by then, after the last fault, every run must have ended


@dataclass(frozen=True)
class Fault:
    """One thing that happens `after` seconds; `who` is a rank or a worker, `seconds` how long it lasts."""

    after: float
    what: str
    who: int
    seconds: float

    def __str__(self) -> str:
        return f"after {self.after:g} s: {self.what} {self.who} ({self.seconds:g} s)"


RANK_FAULTS = ("kill", "raise", "stop", "stuck", "skipping", "saving")
WORKER_FAULTS = ("lose node", "kill agent", "freeze agent", "preempt", "cut")
NODE_FAULTS = ("ill node", "harm a spare")
SHARED_FAULTS = ("network", "spoil", "outage", "cut all")
MEMORY_FAULTS = ("spoil snapshots", "kill saver", "node will go")
MACHINERY_FAULTS = (
    "controller dies",
    "controller dies after status",
    "controller dies after action",
    "stale pods",
    "orders lost",
    "orders doubled",
    "orders late",
    "old leader",
    "clock back",
    "clock ahead",
)
EDITS = ("suspend", "scale", "wipe status")
EVERYTHING = (*RANK_FAULTS, *WORKER_FAULTS, *NODE_FAULTS, *SHARED_FAULTS, *MEMORY_FAULTS, *MACHINERY_FAULTS, *EDITS)


def schedules(kinds: tuple[str, ...] = EVERYTHING, most: int = 7) -> st.SearchStrategy[list[Fault]]:
    """Lists of faults of these kinds, each some time after the one before."""
    fault = st.builds(
        Fault,
        after=st.floats(0.0, 12.0).map(lambda seconds: round(seconds, 1)),
        what=st.sampled_from(kinds),
        who=st.integers(0, 3),
        seconds=st.sampled_from([0.5, 2.0, 6.0, 12.0, 40.0]),
    )
    return st.lists(fault, max_size=most)


class Rehearsal:
    """A world in which a schedule of faults is played."""

    def __init__(self, world: World | None = None, *, rejoins: bool = False, memory: int = 0) -> None:
        spec = a_spec(2, 2, minimum=1, recovery={"shrinkAfter": "20s"})
        self.world = world or World(spec, nodes=3, steps=60, rejoins=rejoins, memory=memory)
        self.undo: list[tuple[float, str]] = []
        self.hands: list[tuple[float, object]] = []

    def play(self, schedule: list[Fault]) -> World:
        """All faults at their times, then calm until the run has ended."""
        for fault in schedule:
            self._go_on(fault.after)
            self._commit(fault)
        self._go_on(max((at - self.world.now for at, _ in self.undo), default=0.0))
        self.world.heal()
        return self.world.until_end(CALM_SECONDS)

    def _go_on(self, seconds: float) -> None:
        until = self.world.now + seconds
        while self.world.now < until:
            for due in [each for each in self.undo if each[0] <= self.world.now]:
                self.undo.remove(due)
                self._end(due[1])
            self.world.tick()

    def _commit(self, fault: Fault) -> None:
        world, what, who = self.world, fault.what, fault.who
        worker = who % world.spec.workers.replicas
        if what in RANK_FAULTS:
            world.harm_rank(who, what)
        match what:
            case "lose node":
                world.lose_node(worker)
            case "kill agent":
                world.kill_agent(worker)
            case "freeze agent":
                world.freeze_agent(worker)
            case "preempt":
                world.preempt(worker, grace_seconds=min(fault.seconds, 12.0))
            case "ill node":
                world.make_node_ill(worker, "condition KernelDeadlock")
            case "harm a spare":
                world.kill_agent(world.spec.workers.replicas + who % (world.spec.workers.spares or 1))
            case "cut":
                world.cut_streams(fault.seconds, worker)
            case "cut all":
                world.cut_streams(fault.seconds)
            case "network":
                world.break_network()
            case "spoil":
                world.spoil_newest()
            case "spoil snapshots":
                world.spoil_snapshots()
            case "kill saver":
                world.kill_saver(worker, fault.seconds)
            case "node will go":
                world.announce_end_of_node(worker, "taint karpenter.sh/disrupted")
            case "outage":
                world.bucket.available = False
            case "controller dies":
                world.kill_controller(down_for=fault.seconds)
            case "controller dies after status":
                world.kill_controller("status")
            case "controller dies after action":
                world.kill_controller("action")
            case "stale pods":
                world.see_stale_pods(min(fault.seconds, 6.0))
            case "orders lost":
                world.orders_fail_until = world.now + fault.seconds
            case "orders doubled":
                world.orders_double = True
            case "orders late":
                world.orders_late_seconds = min(fault.seconds, 6.0)
            case "old leader":
                world.put_in_hand(fault.seconds)
            case "clock back":
                world.skew -= 100 * fault.seconds
            case "clock ahead":
                world.skew += 10 * fault.seconds
            case "suspend":
                world.suspend()
            case "scale":
                world.scale(1 + who % 3)
            case "wipe status":
                world.wipe_status()
        self.undo.append((world.now + fault.seconds, what))

    def _end(self, what: str) -> None:
        match what:
            case "outage":
                self.world.bucket.available = True
            case "orders doubled":
                self.world.orders_double = False
            case "orders late":
                self.world.orders_late_seconds = 0.0
            case "suspend":
                self.world.suspend(False)


def broken_promises(world: World) -> list[str]:
    """What was promised and not kept, in sentences; empty if all is well."""
    return [
        *_ended_with_a_reason(world),
        *_attempts_grew(world),
        *_attempts_trained_one_after_the_other(world),
        *(f"a state off the lineage: {each}" for each in world.restored_wrongly),
        *(f"pruned although it may be needed: {each}" for each in world.pruned_wrongly),
        *_launches_were_repeated_alike(world),
        *_nobody_healthy_was_blamed(world),
        *_no_healthy_node_was_struck(world),
        *_every_place_was_held_by_one(world),
    ]


def _ended_with_a_reason(world: World) -> list[str]:
    status = world.status
    kind = "Succeeded" if status.phase is RunPhase.SUCCEEDED else "Failed"
    told = any(each.type == kind and each.status == "True" and each.message for each in status.conditions)
    return [] if status.phase.is_final and told else [f"ended as {status.phase} without a reason"]


def _attempts_grew(world: World) -> list[str]:
    attempts = [seen.status.attempt for seen, _ in world.decisions] if not world.wiped else []
    grew = all(before <= after for before, after in pairwise(attempts))
    backward = [(seen, said) for seen, said in world.decisions if said.status.attempt < seen.status.attempt]
    return [] if grew and not backward else [f"attempts went back: {attempts}"]


def _attempts_trained_one_after_the_other(world: World) -> list[str]:
    if world.wiped:  # once every trace of an attempt is gone with its status, the number may be given again
        in_order = len([number for number, _ in groupby(world.trained)]) == len(set(world.trained))
    else:
        in_order = world.trained == sorted(world.trained)
    return [] if in_order else [f"attempts trained at the same time: {list(dict.fromkeys(world.trained))}"]


def _launches_were_repeated_alike(world: World) -> list[str]:
    if world.wiped:  # an attempt that nobody had heard of yet may be handed out again
        return []
    found = []
    for attempt, launches in world.launches.items():
        restores = {launch.restore for _, launch in launches}
        worlds = {(launch.world_size, launch.master_addr) for _, launch in launches}
        if len(restores) > 1 or len(worlds) > 1:
            found.append(f"attempt {attempt} was launched in different ways: {launches}")
    return found


def _nobody_healthy_was_blamed(world: World) -> list[str]:
    return [
        f"incident {each.id} of attempt {each.attempt} blames {each.culprit_ranks}: {each.summary}"
        for each in world.status.incidents
        if not all(world.is_guilty(each.attempt, rank) for rank in each.culprit_ranks)
    ]


def _no_healthy_node_was_struck(world: World) -> list[str]:
    return [
        f"{each.node} was struck, where nothing was ever harmed: {each.reason}"
        for each in (*world.book, *world.status.strikes)
        if each.node not in world.harmed_nodes
    ]


def _every_place_was_held_by_one(world: World) -> list[str]:
    """In each attempt as many workers as the gang has places, each with ranks of its own."""
    if world.wiped:  # an attempt that nobody had heard of yet may be handed out again
        return []
    found = []
    for attempt, launches in world.launches.items():
        held = {worker: launch.first_rank for worker, launch in launches}
        twice = len(held) != len(set(held.values())) or len(held) < len({(w, la.first_rank) for w, la in launches})
        if twice or any(launch.workers < len(held) for _, launch in launches):
            found.append(f"attempt {attempt} gave places twice: {sorted(held.items())}")
    return found
