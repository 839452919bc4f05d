"""A TrainingRun from apply to its end as somebody with kubectl and mend sees it, crash and hang on the way included."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import TrainingCluster, is_alive, needs_kubectl, training_cluster
from cluster_client import Kubectl
from mend.incidents import IncidentKind, Tier
from mend.status import RunPhase

pytestmark = [pytest.mark.needs_kubectl, needs_kubectl]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    """A cluster for all tests here; each has a run of its own."""
    with training_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def kubectl(cluster: TrainingCluster, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    """A real kubectl."""
    return cluster.kubectl(tmp_path_factory.mktemp("home"))


def mend(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    program = Path(sys.executable).parent / "mend"
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_a_run_that_crashes_and_hangs_comes_back_and_succeeds(
    cluster: TrainingCluster, kubectl: Kubectl, tmp_path: Path
) -> None:
    """kubectl and mend tell the same story: who was guilty, what was done, where the run is, what it cost."""
    run = cluster.run("story", workers=2, ranks=1, env={"STEPS": "250"}, health={"limits": {"floor": "1500ms"}})
    assert kubectl("apply", "-f", "-", given=run) == "trainingrun.mend.dev/story created\n"
    cluster.training("story")
    cluster.injure("story", 1, signal.SIGKILL)
    cluster.recovered("story", 1)
    cluster.training("story", attempt=2)
    cluster.injure("story", 0, signal.SIGSTOP)
    cluster.recovered("story", 2)
    waited = kubectl("wait", "--for=condition=Succeeded", "trun/story", "--timeout=120s")
    assert waited == "trainingrun.mend.dev/story condition met\n"

    status = cluster.status("story")
    told = [(each.kind, each.culprit_ranks, each.tier) for each in status.incidents]
    assert told == [
        (IncidentKind.CRASHED, (1,), Tier.RESTART_RANKS),
        (IncidentKind.HUNG, (0,), Tier.RESTART_RANKS),
    ]
    assert (status.attempt, status.recoveries, status.step) == (3, 2, 249)
    assert status.checkpoint is not None
    assert status.checkpoint.step == 249

    head, row = kubectl("get", "trun", "story").splitlines()
    assert head.split() == ["NAME", "PHASE", "STEP", "ATTEMPT", "RECOVERIES", "CHECKPOINT", "GOODPUT", "AGE"]
    assert row.split()[:6] == ["story", "Succeeded", "249", "3", "2", "249"]
    described = kubectl("describe", "trun", "story")
    for reason in ("Started", "RankCrashed", "RankHung", "Training", "Completed"):
        assert reason in described.partition("Events:")[2]
    assert "rank 1 was killed by SIGKILL" in described
    logs = "".join(kubectl("logs", each["metadata"]["name"]) for each in cluster.pods("story"))
    assert "[attempt 1 rank 1] step 0 is done" in logs
    assert "[attempt 3 rank 0] step 200 is done" in logs

    explained = mend("explain", "story", "--kubeconfig", str(cluster.local.kubeconfig)).stdout
    assert "blamed   rank 1 on worker 1, 95% sure" in explained
    assert "hung in attempt 2" in explained
    data = cluster.local.places.system / "controller-data"
    replayed = mend("replay", str(data / "default_story.journal.jsonl"))
    assert replayed.stdout.endswith(" decisions, 0 differ\n"), replayed.stdout
    charted = mend("chart", str(data / "default_story.curve.jsonl"), "-o", str(tmp_path / "run.png"))
    assert charted.stdout.endswith(" points, 2 incidents\n"), charted.stderr
    assert (tmp_path / "run.png").stat().st_size > 10_000
    steps = [json.loads(line)["point"][0] for line in (data / "default_story.curve.jsonl").read_text().splitlines()]
    assert set(steps) == set(range(250))


def test_suspended_and_resumed_where_it_was(cluster: TrainingCluster, kubectl: Kubectl) -> None:
    """A suspended run saves, holds no pod, and goes on from the very step that it saved; edits do not lose it."""
    kubectl("apply", "-f", "-", given=cluster.run("pause"))
    cluster.training("pause")
    pids = cluster.pids("pause").values()
    kubectl("patch", "trun", "pause", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    kubectl("wait", "--for=condition=Suspended", "trun/pause", "--timeout=60s")
    kubectl("wait", "--for=delete", "pod", "-l", "mend.dev/run=pause", "--timeout=60s")
    assert not any(map(is_alive, pids))
    stopped = cluster.status("pause")
    saved = int(cluster.manifests("pause")[-1].split("/")[1].removeprefix("step-"))
    assert saved >= stopped.step, "the ranks saved as they went"
    kubectl("patch", "trun", "pause", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    resumed = cluster.training("pause", attempt=2).status
    assert resumed.restored_step == saved
    assert (resumed.attempt, resumed.recoveries) == (2, 0)
    assert "Resumed" in [reason for reason, _ in cluster.events("pause")]
    assert {each.step for each in resumed.lineage} == {saved}
    cluster.delete("pause")


def test_deleted_while_it_saves(cluster: TrainingCluster, kubectl: Kubectl) -> None:
    """`kubectl delete` ends pods and processes; every checkpoint stays and is whole."""
    run = cluster.run("brief")
    run["spec"]["checkpoint"]["interval"] = "1 steps"
    cluster.apply(run)
    cluster.training("brief", steps=3)
    pids = list(cluster.pids("brief").values())
    kubectl("delete", "trun", "brief", "--timeout=60s")
    kubectl("wait", "--for=delete", "pod", "-l", "mend.dev/run=brief", "--timeout=60s")
    assert pids
    assert not any(map(is_alive, pids))
    left = cluster.manifests("brief")
    assert left
    newest = int(left[-1].split("/")[1].removeprefix("step-"))
    cluster.apply(cluster.run("brief", env={"STEPS": str(newest + 2)}))
    status = cluster.succeeded("brief")
    assert (status.restored_step, status.step) == (newest, newest + 1), "the run made anew goes on from there"


def test_edited_while_it_recovers(cluster: TrainingCluster, kubectl: Kubectl) -> None:
    """An edit in the middle of a recovery costs no attempt, and holds from then on."""
    kubectl("apply", "-f", "-", given=cluster.run("edited"))
    cluster.training("edited")
    cluster.injure("edited", 0, signal.SIGKILL)
    cluster.until("edited", lambda status: status.phase is RunPhase.RECOVERING or status.recoveries)
    kubectl("annotate", "trun", "edited", "team=clio")
    kubectl("patch", "trun", "edited", "--type=merge", "-p", '{"spec": {"recovery": {"budgets": {"user": 7}}}}')
    status = cluster.training("edited", attempt=2).status
    assert (status.attempt, status.recoveries) == (2, 1)
    assert status.observed_generation == 2
    kubectl("delete", "trun", "edited")


def test_deadline_and_time_to_live(cluster: TrainingCluster, kubectl: Kubectl) -> None:
    """A run fails when its deadline is over, its ranks end, and the run itself goes after its time to live."""
    kubectl("apply", "-f", "-", given=cluster.run("short", activeDeadlineSeconds=1, ttlSecondsAfterFinished=86400))
    kubectl("wait", "--for=condition=Failed", "trun/short", "--timeout=60s")
    message = cluster.condition("short", "Failed")
    assert message == "DeadlineExceeded: active for longer than 1 s (spec.activeDeadlineSeconds)"
    pods = cluster.pods("short")
    cluster.patch("short", ttlSecondsAfterFinished=1)
    kubectl("wait", "--for=delete", "trun/short", "--timeout=60s")
    for pod in pods:
        kubectl("wait", "--for=delete", f"pod/{pod['metadata']['name']}", "--timeout=60s")


def test_managed_by_somebody_else(cluster: TrainingCluster, kubectl: Kubectl) -> None:
    """A run that another controller manages is left alone entirely, while its neighbour is looked after."""
    kubectl("apply", "-f", "-", given=cluster.run("foreign", managedBy="kueue.x-k8s.io/multikueue"))
    kubectl("apply", "-f", "-", given=cluster.run("ours", env={"STEPS": "1"}))
    cluster.succeeded("ours")
    assert "status" not in cluster.read("foreign")
    assert cluster.pods("foreign") == []
    assert cluster.events("foreign") == []
    kubectl("delete", "trun", "foreign", "ours")


def test_nothing_is_left_behind(cluster: TrainingCluster) -> None:
    """After the end of a run its ranks are gone, and its pods have succeeded and keep their logs."""
    name = cluster.apply(cluster.run("tidy", env={"STEPS": "3"}))
    cluster.succeeded(name)
    cluster.api.eventually(
        lambda: [each["status"]["phase"] for each in cluster.pods(name)] == ["Succeeded"],
        "the pod has succeeded",
    )
    assert processes_of(cluster, name) == []


def processes_of(cluster: TrainingCluster, name: str) -> list[Path]:
    """Every process that a pod of the run has started, however far it went."""
    marks = (f"MEND_RUN=default/{name}".encode(), str(cluster.folder).encode())
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (process / "environ").read_bytes()
            if all(mark in environment for mark in marks):
                found.append(process)
    return found
