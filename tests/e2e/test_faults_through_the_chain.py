"""Every way in which a rank can go wrong, from the fault in a real gang to the culprit in the status."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator

import pytest

from cluster import PROGRAMS, TrainingCluster, training_cluster
from mend.cli import main
from mend.incidents import FailureClass, IncidentKind, IncidentRecord, Tier
from mend.journal import read_curve

NAME = "faulty"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    """A cluster with one run of four ranks in two pods, which is harmed by one test after the other."""
    holder = tmp_path_factory.mktemp("c") / "holder.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", holder, PROGRAMS / "gil_holder.c"], check=True, timeout=60)
    with training_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        plenty = {"user": 100, "infrastructure": 100, "hang": 100, "preemption": 100}
        run = cluster.run(NAME, workers=2, ranks=2, env={"GIL_HOLDER": str(holder)}, recovery={"budgets": plenty})
        run["spec"]["health"]["limits"]["floor"] = "1500ms"
        cluster.apply(run)
        yield cluster


def blamed(cluster: TrainingCluster, before: int) -> IncidentRecord:
    """The incident after `before` earlier ones, once the run is back from it."""
    status = cluster.recovered(NAME, before + 1)
    assert len(status.incidents) == before + 1, status.incidents
    return status.incidents[-1]


def test_a_killed_rank(cluster: TrainingCluster) -> None:
    """SIGKILL: crashed, the fault of the machine rather than the user's, back in place with all that was committed."""
    before = cluster.training(NAME).status
    committed = cluster.until(NAME, lambda status: status.checkpoint is not None, "a checkpoint").checkpoint
    assert committed is not None
    cluster.injure(NAME, 2, signal.SIGKILL)
    incident = blamed(cluster, len(before.incidents))
    assert (incident.kind, incident.failure) == (IncidentKind.CRASHED, FailureClass.INFRASTRUCTURE)
    assert (incident.culprit_ranks, incident.culprit_workers, incident.tier) == ((2,), (1,), Tier.RESTART_RANKS)
    assert "SIGKILL" in incident.summary
    assert incident.restored_step is not None
    assert incident.restored_step >= committed.step


def test_a_stopped_rank(cluster: TrainingCluster) -> None:
    """SIGSTOP: hung; the three that wait for it are not blamed, and no pod is replaced."""
    before = cluster.training(NAME)
    pods = {each["metadata"]["uid"] for each in cluster.pods(NAME)}
    cluster.injure(NAME, 3, signal.SIGSTOP)
    incident = blamed(cluster, len(before.status.incidents))
    assert (incident.kind, incident.failure) == (IncidentKind.HUNG, FailureClass.HANG)
    assert (incident.culprit_ranks, incident.culprit_workers) == ((3,), (1,))
    assert any("stopped" in reason for reason in incident.reasons), incident.reasons
    assert {each["metadata"]["uid"] for each in cluster.pods(NAME)} == pods


def test_a_rank_that_raises(cluster: TrainingCluster) -> None:
    """An exception: crashed, the user's, with its type and message; the peers' broken connections are not."""
    before = cluster.training(NAME).status
    cluster.ask_fault(NAME, 1, "raise")
    incident = blamed(cluster, len(before.incidents))
    assert (incident.kind, incident.failure) == (IncidentKind.CRASHED, FailureClass.USER)
    assert incident.culprit_ranks == (1,)
    assert "RuntimeError: the loss went through the roof" in incident.summary


def test_a_rank_that_exits(cluster: TrainingCluster) -> None:
    """sys.exit(3) in the middle of training: crashed, the user's, by its exit code."""
    before = cluster.training(NAME).status
    cluster.ask_fault(NAME, 0, "exit")
    incident = blamed(cluster, len(before.incidents))
    assert (incident.kind, incident.culprit_ranks) == (IncidentKind.CRASHED, (0,))
    assert incident.failure is FailureClass.USER
    assert incident.summary == "rank 0 exited with code 3"


def test_a_rank_that_skips_a_collective(cluster: TrainingCluster) -> None:
    """A rank that never joins the collective in which all others wait: hung, and it is the one that lags."""
    before = cluster.training(NAME).status
    cluster.ask_fault(NAME, 2, "skip")
    incident = blamed(cluster, len(before.incidents))
    assert (incident.kind, incident.culprit_ranks) == (IncidentKind.HUNG, (2,)), incident.reasons


def test_a_c_extension_that_holds_the_gil(cluster: TrainingCluster) -> None:
    """No Python thread of the rank runs any more: hung, and blamed although it cannot say a word."""
    before = cluster.training(NAME).status
    cluster.ask_fault(NAME, 1, "hold-gil")
    incident = blamed(cluster, len(before.incidents))
    assert (incident.kind, incident.culprit_ranks) == (IncidentKind.HUNG, (1,)), incident.reasons


def test_the_evidence_of_each_is_kept(
    cluster: TrainingCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The status says where; `mend explain --incident` shows where each rank stood when the GIL was held."""
    incident = next(each for each in cluster.training(NAME).status.incidents if "GIL" in " ".join(each.reasons))
    s3 = cluster.local.s3
    assert s3 is not None
    assert incident.evidence_uri.startswith(f"s3://{s3.bucket}/{NAME}/incidents/")
    for name, value in s3.as_env().items():
        monkeypatch.setenv(name, value)
    words = ["explain", NAME, "--kubeconfig", str(cluster.local.kubeconfig), "--incident", str(incident.id)]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "1*" in told
    assert "loop.py" in told


def test_every_step_was_reported(cluster: TrainingCluster) -> None:
    """After all of that, the curve has a point for every step up to the present one, and no point twice."""
    status = cluster.training(NAME).status
    path = cluster.local.places.system / "controller-data" / f"default_{NAME}.curve.jsonl"
    points = [(each.attempt, each.point.step) for each in read_curve(path)]
    assert len(points) == len(set(points))
    assert {step for _, step in points} >= set(range(status.step + 1))
