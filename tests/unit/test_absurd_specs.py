"""A spec or a log of absurd size costs its own run a message, and the others nothing."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from crds import sample, schema
from mend.actions import CreateWorker
from mend.assembling import MAX_CREATIONS
from mend.decide import decide
from mend.listing import StoreView
from mend.observation import PodPhase, WorkerPod
from mend.spec import MAX_RANKS, MAX_RANKS_PER_WORKER, MAX_REPLICAS, InvalidSpec, parse_spec
from mend_local.schema import Schema
from simulated_pod import Node
from world import EPOCH, World, a_spec

NO_BUDGETS = replace(a_spec().recovery.budgets, infrastructure=0)


@pytest.mark.parametrize(
    ("workers", "named"),
    [
        ({"replicas": MAX_REPLICAS + 1}, "replicas"),
        ({"replicas": 300_000}, "replicas"),
        ({"ranksPerWorker": MAX_RANKS_PER_WORKER + 1}, "ranksPerWorker"),
        ({"replicas": MAX_REPLICAS, "ranksPerWorker": MAX_RANKS // MAX_REPLICAS + 1}, "replicas"),
    ],
)
def test_what_is_beyond_any_gang_is_refused(workers: dict[str, int], named: str) -> None:
    """By the API server and by the parser, which names the field."""
    run = sample()
    run["spec"]["workers"] |= workers
    with pytest.raises(InvalidSpec, match=re.escape(f"spec.workers.{named}: got")):
        parse_spec(run["spec"])
    stored, _ = Schema(schema()).admit(run)
    assert Schema(schema()).problems(stored, None)


def test_the_largest_gang_is_taken() -> None:
    """The bounds themselves are allowed."""
    run = sample()
    run["spec"]["workers"] |= {"replicas": MAX_REPLICAS, "ranksPerWorker": MAX_RANKS // MAX_REPLICAS}
    stored, _ = Schema(schema()).admit(run)
    assert Schema(schema()).problems(stored, None) == []
    assert parse_spec(run["spec"]).world_size == MAX_RANKS


def test_pods_are_made_so_many_at_a_time() -> None:
    """One decision about a big gang leaves the controller free for other runs; it comes to all of them in the end."""
    spec = a_spec(120, 1)
    world = World(spec)
    assert world.controller is not None
    seen = replace(
        world.observe(world.controller), store=StoreView(listed=True), has_token=True, has_tls=True, has_service=True
    )
    made: list[int] = []
    for _ in range(3):
        said = decide(spec, seen, EPOCH + 1.0)
        new = [action.index for action in said.actions if isinstance(action, CreateWorker)]
        assert len(new) <= MAX_CREATIONS
        assert said.wake_after is not None
        made += new
        pods = tuple(WorkerPod(index=n, name=f"clio-{n}", uid=f"uid-{n}", attempt=1) for n in made)
        seen = replace(seen, status=said.status, pods=pods)
    assert sorted(made) == list(range(120))


def test_a_line_of_any_length_is_cut_where_it_is_quoted() -> None:
    """The status must never become too long for the API server to take it, whatever a program prints as it dies."""
    world = World(a_spec()).until_training()
    assert world.controller is not None
    seen = world.observe(world.controller)
    pods = tuple(
        replace(pod, phase=PodPhase.FAILED, exit_code=1, log_tail=("x" * 1_000_000,) * 20, message="y" * 1_000_000)
        for pod in seen.pods
    )
    spec = replace(world.spec, recovery=replace(world.spec.recovery, budgets=NO_BUDGETS))
    for each in (world.spec, spec):
        said = decide(each, replace(seen, pods=pods), world.now)
        assert len(repr(said.status)) < 50_000


def test_an_agent_that_is_stopped_does_not_outlive_its_run() -> None:
    """A frozen process keeps its connection but obeys no order: its pod is deleted a while after the end."""
    world = World(a_spec()).until(lambda world: world.gang is not None and world.gang.finished)
    world.until_end()
    for pod in world.pods:
        if pod.agent is not None:
            pod.agent.exit_code, pod.phase, pod.agent.frozen = None, PodPhase.RUNNING, True
    world.run(150.0)
    assert [pod.index for pod in world.pods if pod.running] == []


def test_a_silent_agent_is_not_counted_as_ready() -> None:
    """Nothing is launched on it, although it is connected, until it is heard again."""
    world = World(a_spec(), nodes=1)
    world.until(lambda world: any(pod.agent is not None for pod in world.pods))
    (first,) = [pod for pod in world.pods if pod.agent is not None]
    world.freeze_agent(first.index)
    world.nodes.append(Node("late"))
    world.run(3.0)
    assert sum(pod.agent is not None for pod in world.pods) == 2
    assert world.status.participants == ()
    assert first.agent is not None
    first.agent.frozen = False
    world.until_end()
    assert world.status.attempt == 1
