"""Spares that take over and machines that are kept away from, with real processes on a cluster of four nodes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import HERE, TrainingCluster, training_cluster
from mend.incidents import Tier
from mend.strikebook import BOOK_NAME, read
from mend_local.nodes import live_status

NAME = "spared"
BOOK = f"/api/v1/namespaces/mend-system/configmaps/{BOOK_NAME}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    """A cluster with one run of two workers and a spare, of one rank each, harmed by one test after the other."""
    with training_cluster(tmp_path_factory.mktemp("cluster"), nodes=4) as cluster:
        run = cluster.run(NAME, recovery={"nodeStrikes": {"limit": 1}})
        run["spec"]["workers"] |= {"replicas": 2, "spares": 1, "ranksPerWorker": 1}
        cluster.apply(run)
        cluster.training(NAME)
        spare_is_ready(cluster)
        yield cluster


def spare_is_ready(cluster: TrainingCluster) -> None:
    """Wait until there is a spare that could take over."""
    cluster.until(NAME, lambda status: status.workers.spares == 1, "there is a spare")


def pod_of(cluster: TrainingCluster, worker: int) -> dict[str, Any]:
    """The newest pod of a worker."""
    mine = [each for each in cluster.pods(NAME) if each["metadata"]["labels"]["mend.dev/worker"] == str(worker)]
    return max(mine, key=lambda each: int(each["metadata"]["labels"]["mend.dev/attempt"]))


def make_ill(cluster: TrainingCluster, node: str, kind: str) -> None:
    """What node-problem-detector does: a condition of the node is True."""
    path = f"/api/v1/nodes/{node}"
    conditions = [*live_status("127.0.0.1")["conditions"], {"type": kind, "status": "True", "reason": "TestSaysSo"}]
    cluster.api.patch(f"{path}/status", {"status": {"conditions": conditions}})


def test_a_spare_takes_the_place_of_a_pod_that_is_killed(cluster: TrainingCluster) -> None:
    """The other worker keeps pod and ranks, the spare gets the ranks of the lost one, and its new pod is the spare."""
    before = cluster.status(NAME)
    gone = before.participants[1]
    (spare,) = {0, 1, 2} - set(before.participants)
    stays = pod_of(cluster, before.participants[0])["metadata"]["uid"]
    name = pod_of(cluster, gone)["metadata"]["name"]
    cluster.api.delete(HERE.core("pods", name), {"gracePeriodSeconds": 0})
    status = cluster.recovered(NAME)
    assert status.participants == (before.participants[0], spare)
    assert status.incidents[-1].tier is Tier.REPLACE_WORKER
    assert pod_of(cluster, before.participants[0])["metadata"]["uid"] == stays
    cluster.api.eventually(
        lambda: ("SpareTookOver", f"worker {gone} is replaced by spare {spare}") in cluster.events(NAME), "it is told"
    )
    spare_is_ready(cluster)


def test_a_node_that_is_ill_is_kept_away_from(cluster: TrainingCluster) -> None:
    """A rank dies on a machine that node-problem-detector complains about: a strike, and no pod goes there any more."""
    before = cluster.training(NAME).status
    culprit = before.participants[0]
    node = pod_of(cluster, culprit)["spec"]["nodeName"]
    make_ill(cluster, node, "KernelDeadlock")
    cluster.injure(NAME, 0, signal.SIGKILL)
    status = cluster.recovered(NAME, len(before.incidents) + 1)
    incident = status.incidents[-1]
    assert (incident.tier, incident.culprit_nodes) == (Tier.EXCLUDE_NODE, (node,)), incident
    assert [(each.node, each.id) for each in read(cluster.api.get(BOOK))] == [(node, status.strikes[0].id)]
    assert culprit not in status.participants
    spare_is_ready(cluster)
    pod = pod_of(cluster, culprit)
    assert pod["metadata"]["annotations"]["mend.dev/avoids"] == node
    assert pod["spec"]["nodeName"] != node


def test_machines_are_measured_when_the_spec_asks_for_it(cluster: TrainingCluster) -> None:
    """Between two attempts every worker's agent measures; the incident says what came of it, and the run goes on."""
    before = cluster.training(NAME).status
    cluster.patch(NAME, recovery={"nodeCheck": "Always"})
    cluster.injure(NAME, 1, signal.SIGKILL)
    status = cluster.recovered(NAME, len(before.incidents) + 1)
    found = [each for each in status.incidents[-1].reasons if each.startswith("node check:")]
    assert len(found) == 1, status.incidents[-1]
    said = [message for reason, message in cluster.events(NAME) if reason == "CheckingNodes"]
    assert said == ["machines are checked: spec.recovery.nodeCheck is Always"]
