"""A controller that is killed, stopped or superseded at any moment: the next continues, and nothing is disturbed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from cluster import ControllerProcess, TrainingCluster, training_cluster
from mend.status import RunPhase, RunStatus

SEED = 2026


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    """A cluster whose controllers are the tests' own."""
    with training_cluster(tmp_path_factory.mktemp("cluster"), with_controller=False) as cluster:
        yield cluster


@pytest.fixture
def controller(cluster: TrainingCluster) -> Iterator[ControllerProcess]:
    """A running controller; killed afterwards."""
    controller = ControllerProcess(cluster)
    controller.start()
    yield controller
    controller.end()


def kill_when(
    cluster: TrainingCluster, controller: ControllerProcess, name: str, holds: Callable[[RunStatus], bool]
) -> None:
    """kill -9 the controller as soon as the run's status is so, and start another one."""
    cluster.until(name, holds)
    controller.end()
    controller.start()


def test_killed_in_each_state_of_a_run_and_of_a_recovery(
    cluster: TrainingCluster, controller: ControllerProcess
) -> None:
    """Whatever the status said last is carried on: one attempt to begin with, and one for each incident."""
    name = cluster.apply(cluster.run("states", health={"limits": {"floor": "1500ms"}}))
    kill_when(cluster, controller, name, lambda status: status.attempt == 1)
    kill_when(cluster, controller, name, lambda status: bool(status.participants))
    kill_when(cluster, controller, name, lambda status: status.phase is RunPhase.RUNNING)
    cluster.training(name)
    cluster.injure(name, 1, signal.SIGSTOP)
    kill_when(cluster, controller, name, lambda status: status.open_incident is not None)
    kill_when(cluster, controller, name, lambda status: status.attempt == 2)
    status = cluster.recovered(name)
    assert (status.attempt, status.recoveries, len(status.incidents)) == (2, 1, 1), status.incidents
    cluster.training(name, attempt=2)
    cluster.injure(name, 0, signal.SIGKILL)
    kill_when(cluster, controller, name, lambda status: status.attempt == 3)
    kill_when(cluster, controller, name, lambda status: bool(status.participants))
    status = cluster.recovered(name, 2)
    assert (status.attempt, status.recoveries, len(status.incidents)) == (3, 2, 2), status.incidents
    cluster.delete(name)


def test_a_dead_controller_disturbs_nobody(cluster: TrainingCluster, controller: ControllerProcess) -> None:
    """Ranks train on without a controller; the next one finds the same processes, in the same attempt."""
    name = cluster.apply(cluster.run("calm"))
    before = cluster.training(name)
    pids = cluster.pids(name)
    controller.end()
    cluster.until_seen(name, lambda sight: sight.step > before.step + 50, "it trains on")
    controller.start()
    cluster.until(name, lambda status: status.step > before.step + 50, "the new controller reports")
    status = cluster.status(name)
    assert (status.attempt, status.incidents, status.recoveries) == (1, (), 0)
    assert cluster.pids(name) == pids
    cluster.delete(name)


def test_a_rank_that_dies_while_there_is_no_controller(cluster: TrainingCluster, controller: ControllerProcess) -> None:
    """What happened in its absence is the first thing that a new controller sees, blames and mends."""
    name = cluster.apply(cluster.run("absent"))
    cluster.training(name)
    controller.end()
    cluster.injure(name, 1, signal.SIGKILL)
    cluster.until_seen(name, lambda sight: any(rank.exit for rank in sight.ranks), "its agent knows")
    controller.start()
    status = cluster.recovered(name)
    assert [each.culprit_ranks for each in status.incidents] == [(1,)], status.incidents
    assert status.attempt == 2
    cluster.delete(name)


def test_killed_at_random_moments(cluster: TrainingCluster, controller: ControllerProcess) -> None:
    """Killed again and again while ranks crash, no attempt is burnt: as many as incidents, and one to begin with."""
    chance = random.Random(SEED)
    name = cluster.apply(cluster.run("random", recovery={"budgets": {"infrastructure": 100}}))
    cluster.training(name)
    for harm in range(1, 4):
        cluster.injure(name, harm % 2, signal.SIGKILL)
        for _ in range(2):
            moment = time.monotonic() + chance.uniform(0.0, 1.5)
            cluster.until(name, lambda _, moment=moment: time.monotonic() > moment)
            controller.end()
            controller.start()
        status = cluster.recovered(name, harm)
        assert (status.attempt, len(status.incidents)) == (harm + 1, harm), status.incidents
        cluster.training(name, attempt=harm + 1)
    cluster.delete(name)


def test_a_stopped_leader_is_followed_and_writes_nothing_when_it_wakes(
    cluster: TrainingCluster, controller: ControllerProcess
) -> None:
    """While the leader is frozen another takes over and mends; the woken one finds its fence closed and stands by."""
    name = cluster.apply(cluster.run("lease"))
    cluster.training(name)
    second = ControllerProcess(cluster, "b")
    second.start()
    try:
        cluster.injure(name, 0, signal.SIGKILL)
        controller.send(signal.SIGSTOP)  # somewhere between seeing it and acting
        status = cluster.recovered(name)
        assert second.says("leader of mend-system/mend-controller")
        controller.send(signal.SIGCONT)
        cluster.api.eventually(lambda: controller.says("lost the lease"), "the woken leader knows")
        seen = cluster.training(name, attempt=status.attempt, steps=50)
        assert (seen.status.attempt, len(seen.status.incidents)) == (2, 1)
        second.end(signal.SIGTERM)  # gives the lease back: the first may lead again
        before = cluster.status(name).step
        cluster.until(name, lambda status: status.step > before + 20, "the first leads again")
        assert cluster.status(name).attempt == 2
        assert controller.process is not None
        assert controller.process.poll() is None
    finally:
        second.end()
    cluster.delete(name)


def test_ends_in_good_order(cluster: TrainingCluster, controller: ControllerProcess) -> None:
    """SIGTERM ends it with code 0 and frees the lease at once, so that the next one need not wait."""
    name = cluster.apply(cluster.run("order"))
    cluster.training(name, steps=1)
    assert controller.end(signal.SIGTERM) == 0
    lease = cluster.api.get("/apis/coordination.k8s.io/v1/namespaces/mend-system/leases/mend-controller")
    assert lease["spec"]["holderIdentity"] == ""
    cluster.delete(name)
