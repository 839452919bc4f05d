"""Restoring from memory through the whole chain: controller, agents, ranks and savers, all real, and an empty store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster import HERE, TrainingCluster, training_cluster
from mend.incidents import IncidentRecord, Origin, Tier
from mend.status import RunStatus

NAME = "remembering"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    """A cluster with one run of two pods that takes snapshots and saves nothing: the store can restore no step."""
    with training_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        run = cluster.run(
            NAME, workers=2, ranks=1, env={"STEP_SECONDS": "0.2"}, recovery={"firstTier": "restart-ranks"}
        )
        run["spec"]["checkpoint"] |= {"interval": "1000000 steps", "memory": {"interval": "1 step"}}
        cluster.apply(run)
        yield cluster


def copied(cluster: TrainingCluster) -> RunStatus:
    """The status once the present attempt has snapshots that would survive the loss of a worker."""

    def holds(status: RunStatus) -> bool:
        memory = status.memory
        return memory is not None and memory.attempt == status.attempt and memory.copied is True

    return cluster.until(NAME, holds, "snapshots are copied")


def back(cluster: TrainingCluster, before: RunStatus) -> IncidentRecord:
    """The incident after those before, once the run is back from it."""
    return cluster.recovered(NAME, len(before.incidents) + 1).incidents[-1]


def test_a_rank_that_dies_goes_on_from_its_workers_own_memory(cluster: TrainingCluster) -> None:
    """The state that both ranks had, or the one before, although nothing was ever saved."""
    cluster.training(NAME)
    before = copied(cluster)
    assert before.checkpoint is None
    cluster.kill_pid(cluster.pids(NAME)[1])
    incident = back(cluster, before)
    assert (incident.tier, incident.origin) == (Tier.RESTART_RANKS, Origin.MEMORY)
    assert incident.restored_step is not None
    assert before.memory is not None
    assert incident.restored_step >= before.memory.step
    assert cluster.manifests(NAME) == []


def test_a_worker_that_is_lost_is_given_its_state_by_its_buddy(cluster: TrainingCluster) -> None:
    """Its pod is deleted at once, and its memory is gone; the new one's rank goes on where the old one's was."""
    cluster.training(NAME, attempt=2)
    before = copied(cluster)
    (pod,) = [each for each in cluster.pods(NAME) if each["metadata"]["labels"]["mend.dev/worker"] == "1"]
    cluster.api.call("DELETE", HERE.core("pods", pod["metadata"]["name"]), {"gracePeriodSeconds": 0})
    incident = back(cluster, before)
    assert (incident.tier, incident.origin) == (Tier.REPLACE_WORKER, Origin.PEER)
    assert incident.restored_step is not None
    assert before.restored_step is not None
    assert incident.restored_step > before.restored_step  # a snapshot of the attempt that was lost
    assert cluster.manifests(NAME) == []
