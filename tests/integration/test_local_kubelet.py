"""The kubelet against a real API server: what it does with pods when things go wrong around it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mend_local.addresses import addresses_work
from mend_local.client import ApiError
from mend_local.cluster import ClusterSettings, LocalCluster, cluster_id
from mend_local.kubelet import FAULT_NOTE, KubeletSettings
from mend_local.objectstore import StoreKind
from mend_local.processes import owned_by
from pod_host import a_pod, eventually, shell

PODS = "/api/v1/namespaces/default/pods"
SLEEPS = shell("trap 'exit 0' TERM; echo up; sleep 1000 & wait")
Json = dict[str, Any]


def bare_settings() -> ClusterSettings:
    """API server and kubelet alone."""
    return ClusterSettings(
        with_controller=False,
        object_store=StoreKind.NONE,
        kubelet=KubeletSettings(heartbeat_seconds=0.2, shutdown_grace_seconds=5),
    )


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[LocalCluster]:
    """A cluster of two nodes that leaves no process behind."""
    async with LocalCluster(tmp_path, bare_settings()) as cluster:
        yield cluster
    assert processes(cluster) == []


def processes(cluster: LocalCluster) -> list[int]:
    """Everything that runs for the cluster."""
    return [each.identity.pid for each in owned_by(f"{cluster_id(cluster.places)}/")]


async def create(cluster: LocalCluster, name: str, *containers: Json, **spec: Any) -> str:
    """Create a pod; its uid."""
    pod = a_pod(*(containers or (SLEEPS,)), name=name, **spec)
    del pod["metadata"]["uid"], pod["spec"]["nodeName"]
    return str((await cluster.api.create(PODS, pod))["metadata"]["uid"])


async def pod_is(cluster: LocalCluster, name: str, phase: str, seconds: float = 30.0) -> Json:
    """Wait for a phase; the pod then."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        pod = await cluster.api.get(f"{PODS}/{name}")
        if (pod.get("status") or {}).get("phase") == phase:
            return pod
        assert asyncio.get_running_loop().time() < deadline, f"{name} is not {phase}: {pod.get('status')}"
        await asyncio.sleep(0.01)


async def node_is(cluster: LocalCluster, node: str, ready: str) -> None:
    """Wait until the node's condition Ready is so."""
    deadline = asyncio.get_running_loop().time() + 30
    while True:
        conditions = (await cluster.api.get(node))["status"]["conditions"]
        if [each["status"] for each in conditions if each["type"] == "Ready"] == [ready]:
            return
        assert asyncio.get_running_loop().time() < deadline, f"{node} is not {ready}: {conditions}"
        await asyncio.sleep(0.01)


async def gone(cluster: LocalCluster, name: str, uid: str) -> None:
    """Wait until this very pod is no longer there."""
    deadline = asyncio.get_running_loop().time() + 30
    while True:
        try:
            if (await cluster.api.get(f"{PODS}/{name}"))["metadata"]["uid"] != uid:
                return
        except ApiError as error:
            if error.code == 404:
                return
        assert asyncio.get_running_loop().time() < deadline, f"{name} is still there"
        await asyncio.sleep(0.01)


async def test_twenty_pods_at_once_are_spread(cluster: LocalCluster) -> None:
    """Twenty pods made at once all run, ten on each node, each with an address of its own."""
    await asyncio.gather(*(create(cluster, f"p-{n}") for n in range(20)))
    pods = [await pod_is(cluster, f"p-{n}", "Running") for n in range(20)]
    nodes = [pod["spec"]["nodeName"] for pod in pods]
    assert {nodes.count(name) for name in cluster.kubelet.node_names} == {10}
    assert len({pod["status"]["podIP"] for pod in pods}) == (20 if addresses_work() else 1)


async def test_a_deletion_is_graceful_and_complete(cluster: LocalCluster) -> None:
    """A deleted pod gets SIGTERM, and its object goes only when its processes are gone; so does its directory."""
    uid = await create(cluster, "p")
    await pod_is(cluster, "p", "Running")
    await cluster.api.delete(f"{PODS}/p", {"gracePeriodSeconds": 30})
    await gone(cluster, "p", uid)
    assert processes(cluster) == []
    await eventually(lambda: not (cluster.places.pods / uid).exists(), "its directory is removed")


async def test_a_forced_deletion_kills(cluster: LocalCluster) -> None:
    """With grace 0 the object goes at once, and the processes that ignore SIGTERM are killed after it."""
    uid = await create(cluster, "p", shell("trap '' TERM; echo up; while :; do sleep 1000; done"))
    await pod_is(cluster, "p", "Running")
    await cluster.api.delete(f"{PODS}/p", {"gracePeriodSeconds": 0})
    await gone(cluster, "p", uid)
    await eventually(lambda: processes(cluster) == [], "its processes are gone")


async def test_a_deletion_can_be_hurried(cluster: LocalCluster) -> None:
    """A pod that ignores SIGTERM and is deleted again with a shorter grace ends then."""
    uid = await create(cluster, "p", shell("trap '' TERM; echo up; while :; do sleep 1000; done"))
    await pod_is(cluster, "p", "Running")
    await cluster.api.delete(f"{PODS}/p", {"gracePeriodSeconds": 600})
    await cluster.api.delete(f"{PODS}/p", {"gracePeriodSeconds": 1})
    await gone(cluster, "p", uid)
    assert processes(cluster) == []


async def test_the_same_name_again_at_once(cluster: LocalCluster) -> None:
    """A pod made anew under its name while the old one still ends is another pod: neither disturbs the other."""
    first = await create(cluster, "p")
    await pod_is(cluster, "p", "Running")
    await cluster.api.delete(f"{PODS}/p", {"gracePeriodSeconds": 0})
    second = await create(cluster, "p")
    assert second != first
    pod = await pod_is(cluster, "p", "Running")
    assert pod["metadata"]["uid"] == second
    await eventually(lambda: not (cluster.places.pods / first).exists(), "the first is cleaned up")
    assert len(cluster.kubelet.running("default", "p").processes["main"].members()) == 2


async def test_deleted_while_it_starts(cluster: LocalCluster) -> None:
    """Pods that are deleted in the moment they are made leave nothing behind."""
    uids = {}
    for n in range(8):
        uids[f"p-{n}"] = await create(cluster, f"p-{n}")
        await asyncio.sleep(0.002 * n)
        await cluster.api.delete(f"{PODS}/p-{n}", {"gracePeriodSeconds": 5})
    for name, uid in uids.items():
        await gone(cluster, name, uid)
    await eventually(lambda: processes(cluster) == [], "no process is left")


async def test_pods_live_through_a_restart_of_the_api_server(cluster: LocalCluster) -> None:
    """While the API server is away pods run on; what happened meanwhile is told when it is back."""
    await create(cluster, "stays")
    uid = await create(cluster, "ends", shell("trap 'exit 7' TERM; echo up; sleep 1000 & wait"))
    await pod_is(cluster, "stays", "Running")
    await pod_is(cluster, "ends", "Running")
    before = cluster.kubelet.running("default", "stays").processes["main"].identity
    runner = cluster.kubelet.running("default", "ends")
    await eventually(lambda: (cluster.places.pods / uid / "logs" / "main.log").stat().st_size > 0, "the trap is set")
    restart = asyncio.create_task(cluster.restart_api_server(down_seconds=0.5))
    await asyncio.sleep(0.1)
    runner.processes["main"].signal(signal.SIGTERM)
    await restart
    ended = (await pod_is(cluster, "ends", "Failed"))["status"]["containerStatuses"][0]["state"]["terminated"]
    assert ended["exitCode"] == 7
    assert cluster.kubelet.running("default", "stays").processes["main"].identity == before
    await create(cluster, "new")
    await pod_is(cluster, "new", "Running")


async def test_faults_of_the_api_server_are_outlived(cluster: LocalCluster) -> None:
    """Dropped watches, 410, conflicts and 5xx delay what the kubelet does and change nothing of it."""
    for number, fault in enumerate(
        (
            {"dropWatches": True},
            {"expireWatches": 2, "dropWatches": True},
            {"conflicts": 3},
            {"errors": 3, "errorCode": 503},
        )
    ):
        await create(cluster, f"p-{number}")
        await cluster.api.replace("/mend-local/faults", fault | {"resource": "pods"})
        await create_anyway(cluster, f"q-{number}")
        await eventually(lambda n=number: {f"p-{n}", f"q-{n}"} <= running(cluster), "both run")
    await cluster.api.delete("/mend-local/faults")
    for number in range(4):
        await pod_is(cluster, f"p-{number}", "Running")
        await pod_is(cluster, f"q-{number}", "Running")


def running(cluster: LocalCluster) -> set[str]:
    """The names of the pods that the kubelet holds."""
    return {each.name for each in cluster.kubelet.runners()}


async def create_anyway(cluster: LocalCluster, name: str) -> None:
    """Create a pod while the API server answers with errors."""
    for _ in range(20):
        with contextlib.suppress(ApiError):
            await create(cluster, name)
            return
    raise AssertionError("the API server never took the pod")


async def test_a_lost_node_is_a_partition(cluster: LocalCluster) -> None:
    """On a lost node processes live on and nothing is told, even when pods are deleted; when it is back, they end."""
    uid = await create(cluster, "p", nodeSelector={"kubernetes.io/hostname": "mend-local-1"})
    await pod_is(cluster, "p", "Running")
    node = "/api/v1/nodes/mend-local-1"
    await cluster.api.merge(node, {"metadata": {"annotations": {FAULT_NOTE: "lost"}}})
    await eventually(lambda: cluster.kubelet.lost_nodes == ["mend-local-1"], "it is lost")
    await node_is(cluster, node, "Unknown")
    await cluster.api.delete(f"{PODS}/p", {"gracePeriodSeconds": 0})
    await gone(cluster, "p", uid)
    await create(cluster, "other")
    assert (await pod_is(cluster, "other", "Running"))["spec"]["nodeName"] == "mend-local-0"
    assert [each for each in cluster.kubelet.runners() if each.uid == uid and not each.has_ended]
    await cluster.api.merge(node, {"metadata": {"annotations": {FAULT_NOTE: None}}})
    await eventually(lambda: uid not in {each.uid for each in cluster.kubelet.runners()}, "the old pod is ended")
    await node_is(cluster, node, "True")


async def test_faults_of_a_pod_by_annotation(cluster: LocalCluster) -> None:
    """A pod is frozen, thawed and killed by its annotation."""
    await create(cluster, "p")
    await pod_is(cluster, "p", "Running")
    members = cluster.kubelet.running("default", "p").processes["main"].members
    for fault, state in (("frozen", "T"), (None, "S")):
        await cluster.api.merge(f"{PODS}/p", {"metadata": {"annotations": {FAULT_NOTE: fault}}})
        await eventually(lambda state=state: {each.state for each in members()} == {state}, f"its state is {state}")
    await cluster.api.merge(f"{PODS}/p", {"metadata": {"annotations": {FAULT_NOTE: "killed"}}})
    pod = await pod_is(cluster, "p", "Failed")
    assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["signal"] == signal.SIGKILL


async def test_a_pod_that_fits_nowhere_waits(cluster: LocalCluster) -> None:
    """A pod that no node takes says why, and runs as soon as one does."""
    await create(cluster, "p", nodeSelector={"disk": "fast"})
    pod = await pod_is(cluster, "p", "Pending")
    while not pod["status"].get("conditions"):
        await asyncio.sleep(0.01)
        pod = await pod_is(cluster, "p", "Pending")
    [condition] = pod["status"]["conditions"]
    assert condition["reason"] == "Unschedulable"
    why_not = "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."
    assert condition["message"] == why_not
    await cluster.api.merge("/api/v1/nodes/mend-local-1", {"metadata": {"labels": {"disk": "fast"}}})
    assert (await pod_is(cluster, "p", "Running"))["spec"]["nodeName"] == "mend-local-1"


async def test_state_survives_and_pods_end_with_the_cluster(tmp_path: Path) -> None:
    """After down and up objects are there and running pods have failed because their node shut down."""
    async with LocalCluster(tmp_path, bare_settings()) as cluster:
        url = cluster.url
        await create(cluster, "p")
        await pod_is(cluster, "p", "Running")
    assert processes(cluster) == []
    async with LocalCluster(tmp_path, bare_settings()) as again:
        assert again.url == url
        pod = await again.api.get(f"{PODS}/p")
        assert (pod["status"]["phase"], pod["status"]["reason"]) == ("Failed", "Terminated")
        assert again.ended_at_start == 0


RUN_AND_WAIT = """
import asyncio, sys
from pathlib import Path
from test_local_kubelet import SLEEPS, bare_settings, create, pod_is
from mend_local.cluster import LocalCluster

async def main():
    async with LocalCluster(Path(sys.argv[1]), bare_settings()) as cluster:
        await create(cluster, "p")
        await pod_is(cluster, "p", "Running")
        print("ready", flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


async def test_a_killed_kubelet_leaves_no_orphans_to_the_next(tmp_path: Path) -> None:
    """After kill -9 of the process that holds the cluster, the next one ends its pods' processes and fails the pods."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUN_AND_WAIT, str(tmp_path), stdout=-1, env=os.environ | {"PYTHONPATH": path}
    )
    assert child.stdout is not None
    assert await asyncio.wait_for(child.stdout.readline(), 60) == b"ready\n"
    child.kill()
    await child.wait()
    async with LocalCluster(tmp_path, bare_settings()) as cluster:
        assert cluster.ended_at_start == 2
        assert processes(cluster) == []
        pod = await pod_is(cluster, "p", "Failed")
        assert pod["status"]["reason"] == "KubeletRestarted"
        ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
        assert (ended["exitCode"], ended["reason"]) == (137, "ContainerStatusUnknown")
