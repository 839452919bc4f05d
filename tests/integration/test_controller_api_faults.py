"""An API server that misbehaves while ranks die: whatever it does, the run comes back and no attempt is burnt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import HERE, NAMESPACE, TrainingCluster, training_cluster
from mend.cli import main
from mend.incidents import FailureClass, IncidentKind, Tier
from mend.names import API_VERSION, PLURAL
from mend_local.kubelet import FAULT_NOTE


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    """A cluster for all tests here."""
    with training_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def name(cluster: TrainingCluster) -> str:
    """A run of two pods that trains for as long as it is tormented."""
    plenty = {"user": 100, "infrastructure": 100, "hang": 100, "preemption": 100}
    return cluster.apply(cluster.run("tormented", workers=2, ranks=1, recovery={"budgets": plenty}))


@pytest.mark.parametrize(
    "faults",
    [
        {"dropWatches": True},
        {"expireWatches": 3, "dropWatches": True},
        {"forgetHistory": True, "dropWatches": True},
        {"conflicts": 5, "resource": "trainingruns"},
        {"errors": 8, "errorCode": 503},
        {"errors": 4, "errorCode": 500, "resource": "trainingruns"},
        {"delaySeconds": 0.3},
    ],
    ids=lambda faults: "+".join(faults),
)
def test_a_rank_dies_while_the_api_server_misbehaves(
    cluster: TrainingCluster, name: str, faults: dict[str, Any]
) -> None:
    """The run is back with one attempt more, and the right rank is blamed."""
    before = cluster.training(name)
    cluster.misbehave(**faults)
    cluster.kill_pid(before.ranks[1].pid)
    cluster.wait_until(cluster.has_no_errors_left)  # before it is asked for anything here
    after = cluster.recovered(name, len(before.status.incidents) + 1)
    cluster.misbehave()
    assert (after.attempt, after.recoveries) == (before.status.attempt + 1, before.status.recoveries + 1)
    assert after.incidents[-1].culprit_ranks == (1,)


def test_a_rank_dies_while_the_api_server_is_frozen(cluster: TrainingCluster, name: str) -> None:
    """Nothing is decided that cannot be written down; once the server answers again, the run comes back."""
    before = cluster.training(name)
    cluster.misbehave(frozen=True)
    thaw_at = time.monotonic() + 7  # longer than a leader may be without renewing its lease
    cluster.kill_pid(before.ranks[0].pid)
    cluster.wait_until(lambda: time.monotonic() > thaw_at)
    cluster.misbehave()
    after = cluster.recovered(name, len(before.status.incidents) + 1)
    assert (after.attempt, after.recoveries) == (before.status.attempt + 1, before.status.recoveries + 1)
    assert after.incidents[-1].culprit_ranks == (0,)


def test_a_status_that_cannot_be_read_is_no_silence(
    cluster: TrainingCluster, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its owner is told once, `mend get` shows it beside the others, and once it is mended the run is watched again."""
    before = cluster.training(name)
    cluster.apply(cluster.run("legible", env={"STEPS": "2"}))
    status = HERE.of(API_VERSION, PLURAL, name, "status")
    cluster.api.patch(status, {"status": {"spent": {"quota": [1.0]}}})  # a class that only a newer mend knows

    def told() -> list[tuple[str, str]]:
        return [(reason, words) for reason, words in cluster.events(name) if reason == "UnreadableStatus"]

    cluster.api.eventually(told, "its owner is told")
    cluster.wait_until(lambda: cluster.controller_log().count(f"run {NAMESPACE}/{name} is left alone") >= 3)
    assert len(told()) == 1
    assert "'quota'" in told()[0][1]
    assert "if a newer mend wrote it, run that one again" in told()[0][1]
    cluster.succeeded("legible")
    assert main(["get", "--kubeconfig", str(cluster.local.kubeconfig)]) == 0
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows == {"legible": "Succeeded", name: "Unreadable"}
    cluster.api.patch(status, {"status": {"spent": {"quota": None}}})
    cluster.kill_pid(before.ranks[0].pid)
    assert cluster.recovered(name, len(before.status.incidents) + 1).incidents[-1].culprit_ranks == (0,)


def test_a_frozen_api_server_disturbs_no_training(cluster: TrainingCluster, name: str) -> None:
    """While nothing can be written the ranks train on, and afterwards the same processes do so in the same attempt."""
    before = cluster.training(name)
    pids = cluster.pids(name)
    cluster.misbehave(frozen=True)
    thaw_at = time.monotonic() + 7
    cluster.wait_until(lambda: time.monotonic() > thaw_at)
    cluster.misbehave()
    cluster.until(name, lambda status: status.step > before.step + 20, "steps are reported again")
    assert cluster.pids(name) == pids
    assert cluster.status(name).attempt == before.status.attempt


def test_an_api_server_that_restarts(cluster: TrainingCluster, name: str) -> None:
    """The API server goes and comes back: the same processes, the same attempt."""
    cluster.training(name)
    pids, step = cluster.pids(name), cluster.status(name).step
    cluster.wait_for(cluster.local.restart_api_server(down_seconds=2.0))
    cluster.until(name, lambda status: status.step > step + 20, "steps are reported again")
    assert cluster.pids(name) == pids


def test_a_deleted_pod_is_replaced(cluster: TrainingCluster, name: str) -> None:
    """Somebody deletes a worker: a preemption, paid from its own budget; only that pod is made anew."""
    before = cluster.training(name).status
    pods = {each["metadata"]["name"] for each in cluster.pods(name)}
    victim = min(pods)
    cluster.api.delete(HERE.core("pods", victim))
    after = cluster.recovered(name, len(before.incidents) + 1)
    incident = after.incidents[-1]
    assert (incident.kind, incident.failure) == (IncidentKind.PREEMPTED, FailureClass.PREEMPTION)
    assert incident.tier is Tier.REPLACE_WORKER
    left = {each["metadata"]["name"] for each in cluster.pods(name)}
    assert len(left) == 2
    assert pods - left == {victim}


def test_a_pod_whose_processes_die_at_once_is_replaced(cluster: TrainingCluster, name: str) -> None:
    """kill -9 of agent and ranks of a worker: its pod has failed, and only it is made anew."""
    before = cluster.training(name).status
    victim = max(each["metadata"]["name"] for each in cluster.pods(name))
    cluster.api.patch(HERE.core("pods", victim), {"metadata": {"annotations": {FAULT_NOTE: "killed"}}})
    after = cluster.recovered(name, len(before.incidents) + 1)
    incident = after.incidents[-1]
    assert incident.kind in (IncidentKind.LOST, IncidentKind.CRASHED)
    assert incident.culprit_workers == (1,)
    assert after.attempt == before.attempt + 1
    assert victim not in {each["metadata"]["name"] for each in cluster.pods(name)}


def test_a_lost_node_is_left(cluster: TrainingCluster, name: str) -> None:
    """A node that is gone: its worker is made anew on another one, and when it is back its old pod is ended."""
    before = cluster.training(name).status
    pods = {each["metadata"]["name"]: each for each in cluster.pods(name)}
    victim = min(pods)
    node = pods[victim]["spec"]["nodeName"]
    cluster.wait_for(_cut_off(cluster, victim, node))
    try:
        after = cluster.recovered(name, len(before.incidents) + 1)
        incident = after.incidents[len(before.incidents)]
        assert (incident.kind, incident.tier) == (IncidentKind.LOST, Tier.REPLACE_WORKER)
        homes = {each["metadata"]["name"]: each["spec"].get("nodeName") for each in cluster.pods(name)}
        assert node not in {homes[each] for each in homes if each not in pods}
    finally:
        cluster.wait_for(cluster.local.kubelet.restore_node(node))
    cluster.training(name, attempt=after.attempt)
    cluster.api.eventually(lambda: len(cluster.pods(name)) == 2, "the fenced pod is gone")


def test_a_node_that_only_the_api_server_has_lost(cluster: TrainingCluster, name: str) -> None:
    """A node that is NotReady while its ranks are heard to train is left in peace: nothing is better than training."""
    before = cluster.training(name)
    pids = cluster.pids(name)
    node = cluster.pods(name)[0]["spec"]["nodeName"]
    cluster.wait_for(cluster.local.kubelet.lose_node(node))
    try:
        cluster.until(name, lambda status: status.step > before.step + 20, "it trains on")
        assert cluster.pids(name) == pids
        assert cluster.status(name).attempt == before.status.attempt
    finally:
        cluster.wait_for(cluster.local.kubelet.restore_node(node))


async def _cut_off(cluster: TrainingCluster, pod: str, node: str) -> None:
    """As when the power fails: nothing answers any more, and nothing reports."""
    cluster.local.kubelet.freeze_pod(NAMESPACE, pod)
    await cluster.local.kubelet.lose_node(node)
